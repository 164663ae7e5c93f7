"""Divergences of student and teacher logits."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax


def inputs(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 3, 7)) * 2, rng.normal(size=(rows, 3, 7)) * 2


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def forward(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return kl(log_softmax(teacher / temperature), log_softmax(student / temperature))


def reverse(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return kl(log_softmax(student / temperature), log_softmax(teacher / temperature))


CASES = (
    Case("forward_kl", losses.forward_kl, forward, inputs, differentiable=(0,)),
    Case(
        "forward_kl/temperature,squared,padded",
        functools.partial(
            losses.forward_kl, temperature=2.0, scale_by_temperature_squared=True, vocab_size=5
        ),
        lambda student, teacher: 4 * forward(student[..., :5], teacher[..., :5], 2.0),
        inputs,
        differentiable=(0,),
    ),
    Case("reverse_kl", losses.reverse_kl, reverse, inputs, differentiable=(0,)),
    Case(
        "reverse_kl/temperature,squared,padded",
        functools.partial(
            losses.reverse_kl, temperature=0.5, scale_by_temperature_squared=True, vocab_size=5
        ),
        lambda student, teacher: 0.25 * reverse(student[..., :5], teacher[..., :5], 0.5),
        inputs,
        differentiable=(0,),
    ),
)
