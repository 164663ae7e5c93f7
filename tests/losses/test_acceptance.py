"""Total variation and what follows from it: acceptance, policy gradient, samples, devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdistill import losses
from tests.losses.oracle import softmax

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 12, 7)).astype(np.float32) * 2
P, Q = softmax(TEACHER.astype(np.float64)), softmax(STUDENT.astype(np.float64))


def gradient(loss) -> np.ndarray:
    return np.asarray(jax.grad(lambda student: loss(student).sum())(STUDENT))


def test_total_variation_is_what_speculative_decoding_rejects() -> None:
    """1 - sum_v Q_v min(1, P_v / Q_v)."""
    accepted = (Q * np.minimum(1, P / Q)).sum(-1)
    np.testing.assert_allclose(losses.total_variation(STUDENT, TEACHER), 1 - accepted, atol=1e-6)
    np.testing.assert_allclose(
        losses.log_acceptance(STUDENT, TEACHER), -np.log(accepted), rtol=1e-5
    )


def test_total_variation_is_a_policy_gradient() -> None:
    """E_{x ~ Q}[grad log Q(x) (-r(x))], r = 1 where P > Q: sum_v Q_v (1_v - Q) (-r_v)."""
    reward = (P > Q).astype(float)
    expected = -(Q * reward - Q * (Q * reward).sum(-1, keepdims=True))
    found = gradient(lambda student: losses.total_variation(student, TEACHER))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("statistics", ["student", "vocabulary"])
def test_exact_gradient_is_that_of_total_variation_over_the_deviation(statistics: str) -> None:
    reward = (P > Q).astype(float)
    mean = (Q * reward).sum(-1).mean() if statistics == "student" else reward.mean()
    expected = gradient(lambda s: losses.total_variation(s, TEACHER)) / np.sqrt(mean * (1 - mean))
    found = gradient(lambda s: losses.tvd_plus_plus(s, TEACHER, statistics=statistics))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sampled_gradient_is_the_exact_one_on_average() -> None:
    """With the vocabulary's statistics, which do not hang on the samples; within 4 errors."""
    keys = jax.random.split(jax.random.key(0), 200)

    def sampled(key: jax.Array) -> jax.Array:
        def total(student: jax.Array) -> jax.Array:
            options = {"key": key, "num_samples": 16, "statistics": "vocabulary"}
            return losses.tvd_plus_plus(student, TEACHER, **options).sum()

        return jax.grad(total)(STUDENT)

    found = np.asarray(jax.jit(jax.vmap(sampled))(keys), np.float64)
    exact = gradient(lambda s: losses.tvd_plus_plus(s, TEACHER, statistics="vocabulary"))
    error = found.std(0) / np.sqrt(len(keys))
    assert (np.abs(found.mean(0) - exact) < 4 * error + 1e-6).all()
    assert (error < 0.2).all()


def test_masked_positions_have_no_part_in_the_statistics() -> None:
    mask = np.arange(12) < 8
    poisoned = STUDENT.copy()
    poisoned[8:] = np.nan
    for options in ({}, {"key": jax.random.key(0)}):
        found = losses.tvd_plus_plus(poisoned, TEACHER, mask, **options)
        assert np.isfinite(found[:8]).all()
    np.testing.assert_allclose(
        losses.tvd_plus_plus(poisoned, TEACHER, mask)[:8],
        losses.tvd_plus_plus(STUDENT[:8], TEACHER[:8]),
        rtol=1e-5,
    )


def test_rewards_that_do_not_differ_give_no_infinity() -> None:
    """Student and teacher equal: no token is certain, and the deviation is held above 0."""
    value, pushed = jax.value_and_grad(lambda s: losses.tvd_plus_plus(s, STUDENT).sum())(STUDENT)
    assert value == 0
    np.testing.assert_array_equal(pushed, 0)


def test_statistics_of_all_devices() -> None:
    """Four devices with axis_name: values and gradients are those of one."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        functools.partial(losses.tvd_plus_plus, axis_name="data"),
        mesh=mesh,
        in_specs=(rows, rows, rows),
        out_specs=rows,
    )
    weights = jnp.asarray(RNG.normal(size=12), jnp.float32)
    mask = np.arange(12) % 5 != 0

    def run(loss) -> tuple:
        def total(student: jax.Array) -> tuple:
            values = loss(student, TEACHER, mask)
            return jnp.sum(weights * values), values

        return jax.jit(jax.grad(total, has_aux=True))(STUDENT)

    for mine, expected in zip(run(sharded), run(losses.tvd_plus_plus), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_no_token_for_both_is_infinite() -> None:
    student, teacher = np.array([[0.0, -np.inf]]), np.array([[-np.inf, 0.0]])
    assert losses.log_acceptance(student, teacher) == np.inf
    assert losses.total_variation(student, teacher) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.tvd_plus_plus(STUDENT, TEACHER, np.ones(5)),
            "mask must have shape (12,), but its shape is (5,)",
        ),
        (
            lambda: losses.tvd_plus_plus(STUDENT, TEACHER, statistics="uniform"),
            "statistics must be one of 'student', 'vocabulary', but it is 'uniform'",
        ),
        (
            lambda: losses.tvd_plus_plus(STUDENT, TEACHER, num_samples=0),
            "num_samples must lie in [1, inf], but it is 0",
        ),
        (
            lambda: losses.total_variation(STUDENT, TEACHER[:, :6]),
            "teacher_logits must have the shape of student_logits, (12, 7), but its shape is",
        ),
        (
            lambda: losses.log_acceptance(STUDENT, TEACHER, temperature=0.0),
            "temperature must be finite and above 0, but it is 0.0",
        ),
    ],
)
def test_messages(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
