"""FIRST: recalibrated top-k probabilities, with and without a bucket for all other tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax, softmax

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(5, 7)) * 2).astype(np.float32)
IDS, LOG_P = (np.asarray(x) for x in losses.top_k_teacher(STUDENT, 3))
P = np.exp(LOG_P)
OTHER_P = P[::-1].copy()


def gradient(student: np.ndarray, p: np.ndarray, **options) -> np.ndarray:
    return np.asarray(jax.grad(lambda s: losses.first(s, IDS, p, **options).sum())(student))


@pytest.mark.parametrize("other_bucket", [False, True])
def test_zero_and_stationary_where_equal(other_bucket: bool) -> None:
    value = losses.first(STUDENT, IDS, P, other_bucket=other_bucket)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient(STUDENT, P, other_bucket=other_bucket), 0, atol=1e-6)


def test_only_the_bucket_trains_other_tokens() -> None:
    kept = np.zeros((5, 7), bool)
    np.put_along_axis(kept, IDS, True, axis=-1)
    assert not gradient(STUDENT, OTHER_P)[~kept].any()
    bucketed = gradient(STUDENT, OTHER_P, other_bucket=True)
    assert (np.abs(bucketed[~kept]) > 0).all()


def test_teacher_mass_matters_to_the_bucket_alone() -> None:
    plain, halved = losses.first(STUDENT, IDS, OTHER_P), losses.first(STUDENT, IDS, OTHER_P / 2)
    np.testing.assert_allclose(plain, halved, rtol=1e-5)
    with_bucket = [losses.first(STUDENT, IDS, p, other_bucket=True) for p in (OTHER_P, OTHER_P / 2)]
    assert (np.abs(with_bucket[0] - with_bucket[1]) > 1e-3).all()


def test_probability_zero_is_learnt() -> None:
    """A token the teacher's record gives 0 stays among the k: the student loses it."""
    p = np.tile(np.float32([1, 0, 0]), (5, 1))
    log_q = log_softmax(np.take_along_axis(STUDENT, IDS, -1).astype(np.float64))
    np.testing.assert_allclose(losses.first(STUDENT, IDS, p), -log_q[:, 0], rtol=1e-5)
    assert np.isfinite(gradient(STUDENT, p, other_bucket=True)).all()
    assert not losses.first(STUDENT, IDS, 0 * p).any()
    assert not gradient(STUDENT, 0 * p).any()


@pytest.mark.parametrize("other_bucket", [False, True])
def test_no_gradient_into_the_teacher_under_jit(other_bucket: bool) -> None:
    run = jax.jit(
        jax.grad(lambda p: losses.first(STUDENT, IDS, p, other_bucket=other_bucket).sum())
    )
    assert not run(OTHER_P).any()


def test_temperature_acts_on_probabilities() -> None:
    p = np.array([0.9, 0.06, 0.04], np.float32)
    np.testing.assert_allclose(losses.recalibrate_top_k(p, temperature=1e6), 1 / 3, rtol=1e-5)
    ratio = losses.recalibrate_top_k(p, temperature=1.0)
    np.testing.assert_allclose(ratio[0] / ratio[1], np.exp(0.84), rtol=1e-5)
    np.testing.assert_allclose(losses.recalibrate_top_k(p, temperature=1e-3), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda t: losses.recalibrate_top_k(p, temperature=t))(0.3),
        softmax(p.astype(np.float64) / 0.3),
        rtol=1e-5,
    )


def test_smoothing_moves_delta_from_the_largest_in_any_order() -> None:
    p = np.array([0.06, 0.9, 0.04], np.float32)
    smooth = losses.recalibrate_top_k(p, method="label_smoothing", delta=0.2)
    np.testing.assert_allclose(smooth, [0.16, 0.7, 0.14], rtol=1e-5)
    even = losses.recalibrate_top_k(p / 4, method="label_smoothing", delta=0.5)
    np.testing.assert_allclose(even, [0.265 / 0.525, 0, 0.26 / 0.525], rtol=1e-5)
    assert not jax.grad(lambda x: losses.recalibrate_top_k(x).sum())(p).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.first(STUDENT, IDS, LOG_P),
            "teacher_probabilities must be at least 0, but",
        ),
        (
            lambda: losses.first(STUDENT, IDS, 2 * P),
            "teacher_probabilities must sum to at most 1 at each position, but a sum is",
        ),
        (
            lambda: losses.first(STUDENT, IDS, P[:4], other_bucket=True),
            "teacher_probabilities must have shape (5, 3), but its shape is (4, 3)",
        ),
        (
            lambda: losses.first(STUDENT, IDS + 7, P),
            "ids must lie in [0, 7), but",
        ),
        (
            lambda: losses.first(STUDENT, IDS[:, [0, 1, 0]], P / 2),
            "ids must differ at each position, but one stands twice at (0,)",
        ),
        (
            lambda: losses.recalibrate_top_k(P, method="platt"),
            "method must be one of 'temperature', 'label_smoothing', but it is 'platt'",
        ),
        (
            lambda: losses.recalibrate_top_k(P, temperature=0.0),
            "temperature must be finite and above 0, but it is 0.0",
        ),
        (
            lambda: losses.recalibrate_top_k(P, method="label_smoothing", delta=1.5),
            "delta must lie in [0.0, 1.0], but it is 1.5",
        ),
        (
            lambda: losses.recalibrate_top_k(LOG_P),
            "probabilities must be at least 0, but",
        ),
        (
            lambda: losses.recalibrate_top_k(P[:, :1], method="label_smoothing"),
            "probabilities must have at least 2 entries to smooth, but they have 1",
        ),
        (
            lambda: losses.recalibrate_top_k(np.array([1, 0])),
            "probabilities must be floating with shape [..., V], but it is int",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_bad_ids_under_jit_are_nan_there_alone() -> None:
    ids = jnp.asarray(IDS).at[2, 1].set(7).at[3, 1].set(IDS[3, 0])
    values = jax.jit(losses.first)(STUDENT, ids, OTHER_P)
    np.testing.assert_array_equal(np.isnan(values), [0, 0, 1, 1, 0])
