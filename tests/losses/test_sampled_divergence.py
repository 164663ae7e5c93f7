"""Sampled forward KL: its average over the draws is the dense one, in value and gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import sampled_divergence, sampling
from tests.losses.oracle import log_softmax, softmax

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=7) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=7) * 2).astype(np.float32)
TEACHER[5] = -np.inf
REPEATS = 4000


@functools.cache
def records(power: float, num_samples: int = 4):
    """So many independent records of one teacher."""
    teacher = np.broadcast_to(TEACHER, (REPEATS, 7))
    key = jax.random.key(0)
    return jax.jit(losses.sample_teacher, static_argnums=1)(
        teacher, num_samples, key, proposal_power=power
    )


def value_and_gradient(loss, student) -> tuple:
    values, pull = jax.vjp(loss, jnp.asarray(student))
    return values, pull(jnp.ones_like(values))[0]


def z_scores(draws: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of the mean of draws from what it should be, in its standard errors."""
    draws = np.asarray(draws, np.float64)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    return np.abs(draws.mean(axis=0) - expected) / np.maximum(error, 1e-9)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_average_is_the_dense_divergence(power: float) -> None:
    """Value and gradient, within four standard errors of 4,000 records at a fixed seed."""
    loss = lambda s: losses.sampled_forward_kl(s, *records(power))  # noqa: E731
    found = value_and_gradient(loss, np.broadcast_to(STUDENT, (REPEATS, 7)))
    expected = value_and_gradient(lambda s: losses.forward_kl(s, TEACHER), STUDENT)
    for draws, mean in zip(found, expected, strict=True):
        assert z_scores(draws, mean).max() < 4


def test_weights_divided_by_their_sum_are_biased() -> None:
    """The bias our weights do not have, many standard errors wide at so few draws."""
    ids, weights, log_probs = records(0.5)
    normalised = weights / weights.sum(-1, keepdims=True)
    draws = losses.sampled_forward_kl(
        np.broadcast_to(STUDENT, (REPEATS, 7)), ids, normalised, log_probs
    )
    assert z_scores(draws, losses.forward_kl(STUDENT, TEACHER)) > 8


