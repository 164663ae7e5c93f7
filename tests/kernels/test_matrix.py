"""The matrix on every lean head; chunks of 5 tokens and 16 columns divide nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import linear_cross_entropy, linear_divergence

from tests.kernels import matrix, oracle
from tests.kernels.matrix import TEMPERATURE

CHUNKS = {"chunk_tokens": 5, "chunk_vocab": 16, "implementation": "xla"}
SHARES = {"jensen_shannon": 0.3, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
# Saturated, their gradients are what is left of numbers that cancel.
BOUNDED = ("jensen_shannon", "skew_reverse_kl", "total_variation")
OPERATIONS = (
    "cross_entropy",
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)


def values_of(operation: str, *arrays: jax.Array) -> jax.Array:
    student_hidden, student_head, teacher_hidden, teacher_head, labels = arrays
    if operation == "cross_entropy":
        student = student_hidden, student_head
        return -linear_cross_entropy(*student, labels, temperature=TEMPERATURE, **CHUNKS).log_prob
    student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
    options = {"share": SHARES.get(operation), "temperature": TEMPERATURE}
    return linear_divergence(*student, *teacher, kind=operation, **options, **CHUNKS)


def expected(operation: str, arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    student, teacher = matrix.flat_models(arrays)
    if operation == "cross_entropy":
        cotangents = -weights, np.zeros_like(weights), np.zeros_like(weights)
        labels = arrays[4].reshape(-1)
        (log_prob, _, _), gradients = oracle.cross_entropy(
            *student, labels, cotangents, TEMPERATURE
        )
        return -log_prob, gradients, gradients
    share = SHARES.get(operation)
    values, gradients, scales = oracle.divergence(
        operation, student, teacher, weights, TEMPERATURE, share=share
    )
    return values, gradients, scales if operation in BOUNDED else gradients


@matrix.each_place()
@matrix.each_dtype
@pytest.mark.parametrize("operation", OPERATIONS)
def test_against_float64(operation: str, vocab_size: int, dtype: jnp.dtype, place: str) -> None:
    functions = (functools.partial(x, operation) for x in (values_of, expected))
    matrix.assert_against_float64(*functions, vocab_size, dtype, place)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_product_accumulates_in_float32(operation: str) -> None:
    """XLA:CPU may keep digits that bfloat16 drops, so the program says it, not the numbers."""
    arrays = *matrix.make(3.0, 67, jnp.bfloat16), matrix.masks()["none"]
    function = functools.partial(matrix.run, functools.partial(values_of, operation), None)
    types = re.findall(r":(\w+)\[[^\]]*\] = dot_general", str(jax.make_jaxpr(function)(*arrays)))
    assert len(types) >= 4
    assert set(types) == {"f32"}
