"""Depth pruning: which block of layers matters least, and the model without it.

The last-token states of `decoder.apply(..., taps=True)` say it: taps[l] is the input of layer l, so
the distance from taps[l] to taps[l + n] is what layers l .. l + n - 1 change, and these are the
layers to drop. Source: arXiv 2410.09982 (self-data distillation), 2403.17887 (the criterion).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.config import DecoderConfig
from jaxdistill.models.decoder import Params


def angular_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """d = arccos(a . b / (|a| |b|)) / pi, between 0 (same direction) and 1 (opposite).

    Computed as 2 atan2(|u - v|, |u + v|) / pi on unit vectors u, v: the same angle, but exact where
    the cosine is close to 1 and its arccos would be rounding error.

    Args:
        a, b: [B, D].

    Returns:
        float32 [B], in half turns.

    >>> angular_distance(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]))
    Array([0.5], dtype=float32)
    """
    u, v = _unit(a), _unit(b)
    angle = 2 * jnp.arctan2(jnp.linalg.norm(u - v, axis=-1), jnp.linalg.norm(u + v, axis=-1))
    return angle / jnp.pi


def block_distances(taps: jax.Array, count: int) -> jax.Array:
    """Mean angular distance across each block of `count` consecutive layers.

    out[l] = mean over B of d(taps[l], taps[l + count]), l = 0 .. L - count.

    Args:
        taps: [L+1, B, D], the states at the last real token of each calibration sequence.
        count: number of layers in a block, 1 .. L.

    Returns:
        float32 [L + 1 - count]: entry l belongs to layers l .. l + count - 1.

    Raises:
        ValueError: taps of another rank, or count out of range.
    """
    _check_taps(taps)
    layers = taps.shape[0] - 1
    if not 1 <= count <= layers:
        raise ValueError(f"count must be between 1 and the {layers} layers tapped, not {count}")
    return jnp.mean(jax.vmap(angular_distance)(taps[:-count], taps[count:]), axis=1)


def best_start(taps: jax.Array, count: int) -> int:
    """First layer of the block of `count` layers with the least `block_distances`.

    >>> taps = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.1, 1.0]], [[-1.0, 0.0]]])
    >>> best_start(taps, 1)
    1
    """
    return int(jnp.argmin(block_distances(taps, count)))


def block_influence(taps: jax.Array) -> jax.Array:
    """ShortGPT's measure of each layer: 1 - mean over B of cos(taps[l], taps[l + 1]).

    Args:
        taps: [L+1, B, D].

    Returns:
        float32 [L]; small means that the layer changes little. Source: arXiv 2403.03853.
    """
    _check_taps(taps)
    unit = _unit(taps)
    return 1 - jnp.mean(jnp.sum(unit[:-1] * unit[1:], axis=-1), axis=1)


def drop_layers(
    params: Params, config: DecoderConfig, start: int, count: int
) -> tuple[Params, DecoderConfig]:
    """The model without layers start .. start + count - 1; everything else is shared, not copied.

    Raises:
        ValueError: the block is not inside the model, or nothing would be left.
    """
    layers = config.num_layers
    if start < 0 or count < 0 or start + count > layers:
        raise ValueError(
            f"cannot drop {count} layers from layer {start} on: the model has layers "
            f"0 .. {layers - 1}"
        )
    if count == layers:
        raise ValueError(f"cannot drop all {layers} layers: leave at least one")
    kept = np.r_[:start, start + count : layers]
    pruned = {**params, "layers": jax.tree.map(lambda leaf: leaf[kept], params["layers"])}
    return pruned, dataclasses.replace(config, num_layers=layers - count)


def _unit(x: jax.Array) -> jax.Array:
    exact = jnp.asarray(x, jnp.float32)
    norm = jnp.linalg.norm(exact, axis=-1, keepdims=True)
    return exact / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


def _check_taps(taps: jax.Array) -> None:
    if jnp.ndim(taps) != 3 or taps.shape[0] < 2:
        raise ValueError(f"taps must be [layers + 1, batch, width], not {list(jnp.shape(taps))}")
