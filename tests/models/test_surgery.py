"""Depth pruning: the distances by their formula, and the model that is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import surgery
from tests.models.tiny import FULL, apply, random_params, random_tokens


def degrees(*angles):
    """States [len(angles), 1, 2] at these angles, of different lengths."""
    angles = np.radians(angles)
    size = np.linspace(1.0, 5.0, len(angles))
    return (size * np.array([np.cos(angles), np.sin(angles)])).T[:, None].astype(np.float32)


def exact_distance(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosine = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.arccos(np.clip(cosine, -1, 1)) / np.pi


def test_angular_distance_matches_float64():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(64, 16)).astype(np.float32)
    b = (a + rng.normal(size=a.shape) * np.logspace(-2, 2, 64)[:, None]).astype(np.float32)
    np.testing.assert_allclose(surgery.angular_distance(a, b), exact_distance(a, b), atol=2e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_angular_distance_at_its_ends(dtype):
    a = jnp.array([[1.0, 2.0, 3.0]] * 4, dtype)
    b = jnp.array([[2.0, 4.0, 6.0], [-1, -2, -3], [3.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype)
    distances = surgery.angular_distance(a, b)
    assert distances.dtype == jnp.float32
    np.testing.assert_allclose(distances, [0.0, 1.0, 0.5, 0.5], rtol=0, atol=1e-7)


def test_distances_and_start_by_hand():
    taps = degrees(0, 90, 100, 104, 134, 180)
    given = surgery.block_distances(taps, 1)
    np.testing.assert_allclose(given, np.array([90, 10, 4, 30, 46]) / 180, rtol=1e-5)
    assert surgery.best_start(taps, 1) == 2
    given = surgery.block_distances(taps, 2)
    np.testing.assert_allclose(given, np.array([100, 14, 34, 76]) / 180, rtol=1e-5)
    assert surgery.best_start(taps, 2) == 1
    assert surgery.block_distances(taps, 5).shape == (1,)


def test_distances_are_means_over_the_batch():
    taps = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    expected = exact_distance(taps[:-2], taps[2:]).mean(axis=1)
    np.testing.assert_allclose(surgery.block_distances(taps, 2), expected, rtol=1e-5)


def test_block_influence_by_hand():
    influence = surgery.block_influence(degrees(0, 90, 150, 150))
    np.testing.assert_allclose(influence, [1.0, 0.5, 0.0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 6])
def test_a_block_that_cannot_be_is_refused(count):
    message = f"^count must be between 1 and the 5 layers tapped, not {count}$"
    with pytest.raises(ValueError, match=message):
        surgery.block_distances(degrees(0, 1, 2, 3, 4, 5), count)


@pytest.mark.parametrize("function", [surgery.block_influence, lambda t: surgery.best_start(t, 1)])
def test_taps_of_whole_sequences_are_refused(function):
    message = r"^taps must be \[layers \+ 1, batch, width\], not \[3, 2, 4, 5\]$"
    with pytest.raises(ValueError, match=message):
        function(np.zeros((3, 2, 4, 5), np.float32))


FOUR = dataclasses.replace(FULL, num_layers=4)
PARAMS = random_params(FOUR)


def test_dropping_equals_skipping_by_hand():
    """A dropped layer is one whose two residual branches are zero."""
    tokens = random_tokens(FOUR, 1, 6)
    skipping = jax.tree.map(np.copy, PARAMS)
    for branch in (skipping["layers"]["attention"]["output"], skipping["layers"]["mlp"]["down"]):
        branch["kernel"][1:3] = 0
        branch["bias"][1:3] = 0
    skipped = apply(skipping, tokens, config=FOUR, taps=True)
    pruned, config = surgery.drop_layers(PARAMS, FOUR, 1, 2)
    assert config == dataclasses.replace(FOUR, num_layers=2)
    output = apply(pruned, tokens, config=config, taps=True)
    np.testing.assert_allclose(output.hidden, skipped.hidden, rtol=0, atol=1e-5)
    # What the first layer after the gap receives is what the block received.
    np.testing.assert_allclose(output.taps, skipped.taps[jnp.array([0, 1, 4])], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("start", "count", "kept"), [(0, 1, [1, 2, 3]), (2, 2, [0, 1])])
def test_the_right_layers_stay(start, count, kept):
    pruned, config = surgery.drop_layers(PARAMS, FOUR, start, count)
    assert config.num_layers == len(kept)
    jax.tree.map(
        lambda given, whole: np.testing.assert_array_equal(given, whole[kept]),
        pruned["layers"],
        PARAMS["layers"],
    )
    for name in ("embed", "final_norm", "head"):
        assert pruned[name] is PARAMS[name]


def test_dropping_none_is_the_identity():
    pruned, config = surgery.drop_layers(PARAMS, FOUR, 2, 0)
    assert config == FOUR
    jax.tree.map(np.testing.assert_array_equal, pruned, PARAMS)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (3, 2), (1, -1), (5, 0)])
def test_a_block_outside_the_model_is_refused(start, count):
    message = f"^cannot drop {count} layers from layer {start} on: the model has layers 0 .. 3$"
    with pytest.raises(ValueError, match=message):
        surgery.drop_layers(PARAMS, FOUR, start, count)


def test_dropping_everything_is_refused():
    with pytest.raises(ValueError, match=r"^cannot drop all 4 layers: leave at least one$"):
        surgery.drop_layers(PARAMS, FOUR, 0, 4)
