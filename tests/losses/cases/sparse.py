"""Divergences from a sparse teacher: its largest probabilities, or draws from it."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax, softmax


def top_three(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Student, and of a teacher over five columns the ids and log-probabilities of three."""
    teacher = log_softmax(rng.normal(size=(rows, 3, 5)))
    ids = np.argsort(-teacher, axis=-1)[..., :3]
    return rng.normal(size=(rows, 3, 7)) * 2, ids, np.take_along_axis(teacher, ids, -1)


def top_three_probabilities(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    student, ids, log_probs = top_three(rng, rows)
    return student, ids, np.exp(log_probs)


def draws(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Student, and ids with repetitions, their weights and log-probabilities."""
    weights = rng.uniform(0.1, 0.5, (rows, 3, 4))
    log_probs = -rng.exponential(2.0, (rows, 3, 4))
    return rng.normal(size=(rows, 3, 7)) * 2, rng.integers(0, 5, (rows, 3, 4)), weights, log_probs


def probabilities(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Of which some are so even that smoothing takes all of the largest."""
    return (0.9 * softmax(rng.normal(size=(rows, 3, 4)) * 2),)


def bucketed(student: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    """KL of (kept entries, rest), position by position."""
    q = softmax(student)
    result = np.zeros(ids.shape[:-1])
    for position in np.ndindex(result.shape):
        kept = ids[position]
        pairs = list(zip(p[position], q[position][kept], strict=True))
        pairs.append((1 - p[position].sum(), np.delete(q[position], kept).sum()))
        result[position] = sum(a * np.log(a / b) for a, b in pairs if a > 0)
    return result


def truncated(student: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    q = np.take_along_axis(softmax(student), ids, -1)
    return (p * np.log(p / q)).sum(-1)


def renormalised(student: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    return truncated(student, ids, p / p.sum(-1, keepdims=True))


def both_renormalised(student: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    q = np.take_along_axis(softmax(student), ids, -1)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def of_logs(form):
    return lambda student, ids, log_probs: form(student, ids, np.exp(log_probs))


def sampled(student, ids, weights, log_probs) -> np.ndarray:
    log_q = np.take_along_axis(log_softmax(student), ids, -1)
    return (weights * (log_probs - log_q)).sum(-1)


def smoothed(p: np.ndarray, delta: float) -> np.ndarray:
    result = np.zeros_like(p)
    for position in np.ndindex(p.shape[:-1]):
        row = p[position] + delta / (p.shape[-1] - 1)
        top = np.argmax(p[position])
        row[top] = max(p[position][top] - delta, 0)
        result[position] = row / row.sum()
    return result


SHARED = {"temperature": 0.5, "scale_by_temperature_squared": True, "vocab_size": 5}

CASES = (
    Case(
        "topk_forward_kl/bucket",
        losses.topk_forward_kl,
        of_logs(bucketed),
        top_three,
        differentiable=(0,),
    ),
    Case(
        "topk_forward_kl/bucket,temperature,squared,padded",
        functools.partial(losses.topk_forward_kl, **SHARED),
        lambda student, ids, logs: 0.25 * of_logs(bucketed)(student[..., :5] / 0.5, ids, logs),
        top_three,
        differentiable=(0,),
    ),
    Case(
        "topk_forward_kl/ignore,temperature,squared,padded",
        functools.partial(losses.topk_forward_kl, tail="ignore", **SHARED),
        lambda student, ids, logs: 0.25 * of_logs(truncated)(student[..., :5] / 0.5, ids, logs),
        top_three,
        differentiable=(0,),
    ),
    Case(
        "topk_forward_kl/renormalise",
        functools.partial(losses.topk_forward_kl, tail="renormalise"),
        of_logs(renormalised),
        top_three,
        differentiable=(0,),
    ),
    Case("sampled_forward_kl", losses.sampled_forward_kl, sampled, draws, differentiable=(0,)),
    Case(
        "sampled_forward_kl/plain,temperature,squared,padded",
        functools.partial(losses.sampled_forward_kl, **SHARED),
        lambda student, ids: 0.25 * sampled(student[..., :5] / 0.5, ids, 1 / 4, 0.0),
        lambda rng, rows: draws(rng, rows)[:2],
        differentiable=(0,),
    ),
    Case("first", losses.first, both_renormalised, top_three_probabilities, differentiable=(0,)),
    Case(
        "first/other_bucket,padded",
        functools.partial(losses.first, other_bucket=True, vocab_size=5),
        lambda student, ids, p: bucketed(student[..., :5], ids, p),
        top_three_probabilities,
        differentiable=(0,),
    ),
    Case(
        "recalibrate_top_k/temperature",
        functools.partial(losses.recalibrate_top_k, temperature=0.2),
        lambda p: softmax(p / 0.2),
        probabilities,
        differentiable=(),
    ),
    Case(
        "recalibrate_top_k/label_smoothing",
        functools.partial(losses.recalibrate_top_k, method="label_smoothing", delta=0.4),
        functools.partial(smoothed, delta=0.4),
        probabilities,
        differentiable=(),
    ),
)
