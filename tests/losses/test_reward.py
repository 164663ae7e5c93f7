"""Reward models and pairs of diffusion samples, beyond the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

LOG_2 = np.log(2)


def total(loss):
    return lambda *inputs, **settings: jnp.sum(loss(*inputs, **settings))


def test_bradley_terry_at_extreme_margins() -> None:
    run = jax.value_and_grad(total(losses.bradley_terry), argnums=(0, 1))
    value, gradients = run(np.array([-1e8, 1e8]), np.zeros(2))
    assert value == 1e8
    np.testing.assert_array_equal(gradients, [[-1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([5, 6, 7, 8], [5, 6, 1, 8], [0, 0, 1, 1]),  # a second agreement does not end it
        ([5, 6, 7, 8], [5, 6], [0, 0, 1, 1]),  # a beginning: from its end on
        ([5], [5, 0, 0, 0], [0, 1, 1, 1]),  # tokens that look like padding are no padding
        ([5, 6], [5, 6], [0, 1, 0, 0]),  # equal texts: the last token
        ([5], [6], [1, 0, 0, 0]),
        ([], [], [0, 0, 0, 0]),
        ([], [5], [1, 0, 0, 0]),
    ],
)
def test_divergence_mask(chosen: list[int], rejected: list[int], expected: list[int]) -> None:
    def padded(tokens):
        return np.array([tokens + [0] * (4 - len(tokens))], np.int32)

    lengths = np.array([len(chosen)]), np.array([len(rejected)])
    for first, second, ends in (
        (chosen, rejected, lengths),
        (rejected, chosen, lengths[::-1]),
    ):
        mask = losses.divergence_mask(padded(first), padded(second), *ends)
        np.testing.assert_array_equal(mask, [expected])


def test_equal_texts_add_log_2_and_empty_ones_nothing() -> None:
    """Only the last token of equal texts counts, and one value head reads the same there."""
    tokens = np.array([[5, 6, 0], [0, 0, 0]])
    rewards = np.array([[1.0, 2.0, np.nan], [np.nan, np.nan, np.nan]])
    run = jax.value_and_grad(total(losses.token_bradley_terry), argnums=(0, 1))
    value, gradients = run(rewards, rewards, tokens, tokens, np.array([2, 0]), np.array([2, 0]))
    np.testing.assert_allclose(value, LOG_2, rtol=1e-6)
    np.testing.assert_allclose(gradients[0] + gradients[1], np.zeros((2, 3)), atol=1e-7)


def test_rewards_on_the_padding_of_the_shorter_text_count() -> None:
    chosen, rejected = np.array([[5, 6, 7]]), np.array([[5, 0, 0]])
    rewards = [np.zeros((1, 3)), np.zeros((1, 3))]
    gradient = jax.grad(total(losses.token_bradley_terry), argnums=1)
    found = gradient(*rewards, chosen, rejected, np.array([3]), np.array([1]))
    np.testing.assert_allclose(found, [[0.0, 0.25, 0.25]])


def test_pso_starts_at_log_2_and_rests_beyond_the_clip() -> None:
    log_prob = np.array([-0.5, -0.7])
    better = np.array([1.0, -1.0])
    start = losses.pso_online(log_prob, log_prob, log_prob, log_prob, better)
    np.testing.assert_allclose(start, [LOG_2, LOG_2], rtol=1e-6)
    gradient = jax.grad(total(losses.pso_online))
    beyond = gradient(log_prob + 0.2, log_prob, log_prob, log_prob, better)
    np.testing.assert_array_equal(beyond, [0.0, 0.0])
    np.testing.assert_allclose(
        gradient(log_prob, log_prob, log_prob, log_prob, better), [-25.0, 25.0]
    )
    tied = jax.value_and_grad(total(losses.pso_online))(
        log_prob + 0.05, log_prob, log_prob, log_prob, np.zeros(2)
    )
    np.testing.assert_allclose(tied[0], 2 * LOG_2, rtol=1e-6)
    np.testing.assert_array_equal(tied[1], [0.0, 0.0])


def test_pso_offline_starts_at_log_2_and_a_weight_of_1_is_diffusion_dpo() -> None:
    errors = [np.array([0.3]), np.array([0.2]), np.array([0.4]), np.array([0.1])]
    start = losses.pso_offline(*errors[:2], *errors[:2], prior_weight=0.0)
    np.testing.assert_allclose(start, [LOG_2], rtol=1e-6)
    value = losses.pso_offline(*errors, beta=2.0, rejected_weight=1.0, prior_weight=0.0)
    as_dpo = losses.dpo(*(-error for error in errors), beta=2.0)
    np.testing.assert_allclose(value, as_dpo, rtol=1e-6)


def test_pso_hinge_leaves_the_rejected_alone_at_the_authors_values() -> None:
    """prior_weight - beta * rejected_weight = 0.5 - 5 * 0.1: they only decide who is active."""
    run = jax.grad(total(losses.pso_hinge), argnums=(0, 1))
    chosen, rejected = run(np.array([0.1, 0.1]), np.array([0.2, 9.0]))
    np.testing.assert_allclose(chosen, [5.0, 0.0])
    np.testing.assert_allclose(rejected, [0.0, 0.5], atol=1e-6)


INVALID = [
    (lambda: losses.bradley_terry(np.ones(2), np.ones(3)), "rejected_reward must have shape"),
    (
        lambda: losses.divergence_mask(np.ones((1, 2)), np.ones((1, 2)), [1], [1]),
        "chosen_tokens must be integers",
    ),
    (
        lambda: losses.token_bradley_terry(
            np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 2), int), np.ones((1, 2), int), [1], [1]
        ),
        "chosen_reward must have the shape of chosen_tokens",
    ),
    (
        lambda: losses.gaussian_log_prob(np.ones((2, 3)), np.ones((2, 3)), np.array([1.0, 0.0])),
        "scale must be above 0, but its least is 0.0",
    ),
    (lambda: losses.pso_online(*[np.ones(2)] * 5, clip=1.0), "clip must lie"),
    (lambda: losses.pso_online(*[np.ones(2)] * 4, np.ones(3)), "preference must have shape"),
    (lambda: losses.pso_offline(*[np.ones(2)] * 4, beta=-1.0), "beta must be finite and above 0"),
    (lambda: losses.pso_hinge(*[np.ones(2)] * 2, prior_weight=-1.0), "prior_weight must lie"),
]


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[message for _, message in INVALID])
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
