"""Float64 numpy oracles of the heads: values and gradients from the formulas, on full logits."""

from collections.abc import Callable

import numpy as np


def logits_of(
    hidden: np.ndarray, head: np.ndarray, temperature: float, soft_cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Capped logits over the temperature, `[N, V]`, and their slope in the raw logits."""
    raw = hidden @ head.T
    if soft_cap is None:
        return raw / temperature, np.full_like(raw, 1 / temperature)
    bounded = np.tanh(raw / soft_cap)
    return soft_cap * bounded / temperature, (1 - bounded**2) / temperature


def log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `[N, V]` and log-sum-exp `[N]`."""
    maximum = logits.max(-1)
    log_sum_exp = maximum + np.log(np.exp(logits - maximum[:, None]).sum(-1))
    return logits - log_sum_exp[:, None], log_sum_exp


def cross_entropy(
    hidden: np.ndarray,
    head: np.ndarray,
    labels: np.ndarray,
    cotangents: tuple[np.ndarray, np.ndarray, np.ndarray],
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(log_prob, log_sum_exp, entropy) and the gradients of sum(cotangents * them)."""
    logits, slope = logits_of(hidden, head, temperature, soft_cap)
    log_p, log_sum_exp = log_softmax(logits)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    log_prob = log_p[np.arange(len(labels)), labels]
    is_label = np.arange(head.shape[0])[None, :] == labels[:, None]
    to_log_prob, to_sum, to_entropy = (x[:, None] for x in cotangents)
    gradient = to_log_prob * (is_label - p) + to_sum * p
    gradient -= to_entropy * p * (log_p + entropy[:, None])
    raw = slope * gradient
    return (log_prob, log_sum_exp, entropy), (raw @ head, raw.T @ hidden)


def several_labels(
    hidden: np.ndarray,
    head: np.ndarray,
    labels: np.ndarray,
    cotangents: tuple[np.ndarray, ...],
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, np.ndarray]]:
    """(log_prob, log_sum_exp, entropy, rest) of labels `[N, K]`, and gradients as above."""
    logits, slope = logits_of(hidden, head, temperature, soft_cap)
    log_p, log_sum_exp = log_softmax(logits)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    onehot = np.arange(head.shape[0]) == labels[..., None]  # [N, K, V]
    outside = np.where(onehot.any(1), 0, p)
    with np.errstate(divide="ignore"):
        rest = np.log(outside.sum(-1))
    to_log_prob, to_sum, to_entropy, to_rest = cotangents
    gradient = (to_log_prob[..., None] * (onehot - p[:, None])).sum(1) + to_sum[:, None] * p
    gradient -= to_entropy[:, None] * p * (log_p + entropy[:, None])
    mass = outside.sum(-1, keepdims=True)
    share = np.divide(outside, mass, out=np.zeros_like(p), where=mass > 0)
    gradient += np.where(mass > 0, to_rest[:, None] * (share - p), 0)
    raw = slope * gradient
    log_prob = np.take_along_axis(log_p, labels, -1)
    return (log_prob, log_sum_exp, entropy, rest), (raw @ head, raw.T @ hidden)


def divergence(
    kind: str,
    student: tuple[np.ndarray, np.ndarray],
    teacher: tuple[np.ndarray, np.ndarray],
    cotangent: np.ndarray,
    temperature: float = 1.0,
    soft_caps: tuple[float | None, float | None] = (None, None),
    share: float | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """What `of_two_heads` gives for one kind of divergence."""

    def of_logs(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms, derivative = of_probabilities(kind, log_p, log_q, share)
        return terms.sum(-1), derivative

    return of_two_heads(of_logs, student, teacher, cotangent, temperature, soft_caps)


def of_two_heads(
    of_logs: Callable,
    student: tuple[np.ndarray, np.ndarray],
    teacher: tuple[np.ndarray, np.ndarray],
    cotangent: np.ndarray,
    temperature: float = 1.0,
    soft_caps: tuple[float | None, float | None] = (None, None),
) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Values per token, the student's gradients of sum(cotangent * values), and their scales.

    `of_logs(log_p, log_q)` gives the values `[N]` and their derivatives in q, `[N, V]`.

    A scale is the sum of the magnitudes whose signed sum is the gradient: to it the rounding of
    any order of summation is relative. Where a bounded divergence is at its bound the gradient
    itself is what is left of numbers that cancel.
    """
    logits, slope = logits_of(*student, temperature, soft_caps[0])
    log_q, _ = log_softmax(logits)
    log_p, _ = log_softmax(logits_of(*teacher, temperature, soft_caps[1])[0])
    values, derivative = of_logs(log_p, log_q)
    q = np.exp(log_q)
    gradient = q * (derivative - (q * derivative).sum(-1, keepdims=True))
    magnitude = q * (np.abs(derivative) + (q * np.abs(derivative)).sum(-1, keepdims=True))
    gradient, magnitude = (slope * x * cotangent[:, None] for x in (gradient, magnitude))
    hidden, head = student
    scales = np.abs(magnitude) @ np.abs(head), np.abs(magnitude).T @ np.abs(hidden)
    return values, (gradient @ head, gradient.T @ hidden), scales


def of_probabilities(
    kind: str, log_p: np.ndarray, log_q: np.ndarray, share: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The terms whose sum is the divergence, and its derivative in q."""
    p, q = np.exp(log_p), np.exp(log_q)
    forward = p * (log_p - log_q), -np.exp(log_p - log_q)
    reverse = q * (log_q - log_p), log_q - log_p + 1
    if kind == "forward_kl":
        return forward
    if kind == "reverse_kl":
        return reverse
    if kind == "symmetric_kl":
        return (forward[0] + reverse[0]) / 2, (forward[1] + reverse[1]) / 2
    if kind == "total_variation":
        return np.abs(p - q) / 2, np.sign(q - p) / 2
    weight = 1 - share if kind.startswith("skew_reverse") else share
    mixture = weight * p + (1 - weight) * q
    log_m = np.log(mixture)
    if kind == "skew_forward_kl":
        return p * (log_p - log_m), -(1 - share) * p / mixture
    if kind == "jensen_shannon":
        terms = share * p * (log_p - log_m) + (1 - share) * q * (log_q - log_m)
        through_mixture = (1 - share) * (share * p + (1 - share) * q) / mixture
        return terms, (1 - share) * (log_q - log_m + 1) - through_mixture
    through_mixture = 0 if kind.endswith("fixed_mixture") else share * q / mixture
    return q * (log_q - log_m), log_q - log_m + 1 - through_mixture
