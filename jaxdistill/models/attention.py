"""Scaled dot-product attention: the one function a kernel may later replace."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """c tanh(x / c): x unchanged near 0, never beyond +-c; the identity for None.

    >>> float(soft_cap(jnp.array(1000.0), 30.0))
    30.0
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_slots: jax.Array,
    segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
    score_soft_cap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention, softmax in float32.

    out[t, h] = sum_s softmax_s(cap(query[t, h] . key[s, g] / sqrt(K))) value[s, g], g = h // (H/G),
    over the slots s <= query_slots[t] that lie in t's segment and window.

    Args:
        query: [B, T, H, K]. key, value: [B, S, G, K] with H a multiple of G; never repeated.
        query_slots: int [B, T], where in the S slots each query stands.
        segment_ids: int [B, T], only when queries and keys are the same tokens (S = T).
        sliding_window: number of slots a query sees, its own included.
        score_soft_cap: c in c tanh(x / c) on the scaled scores.

    Returns:
        [B, T, H, K] in the type of value.
    """
    batch, length, heads, head_dim = query.shape
    slots, groups = key.shape[1:3]
    grouped = query.reshape(batch, length, groups, heads // groups, head_dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * head_dim**-0.5, score_soft_cap)
    seen = _seen(query_slots, slots, segment_ids, sliding_window)[:, None, None]
    # Finite, so that no row can turn into NaN; a query always sees its own slot.
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(query.shape)


def _seen(
    query_slots: jax.Array, slots: int, segment_ids: jax.Array | None, sliding_window: int | None
) -> jax.Array:
    """Which slots each query may look at: bool [B, T, S]."""
    ago = query_slots[:, :, None] - jnp.arange(slots)[None, None, :]
    seen = ago >= 0
    if sliding_window is not None:
        seen &= ago < sliding_window
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return seen
