"""Rotary positions, half-split convention: channel i is rotated together with channel i + K/2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.config import RopeScaling


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, *, length: int
) -> tuple[np.ndarray, float]:
    """Rotary frequency of each channel pair, and the factor on cos and sin.

    With K = head_dim, i = 0 .. K/2 - 1, f_i = theta^(-2i/K), s = factor, C = original_max_length:

        none     f_i
        linear   f_i / s
        dynamic  f_i with theta' = theta (s N/C - (s - 1))^(K/(K-2)) in place of theta, if N > C
        llama3   w f_i + (1 - w) f_i / s, w = clip((C f_i / 2 pi - low) / (high - low), 0, 1)
        yarn     w f_i + (1 - w) f_i / s, w = 1 - clip((i - a) / (b - a), 0, 1), where
                 a = floor(pair(beta_fast)), b = ceil(pair(beta_slow)), kept within [0, K - 1],
                 pair(r) = K ln(C / (2 pi r)) / (2 ln theta): the pair that turns r times over C;
                 cos and sin are multiplied by attention_factor, by default 0.1 ln(s) + 1

    N is the length the caller provides for: that of the token array, or of the cache. It is a
    number and not data, so under "dynamic" a cached key never meets another base; shorter arrays
    within C are not touched at all.

    Args:
        head_dim: K. theta: base. scaling: None or a RopeScaling. length: N.

    Returns:
        Frequencies float64 [K/2] in radians per token, and the factor (1 but for yarn).

    Source: RoPE arXiv 2104.09864, position interpolation 2306.15595, YaRN 2309.00071.

    >>> frequencies(4, 100.0, length=8)
    (array([1. , 0.1]), 1.0)
    """
    pair = np.arange(head_dim // 2, dtype=np.float64)
    base = theta ** (-2 * pair / head_dim)
    if scaling is None:
        return base, 1.0
    stretched = base / scaling.factor
    if scaling.kind == "linear":
        return stretched, 1.0
    original = float(scaling.original_max_length or 0)
    if scaling.kind == "dynamic":
        growth = max(scaling.factor * length / original - (scaling.factor - 1), 1.0)
        # f_i with theta' in place of theta; a pair of one channel (K = 2) has no base to change.
        return base * growth ** (-2 * pair / max(head_dim - 2, 1)), 1.0
    if scaling.kind == "llama3":
        turns = original * base / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * base + (1 - keep) * stretched, 1.0
    keep = 1 - _yarn_ramp(pair, head_dim, theta, original, scaling)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1
    return keep * base + (1 - keep) * stretched, factor


def _yarn_ramp(
    pair: np.ndarray, head_dim: int, theta: float, original: float, scaling: RopeScaling
) -> np.ndarray:
    """0 for pairs that turn often enough to be kept, 1 for those to be stretched."""

    def turning(rotations: float) -> float:
        return head_dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    first = max(math.floor(turning(scaling.beta_fast)), 0)
    last = min(math.ceil(turning(scaling.beta_slow)), head_dim - 1)
    # A band of no width is a step at `first`; the floor keeps the division defined.
    return np.clip((pair - first) / max(last - first, 1e-3), 0, 1)


def rotation(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None, *, length: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, float32 [B, T, 1, K/2], for `rotate`.

    Args:
        positions: int [B, T], in tokens. The rest as in `frequencies`.
    """
    per_token, factor = frequencies(head_dim, theta, scaling, length=length)
    angle = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(
        per_token.reshape(1, 1, 1, -1), jnp.float32
    )
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate [B, T, heads, K] by `rotation`'s cos and sin; computed in float32, type kept."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
