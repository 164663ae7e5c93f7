"""Reductions: one division at the end, nothing from padding, packed equal to unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdistill.losses import (
    Weighted,
    sequence_log_prob,
    sequence_mean,
    sequence_sum,
    shift,
    token_mean,
)

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(4, 6)).astype(np.float32)
MASK = np.array(
    [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32
)
REDUCTIONS = (token_mean, sequence_mean, lambda v, m: sequence_sum(v, m, divisor=6.0))


def test_against_loops() -> None:
    tokens = [VALUES[b, t] for b in range(4) for t in range(6) if MASK[b, t]]
    rows = [VALUES[b][MASK[b] > 0] for b in range(3)]
    np.testing.assert_allclose(token_mean(VALUES, MASK).mean(), np.mean(tokens), rtol=1e-6)
    by_row = np.mean([row.mean() for row in rows])
    np.testing.assert_allclose(sequence_mean(VALUES, MASK).mean(), by_row, rtol=1e-6)
    summed = sum(row.sum() for row in rows) / (3 * 6)
    np.testing.assert_allclose(sequence_sum(VALUES, MASK, 6.0).mean(), summed, rtol=1e-6)


def test_fractional_weights_normalise_by_their_sum() -> None:
    weights = np.array([0.5, 2.0, 0.0], np.float32)
    mean = token_mean(np.array([1.0, 4.0, 9.0]), weights).mean()
    np.testing.assert_allclose(mean, (0.5 * 1 + 2 * 4) / 2.5, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ragged_microbatches_add_up_to_the_whole(reduction) -> None:
    """Peers average the microbatches' means, which weighs the tokens of short rows more."""
    whole = reduction(VALUES, MASK)
    parts = [reduction(VALUES[b : b + 1], MASK[b : b + 1]) for b in range(4)]
    added = parts[0] + parts[1] + parts[2] + parts[3]
    np.testing.assert_allclose(added.mean(), whole.mean(), rtol=1e-6)


def test_a_mean_of_microbatch_means_is_something_else() -> None:
    """The bias the sum of `Weighted` avoids is real on these data."""
    means = [token_mean(VALUES[b], MASK[b]).mean() for b in range(3)]
    assert abs(np.mean(means) - token_mean(VALUES, MASK).mean()) > 0.05


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sum_over_devices_then_divide(reduction) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = PartitionSpec("data")

    def mean(values: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.lax.psum(reduction(values, mask), "data").mean()

    sharded = jax.shard_map(mean, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec())
    np.testing.assert_allclose(sharded(VALUES, MASK), reduction(VALUES, MASK).mean(), rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_values_may_be_anything(reduction) -> None:
    """NaN and infinity under the mask reach neither the value nor the gradient."""
    poisoned = np.where(MASK > 0, VALUES, np.where(np.arange(6) % 2, np.nan, np.inf))
    value, gradient = jax.value_and_grad(lambda x: reduction(x, MASK).mean())(
        jnp.asarray(poisoned, jnp.float32)
    )
    np.testing.assert_allclose(value, reduction(VALUES, MASK).mean(), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[MASK == 0].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept_gives_zero(reduction) -> None:
    value, gradient = jax.value_and_grad(lambda x: reduction(x, 0 * MASK).mean())(VALUES)
    assert value == 0
    assert not gradient.any()


def test_weighted_is_a_pytree() -> None:
    doubled = jax.tree.map(lambda x: 2 * x, Weighted(jnp.float32(3), jnp.float32(4)))
    assert (doubled.sum, doubled.weight) == (6, 8)


@pytest.mark.parametrize("reduction", [sequence_mean, sequence_sum])
def test_packed_rows_count_their_sequences(reduction) -> None:
    """Three ragged sequences in rows of their own, or packed into one row: the same."""
    lengths = (3, 1, 4)
    sequences = [RNG.normal(size=length) for length in lengths]
    padded = np.zeros((3, 4))
    mask = np.zeros((3, 4))
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    mask[2, 0] = 0  # a prompt token
    packed = np.concatenate([*sequences, np.zeros(2)])[None]
    packed_mask = np.array([[1, 1, 1, 1, 0, 1, 1, 1, 1, 1]])
    segment_ids = np.array([[1, 1, 1, 2, 7, 7, 7, 7, 0, 0]])
    got = reduction(packed, packed_mask, segment_ids=segment_ids)
    expected = reduction(padded, mask)
    assert got.weight == expected.weight == 3
    np.testing.assert_allclose(got.mean(), expected.mean(), rtol=1e-6)


def test_sequence_log_prob() -> None:
    np.testing.assert_allclose(sequence_log_prob(VALUES, MASK), (VALUES * MASK).sum(1), rtol=1e-5)
    averaged = sequence_log_prob(VALUES, MASK, average=True)
    expected = (VALUES * MASK).sum(1) / np.maximum(MASK.sum(1), 1)
    np.testing.assert_allclose(averaged, expected, rtol=1e-5)
    assert averaged[3] == 0


def test_shift_pairs_each_position_with_the_next_token() -> None:
    tokens = np.array([[5, 6, 7, 8], [9, 1, 2, 3]])
    mask = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    labels, shifted = shift(tokens, mask)
    np.testing.assert_array_equal(labels, [[6, 7, 8, 0], [1, 2, 3, 0]])
    np.testing.assert_array_equal(shifted, [[0, 1, 1, 0], [1, 1, 0, 0]])
    assert (labels.dtype, shifted.dtype) == (jnp.int32, jnp.float32)


def test_shift_crosses_no_border() -> None:
    """No position predicts the first token of the next sequence, or padding."""
    segment_ids = np.array([1, 1, 2, 2, 2, 3, 0, 0])
    _, mask = shift(np.arange(8), np.full(8, 0.5), segment_ids)
    np.testing.assert_array_equal(mask, [0.5, 0, 0.5, 0.5, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_mean(VALUES, MASK[0]), r"mask must have shape \(4, 6\), but its shape is"),
        (lambda: sequence_mean(1.0, 1.0), r"values must have shape \[..., T\]"),
        (lambda: sequence_sum(VALUES, MASK, divisor=0.0), "divisor must be finite and above 0"),
        (lambda: shift(VALUES), r"tokens must be integers with shape \[..., T\], but they are"),
        (lambda: shift(np.arange(3), np.ones(2)), r"mask must have shape \(3,\)"),
        (
            lambda: shift(np.arange(3), segment_ids=np.ones(3)),
            r"segment_ids must be integers with shape \(3,\), but they are float",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
