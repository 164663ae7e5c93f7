"""Float64 numpy oracles of the heads: values and gradients from the formulas, on full logits."""

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


def divergence(
    kind: str,
    student: tuple[np.ndarray, np.ndarray],
    teacher: tuple[np.ndarray, np.ndarray],
    cotangent: np.ndarray,
    temperature: float = 1.0,
    soft_caps: tuple[float | None, float | None] = (None, None),
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """KL per token and the student's gradients of sum(cotangent * KL)."""
    logits, slope = logits_of(*student, temperature, soft_caps[0])
    log_q, _ = log_softmax(logits)
    log_p, _ = log_softmax(logits_of(*teacher, temperature, soft_caps[1])[0])
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "forward_kl":
        values = (p * (log_p - log_q)).sum(-1)
        gradient = q - p
    else:
        values = (q * (log_q - log_p)).sum(-1)
        gradient = q * (log_q - log_p - values[:, None])
    raw = slope * gradient * cotangent[:, None]
    hidden, head = student
    return values, (raw @ head, raw.T @ hidden)
