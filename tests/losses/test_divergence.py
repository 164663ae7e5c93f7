"""Identities of the divergences, and what they do where a probability is zero."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import losses
from tests.losses.oracle import log_softmax

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(5, 7)).astype(np.float32)
TEACHER = RNG.normal(size=(5, 7)).astype(np.float32)
KL = [losses.forward_kl, losses.reverse_kl]
ALL = [
    *KL,
    losses.symmetric_kl,
    losses.adaptive_kl,
    functools.partial(losses.jensen_shannon, beta=0.3),
    losses.skew_forward_kl,
    losses.skew_reverse_kl,
    functools.partial(losses.skew_reverse_kl, fixed_mixture=True),
]


@pytest.mark.parametrize("loss", ALL)
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


def test_symmetric_is_the_mean() -> None:
    mean = (losses.forward_kl(STUDENT, TEACHER) + losses.reverse_kl(STUDENT, TEACHER)) / 2
    np.testing.assert_allclose(losses.symmetric_kl(STUDENT, TEACHER), mean, rtol=1e-6)


def test_jensen_shannon_at_one_half_is_symmetric() -> None:
    here, there = losses.jensen_shannon(STUDENT, TEACHER), losses.jensen_shannon(TEACHER, STUDENT)
    np.testing.assert_allclose(here, there, rtol=1e-5)


@pytest.mark.parametrize(
    ("beta", "factor", "limit"),
    [(1e-4, 1e4, losses.forward_kl), (1 - 1e-4, 1e4, losses.reverse_kl)],
)
def test_jensen_shannon_tends_to_the_kls(beta: float, factor: float, limit) -> None:
    found = factor * losses.jensen_shannon(STUDENT, TEACHER, beta=beta)
    np.testing.assert_allclose(found, limit(STUDENT, TEACHER), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("skewed", "plain"),
    [(losses.skew_forward_kl, losses.forward_kl), (losses.skew_reverse_kl, losses.reverse_kl)],
)
def test_without_skew_it_is_the_kl(skewed, plain) -> None:
    def both(loss) -> tuple:
        return jax.value_and_grad(lambda s: loss(s).sum())(STUDENT)

    found = both(lambda s: skewed(s, TEACHER, skew=0.0))
    for mine, expected in zip(found, both(lambda s: plain(s, TEACHER)), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


@given(st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_bounds_of_mixtures(share: float, seed: int) -> None:
    """Of distributions that barely meet too: at least 0, and at most what one token can cost."""
    student, teacher = np.random.default_rng(seed).normal(size=(2, 20, 7)).astype(np.float32) * 30
    bound = -share * np.log(share) - (1 - share) * np.log(1 - share)
    for values, most in (
        (losses.jensen_shannon(student, teacher, beta=share), bound),
        (losses.skew_forward_kl(student, teacher, skew=share), -np.log(share)),
        (losses.skew_reverse_kl(student, teacher, skew=share), -np.log(share)),
    ):
        assert np.min(values) >= -1e-5
        assert np.max(values) <= most + 1e-5


def test_fixed_mixture_has_the_value_but_not_the_gradient() -> None:
    def run(fixed: bool) -> tuple:
        def total(student: jax.Array) -> jax.Array:
            return losses.skew_reverse_kl(student, TEACHER, skew=0.4, fixed_mixture=fixed).sum()

        return jax.value_and_grad(total)(STUDENT)

    np.testing.assert_array_equal(run(True)[0], run(False)[0])
    assert np.abs(run(True)[1] - run(False)[1]).max() > 0.01


def test_adaptive_weighs_the_kls_by_where_the_gap_is() -> None:
    """Teacher (.6, .3, .1): its head is the first token. The student errs in the tail alone."""
    teacher = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    student = np.log(np.array([[0.6, 0.1, 0.3]], np.float32))
    np.testing.assert_allclose(
        losses.adaptive_kl(student, teacher), losses.reverse_kl(student, teacher), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.adaptive_kl(student, teacher, head_mass=1.0),
        losses.forward_kl(student, teacher),
        rtol=1e-6,
    )


@pytest.mark.parametrize("loss", ALL[2:])
def test_infinite_logits_stay_finite(loss) -> None:
    """A token that the teacher, the student or both forbid."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    teacher[:, 1:3] = student[:, 2] = -np.inf
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


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
            lambda: losses.jensen_shannon(STUDENT, TEACHER, beta=0.0),
            "beta must lie in (0, 1), but it is 0.0: where the divergence tends to a KL, call",
        ),
        (
            lambda: losses.jensen_shannon(STUDENT, TEACHER, beta=1.5),
            "beta must lie in [0.0, 1.0], but it is 1.5",
        ),
        (
            lambda: losses.skew_forward_kl(STUDENT, TEACHER, skew=1),
            "skew must lie in [0, 1), but it is 1: where the divergence tends to a KL, call",
        ),
        (
            lambda: losses.skew_reverse_kl(STUDENT, TEACHER, skew=np.ones(5)),
            "skew must be a scalar, but its shape is (5,)",
        ),
        (
            lambda: losses.adaptive_kl(STUDENT, TEACHER, head_mass=-0.1),
            "head_mass must lie in [0.0, 1.0], but it is -0.1",
        ),
        (
            lambda: losses.symmetric_kl(STUDENT, TEACHER[:, :6]),
            "teacher_logits must have the shape of student_logits, (5, 7), but its shape is (5, 6)",
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