def test_all_ids_weighted_by_probability_are_forward_kl() -> None:
    options = {"temperature": 2.0, "scale_by_temperature_squared": True}
    log_p = log_softmax(TEACHER.astype(np.float64) / 2)
    arrays = np.arange(7), np.exp(log_p), log_p
    found = value_and_gradient(lambda s: losses.sampled_forward_kl(s, *arrays, **options), STUDENT)
    dense = value_and_gradient(lambda s: losses.forward_kl(s, TEACHER, **options), STUDENT)
    for actual, desired in zip(found, dense, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)
    without = losses.sampled_forward_kl(STUDENT, *arrays[:2], **options)
    entropy = -(np.exp(log_p)[log_p > -np.inf] * log_p[log_p > -np.inf]).sum()
    np.testing.assert_allclose(without, dense[0] + 4 * entropy, rtol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_draws_follow_the_proposal(power: float) -> None:
    ids, weights, log_probs = (np.asarray(x) for x in records(power))
    assert (ids.dtype, weights.dtype, log_probs.dtype) == (np.int32, np.float32, np.float32)
    p = softmax(TEACHER.astype(np.float64))
    proposal = p**power / (p**power).sum()
    frequency = (ids[..., None] == np.arange(7)).mean(axis=1)
    assert z_scores(frequency, proposal).max() < 4
    assert not (ids == 5).any()
    np.testing.assert_allclose(weights, (p / np.maximum(proposal, 1e-9))[ids] / 4, rtol=1e-4)
    np.testing.assert_allclose(np.exp(log_probs), p[ids], rtol=1e-5)


def test_tokens_of_probability_zero_are_never_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest draw passes over those at the start; one that rounding drew weighs nothing."""
    log_p = jnp.log(jnp.array([0.0, 0.0, 0.4, 0.0, 0.6, 0.0]))
    ends = jnp.array([0.0, 1 - 2.0**-24])
    np.testing.assert_array_equal(sampling.draw_at(ends, log_p), [2, 4])
    drawn = lambda uniform, log_p: jnp.array([1, 2])  # noqa: E731
    monkeypatch.setattr(sampled_divergence, "draw_at", drawn)
    found = losses.sample_teacher(log_p, 2, jax.random.key(0))
    np.testing.assert_array_equal(found.weights, [0, 0.5])
    assert np.isfinite(losses.sampled_forward_kl(STUDENT[:6], *found))


def test_positions_and_keys_draw_apart() -> None:
    ids = np.asarray(records(1.0).ids)
    pairs = (ids[0::2] == ids[1::2]).mean()
    p = softmax(TEACHER.astype(np.float64))
    assert abs(pairs - (p**2).sum()) < 0.03
    teacher = np.zeros((2, 3, 7), np.float32)
    first, again, other = (
        losses.sample_teacher(teacher, 5, jax.random.key(seed)).ids for seed in (0, 0, 1)
    )
    assert first.shape == (2, 3, 5)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_padding_and_temperature_of_the_teacher() -> None:
    wide = np.append(TEACHER, np.float32(99.0))
    key = jax.random.key(0)
    padded = losses.sample_teacher(wide, 50, key, temperature=3.0, vocab_size=7)
    expected = losses.sample_teacher(TEACHER / np.float32(3.0), 50, key)
    np.testing.assert_array_equal(padded.ids, expected.ids)
    np.testing.assert_allclose(padded.log_probs, expected.log_probs, rtol=1e-6)
    tracked = lambda x: losses.sample_teacher(x, 5, key, proposal_power=0.5)  # noqa: E731
    assert not jax.grad(lambda x: tracked(x).log_probs.sum() + tracked(x).weights.sum())(wide).any()


def test_equal_ids_may_be_joined_and_places_left_unused() -> None:
    drawn = np.array([3, 3, 0, 3])
    joined, weights = np.array([3, 0, 1]), np.array([0.75, 0.25, 0.0], np.float32)
    log_p = np.array([-1.0, -2.0, -np.inf], np.float32)
    student = np.where(np.arange(7) == 1, -np.inf, STUDENT).astype(np.float32)
    found = value_and_gradient(
        lambda s: losses.sampled_forward_kl(s, joined, weights, log_p), student
    )
    expected = value_and_gradient(
        lambda s: losses.sampled_forward_kl(s, drawn, None, log_p[[0, 0, 1, 0]]), student
    )
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-7)


def test_id_out_of_range_under_jit_is_nan_there_alone() -> None:
    ids = np.array([[1, 2], [1, 7], [-1, 0]])
    student = np.broadcast_to(STUDENT, (3, 7))
    values = jax.jit(losses.sampled_forward_kl)(student, ids)
    np.testing.assert_array_equal(np.isnan(values), [False, True, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.sampled_forward_kl(STUDENT, np.array([1, 7])),
            "ids must lie in [0, 7), but 7 is among them",
        ),
        (
            lambda: losses.sampled_forward_kl(STUDENT, np.array([1, 2]), np.ones(3)),
            "weights must have shape (2,), but its shape is (3,)",
        ),
        (
            lambda: losses.sampled_forward_kl(STUDENT, np.array([1, 2]), None, np.ones(3)),
            "teacher_log_probs must have shape (2,), but its shape is (3,)",
        ),
        (
            lambda: losses.sampled_forward_kl(STUDENT, np.array([1]), temperature=-1.0),
            "temperature must be finite and above 0, but it is -1.0",
        ),
        (
            lambda: losses.sample_teacher(TEACHER, 0, jax.random.key(0)),
            "num_samples must lie in [1, inf], but it is 0",
        ),
        (
            lambda: losses.sample_teacher(TEACHER, 2, jax.random.key(0), proposal_power=0.0),
            "proposal_power must be finite and above 0, but it is 0.0",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
