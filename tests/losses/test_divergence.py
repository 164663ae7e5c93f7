"""Identities of the divergences, and what they do where a probability is zero."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(5, 7)).astype(np.float32)
TEACHER = RNG.normal(size=(5, 7)).astype(np.float32)
KL = [losses.forward_kl, losses.reverse_kl]


@pytest.mark.parametrize("loss", KL)
def test_zero_and_stationary_where_equal(loss) -> None:
    moved = STUDENT + 5.0  # the same distribution
    value, gradient = jax.value_and_grad(lambda s: loss(s, STUDENT, temperature=2.0).sum())(moved)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_reverse_is_forward_with_the_roles_swapped() -> None:
    np.testing.assert_allclose(
        losses.reverse_kl(STUDENT, TEACHER), losses.forward_kl(TEACHER, STUDENT), rtol=1e-6
    )


@pytest.mark.parametrize("loss", KL)
def test_temperature_squared_holds_the_gradient_up(loss) -> None:
    """At a high temperature T^2 KL tends to half the mean square of the centred difference."""
    function = functools.partial(loss, scale_by_temperature_squared=True)
    student, teacher = STUDENT.astype(np.float64), TEACHER.astype(np.float64)
    difference = (student - student.mean(-1, keepdims=True)) - (
        teacher - teacher.mean(-1, keepdims=True)
    )
    limit = 0.5 * (difference**2).mean(-1)
    np.testing.assert_allclose(function(STUDENT, TEACHER, temperature=100.0), limit, rtol=2e-2)


@pytest.mark.parametrize("loss", KL)
def test_tokens_the_teacher_forbids(loss) -> None:
    """-inf teacher logits: finite value and gradient, and the sum runs over the rest."""
    teacher = TEACHER.copy()
    teacher[:, 2] = -np.inf
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(STUDENT)
    kept = np.delete(np.arange(7), 2)
    log_q = log_softmax(STUDENT.astype(np.float64))[:, kept]
    log_p = log_softmax(TEACHER[:, kept].astype(np.float64))
    p, q = np.exp(log_p), np.exp(log_q)
    forward, reverse = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()
    np.testing.assert_allclose(value, forward if loss is losses.forward_kl else reverse, rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", KL)
def test_both_forbid_a_token(loss) -> None:
    """-inf on both sides is as if the column did not exist."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, 6] = teacher[:, 6] = -np.inf
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    np.testing.assert_allclose(value, loss(STUDENT[:, :6], TEACHER[:, :6]).sum(), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", KL)
def test_paddings_may_differ(loss) -> None:
    wide = np.concatenate([TEACHER, np.full((5, 4), 9.0, np.float32)], axis=-1)
    np.testing.assert_array_equal(
        loss(STUDENT, wide, vocab_size=7), loss(STUDENT, TEACHER, vocab_size=7)
    )


@pytest.mark.parametrize("loss", [*KL, losses.from_hidden.forward_kl])
def test_temperature_is_a_constant(loss) -> None:
    """A traced temperature compiles once for all values, and takes no gradient."""
    head = np.eye(7, dtype=np.float32)
    arrays = (STUDENT, TEACHER) if loss in KL else (STUDENT, head, TEACHER, head)

    @jax.jit
    def run(temperature: jax.Array) -> tuple:
        return jax.value_and_grad(
            lambda t: loss(*arrays, temperature=t, scale_by_temperature_squared=True).sum()
        )(temperature)

    for temperature in (1.0, 2.0):
        value, gradient = run(jnp.float32(temperature))
        expected = loss(*arrays, temperature=temperature, scale_by_temperature_squared=True)
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-6)
        assert gradient == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.forward_kl(STUDENT, TEACHER[:, :6]),
            "teacher_logits must have the shape of student_logits, (5, 7), but its shape is (5, 6)",
        ),
        (
            lambda: losses.forward_kl(STUDENT, TEACHER, temperature=0),
            "temperature must be finite and above 0, but it is 0.0",
        ),
        (
            lambda: losses.reverse_kl(STUDENT, TEACHER, temperature=float("nan")),
            "temperature must be finite and above 0, but it is nan",
        ),
        (
            lambda: losses.reverse_kl(STUDENT.astype(int), TEACHER),
            "student_logits must be floating with shape [..., V], but it is int",
        ),
        (
            lambda: losses.forward_kl(STUDENT, TEACHER, vocab_size=8),
            "vocab_size must lie in [1, 7], the columns of student_logits, but it is 8",
        ),
        (
            lambda: losses.cross_entropy(STUDENT, np.zeros((5, 1), int)),
            "labels must have shape (5,), but the shape is (5, 1)",
        ),
        (
            lambda: losses.cross_entropy(STUDENT, np.full(5, -100)),
            "labels must lie in [0, 7), but -100 is among them",
        ),
        (
            lambda: losses.cross_entropy(STUDENT, np.zeros(5)),
            "labels must be integers, but the type is float",
        ),
        (
            lambda: losses.cross_entropy(STUDENT, np.zeros(5, int), label_smoothing=1.5),
            "label_smoothing must lie in [0.0, 1.0], but it is 1.5",
        ),
        (
            lambda: losses.soft_cross_entropy(STUDENT, np.ones((5, 6), np.float32)),
            "targets must have the shape of logits, (5, 7), but its shape is (5, 6)",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_label_out_of_range_under_jit_is_nan_there_alone() -> None:
    labels = np.array([0, -1, -100, 7, 6])
    mask = np.array([1, 0, 0, 0, 1])

    @jax.jit
    def run(logits: jax.Array, labels: jax.Array) -> tuple:
        def mean(logits: jax.Array) -> tuple:
            values = losses.cross_entropy(logits, labels)
            return losses.token_mean(values, mask).mean(), values

        return jax.value_and_grad(mean, has_aux=True)(logits)

    (mean, values), gradient = run(STUDENT, labels)
    np.testing.assert_array_equal(np.isnan(values), mask == 0)
    np.testing.assert_allclose(mean, np.asarray(values)[[0, 4]].mean(), rtol=1e-6)
    assert np.isfinite(gradient).all()
