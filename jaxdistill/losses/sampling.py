"""Draws from categorical distributions in the memory of their result."""

import functools

import jax
import jax.numpy as jnp


def draw(key: jax.Array, log_p: jax.Array, num_samples: int) -> jax.Array:
    """`[..., num_samples]` independent draws from log-probabilities `[..., V]`, int32."""
    return draw_at(jax.random.uniform(key, (*log_p.shape[:-1], num_samples)), log_p)


def draw_at(uniform: jax.Array, log_p: jax.Array) -> jax.Array:
    """The draws that uniform numbers `[..., N]` in [0, 1) stand for, from log-probabilities.

    By the inverse of the distribution function, where Gumbel noise would take N times the logits.
    The numbers are float32: how often a token below about 1e-7 is met is rounded.
    """
    cumulative = jnp.cumsum(jnp.exp(log_p), axis=-1)
    # Scaled by the rounded total, the largest draw stays below it: no index past the last token.
    find = jnp.vectorize(
        functools.partial(jnp.searchsorted, side="right"), signature="(v),(n)->(n)"
    )
    drawn = find(cumulative, uniform * cumulative[..., -1:])
    return jnp.minimum(drawn, log_p.shape[-1] - 1).astype(jnp.int32)
