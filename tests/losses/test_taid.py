"""TAID's target: its ends, the gradient it gives, and columns of probability 0."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import softmax

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(5, 7)) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=(5, 7)) * 2).astype(np.float32)


def test_ends_are_student_and_teacher() -> None:
    np.testing.assert_array_equal(losses.taid_target(STUDENT, TEACHER, 0), STUDENT)
    np.testing.assert_array_equal(losses.taid_target(STUDENT, TEACHER, 1), TEACHER)


def test_gradient_of_the_loss_holds_the_target_still() -> None:
    """(Q - target) / T, with the share traced: one program, and no gradient into the share."""

    @jax.jit
    def run(student: jax.Array, share: jax.Array) -> tuple:
        def loss(student: jax.Array, share: jax.Array) -> jax.Array:
            target = losses.taid_target(student, TEACHER, share)
            return losses.forward_kl(student, target, temperature=2.0).sum()

        return jax.grad(loss, argnums=(0, 1))(student, share)

    for share in (0.0, 0.4, 1.0):
        gradient, of_share = run(STUDENT, jnp.float32(share))
        student, teacher = STUDENT.astype(np.float64), TEACHER.astype(np.float64)
        target = softmax(((1 - share) * student + share * teacher) / 2)
        np.testing.assert_allclose(gradient, (softmax(student / 2) - target) / 2, atol=1e-6)
        assert of_share == 0


@pytest.mark.parametrize("traced", [False, True])
def test_columns_of_probability_zero(traced: bool) -> None:
    """-inf where a side that counts has it, and never NaN."""
    student, teacher = np.zeros(4, np.float32), np.ones(4, np.float32)
    student[1] = teacher[2] = student[3] = teacher[3] = -np.inf
    make = jax.jit(losses.taid_target) if traced else losses.taid_target
    inf = np.inf
    np.testing.assert_array_equal(make(student, teacher, 0.0), [0, -inf, 0, -inf])
    np.testing.assert_array_equal(make(student, teacher, 0.5), [0.5, -inf, -inf, -inf])
    np.testing.assert_array_equal(make(student, teacher, 1.0), [1, 1, -inf, -inf])
    gradient = jax.grad(lambda s: losses.forward_kl(s, make(s, teacher, 0.5)).sum())(student)
    assert np.isfinite(gradient).all()


def test_paddings_may_differ() -> None:
    wide = np.concatenate([TEACHER, np.full((5, 2), 9.0, np.float32)], axis=-1)
    target = losses.taid_target(STUDENT, wide, 0.4, vocab_size=6)
    np.testing.assert_array_equal(target, losses.taid_target(STUDENT, TEACHER, 0.4)[:, :6])
    value = losses.forward_kl(STUDENT, target, vocab_size=6)
    np.testing.assert_array_less(value, losses.forward_kl(STUDENT, TEACHER, vocab_size=6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.taid_target(STUDENT, TEACHER, 1.5),
            "share must lie in [0.0, 1.0], but it is 1.5",
        ),
        (
            lambda: losses.taid_target(STUDENT, TEACHER, np.full(5, 0.5)),
            "share must be a scalar, but its shape is (5,)",
        ),
        (
            lambda: losses.taid_target(STUDENT, TEACHER[:, :6], 0.5),
            "teacher_logits must have the shape of student_logits, (5, 7), but its shape is (5, 6)",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
