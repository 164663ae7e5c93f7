"""Draws from categorical distributions in the memory of their result."""

import functools

import jax
import jax.numpy as jnp


def draw_at(uniform: jax.Array, log_p: jax.Array) -> jax.Array:
    """The draws from log-probabilities `[..., V]` that uniform numbers `[..., N]` stand for, int32.

    By the inverse of the distribution function, where Gumbel noise would take N times the logits.
    The numbers come from outside, so that a loss over tiles of tokens draws as it would over all.
    They are float32: how often a token below about 1e-7 is met is rounded.
    """
    cumulative = jnp.cumsum(jnp.exp(log_p), axis=-1)
    # Scaled by the rounded total, the largest draw stays below it: no index past the last token.
    find = jnp.vectorize(
        functools.partial(jnp.searchsorted, side="right"), signature="(v),(n)->(n)"
    )
    drawn = find(cumulative, uniform * cumulative[..., -1:])
    return jnp.minimum(drawn, log_p.shape[-1] - 1).astype(jnp.int32)
