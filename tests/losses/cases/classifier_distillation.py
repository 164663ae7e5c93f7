"""Distillation of classifiers; the oracles go class by class in probabilities."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.cases.policy import batch_case
from tests.losses.contract import Case
from tests.losses.oracle import softmax


def classified(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    logits = [rng.normal(size=(rows, 3, 7)) * 2 for _ in range(2)]
    return *logits, rng.integers(0, 5, (rows, 3))


def decoupled(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0):
    """TCKD and NCKD of each row, before the factor temperature^2."""
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    result = np.zeros(labels.shape)
    for row in np.ndindex(labels.shape):
        y = labels[row]
        for target_p, target_q in ((p[row][y], q[row][y]), (1 - p[row][y], 1 - q[row][y])):
            result[row] += alpha * target_p * np.log(target_p / target_q)
        p_hat, q_hat = (np.delete(x[row], y) / (1 - x[row][y]) for x in (p, q))
        result[row] += beta * sum(a * np.log(a / b) for a, b in zip(p_hat, q_hat, strict=True))
    return result


def standardized(logits: np.ndarray) -> np.ndarray:
    return (logits - logits.mean(-1, keepdims=True)) / logits.std(-1, keepdims=True)


def batch(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Student and teacher agree in part; the fourth row does not exist."""
    teacher = rng.normal(size=(rows, 6)) * 2
    return teacher + rng.normal(size=(rows, 6)), teacher, np.arange(rows) != 3


def dist(student, teacher, keep, beta=2.0, gamma=2.0, temperature=1.0):
    """Distances by numpy's own correlation, row by row and class by class."""
    q, p = softmax(student[keep] / temperature), softmax(teacher[keep] / temperature)
    inter = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    intra = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    return np.asarray(beta * np.mean(inter) + gamma * np.mean(intra))


def damped(student, teacher, keep, epsilon):
    """Distances with a number that counts beside the norms."""
    q, p = softmax(student[keep]), softmax(teacher[keep])
    distances = []
    for a, b in ((q, p), (q.T, p.T)):
        a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        distances.append(np.mean(1 - (a * b).sum(-1) / (norms + epsilon)))
    return np.asarray(2 * sum(distances))


CASES = (
    Case(
        "decoupled_kd",
        losses.decoupled_kd,
        lambda *arrays: 16 * decoupled(*arrays),
        classified,
        differentiable=(0,),
        extreme=(0, 1),
    ),
    Case(
        "decoupled_kd/weights,temperature,unscaled,padded",
        functools.partial(
            losses.decoupled_kd,
            target_weight=0.5,
            non_target_weight=2.0,
            temperature=1.5,
            scale_by_temperature_squared=False,
            vocab_size=5,
        ),
        lambda student, teacher, labels: decoupled(
            student[..., :5], teacher[..., :5], labels, 0.5, 2.0, 1.5
        ),
        classified,
        differentiable=(0,),
        extreme=(0, 1),
    ),
    Case(
        "standardize_logits",
        functools.partial(losses.standardize_logits, vocab_size=5),
        lambda logits: standardized(logits[..., :5]),
        lambda rng, rows: (rng.normal(size=(rows, 3, 7)) * 2 + 5,),
        differentiable=(0,),
    ),
    batch_case("dist", dist, batch, extreme=(0, 1)),
    batch_case(
        "dist/weights,temperature,padded",
        lambda student, teacher, keep: dist(
            student[:, :5], teacher[:, :5], keep, 0.5, 3.0, temperature=4.0
        ),
        batch,
        extreme=(0, 1),
        inter_weight=0.5,
        intra_weight=3.0,
        temperature=4.0,
        vocab_size=5,
    ),
    batch_case(
        "dist/epsilon", functools.partial(damped, epsilon=0.1), batch, extreme=(0, 1), epsilon=0.1
    ),
)
