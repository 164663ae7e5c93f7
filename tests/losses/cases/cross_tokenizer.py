"""Distillation across vocabularies, and towards a target that moves."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.cases import divergence
from tests.losses.contract import Case
from tests.losses.oracle import softmax


def two_vocabularies(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 3, 7)) * 2, rng.normal(size=(rows, 3, 9)) * 2


def sorted_distance(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Rank by rank, with nothing beyond the last of a vocabulary."""
    result = np.zeros(student.shape[:-1])
    for position in np.ndindex(result.shape):
        q, p = (sorted(softmax(x[position]), reverse=True) for x in (student, teacher))
        for rank in range(max(len(q), len(p))):
            pair = [x[rank] if rank < len(x) else 0.0 for x in (q, p)]
            result[position] += abs(pair[0] - pair[1])
    return result


CASES = (
    Case(
        "universal_logit",
        losses.universal_logit,
        sorted_distance,
        two_vocabularies,
        differentiable=(0,),
        extreme=(0, 1),
    ),
    Case(
        "universal_logit/temperature,padded",
        functools.partial(
            losses.universal_logit, temperature=2.0, student_vocab_size=6, teacher_vocab_size=5
        ),
        lambda student, teacher: sorted_distance(student[..., :6] / 2, teacher[..., :5] / 2),
        two_vocabularies,
        differentiable=(0,),
        extreme=(0, 1),
    ),
    Case(
        "taid_target/padded",
        functools.partial(losses.taid_target, share=0.4, vocab_size=5),
        lambda student, teacher: 0.6 * student[..., :5] + 0.4 * teacher[..., :5],
        divergence.inputs,
        differentiable=(),
        extreme=(0, 1),
    ),
)
