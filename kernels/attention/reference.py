"""The oracle: attention as the formula reads, with all scores in memory."""

import jax
import jax.numpy as jnp
from jaxdistill.kernels import tiles
from jaxdistill.kernels.attention import problem
from jaxdistill.kernels.attention.problem import Blocking, Options, Places


def attention(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array]:
    """Output [B, G, R, T, K] in the type of value and log-sum-exp [B, G, R, T] in float32."""
    length, slots = query.shape[3], key.shape[2]
    products = jnp.einsum(
        "bgrtk,bgsk->bgrts",
        query,
        key,
        precision=tiles.precision(query),
        preferred_element_type=jnp.float32,
    )
    scores, _ = problem.capped(options, products)
    scores = jnp.where(_seen(options, places, length, slots), scores, -jnp.inf)
    # A row that sees nothing has maximum -inf: subtracting 0 instead leaves its weights at 0.
    maximum = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shifted = jnp.exp(scores - jnp.where(jnp.isneginf(maximum), 0.0, maximum))
    total = jnp.sum(shifted, axis=-1, keepdims=True)
    empty = total == 0
    positive = jnp.where(empty, 1.0, total)
    output = jnp.einsum(
        "bgrts,bgsk->bgrtk",
        (shifted / positive).astype(value.dtype),
        value,
        precision=tiles.precision(value),
        preferred_element_type=jnp.float32,
    )
    log_sum_exp = jnp.where(empty, -jnp.inf, maximum + jnp.log(positive))
    return output.astype(value.dtype), log_sum_exp[..., 0]


def _seen(options: Options, places: Places, length: int, slots: int) -> jax.Array:
    """bool, broadcasts to the scores [B, G, R, T, S]."""
    positions = jnp.arange(length)[None] if places.positions is None else places.positions
    segments = None
    if places.query_segments is not None and places.key_segments is not None:
        segments = (
            places.query_segments[:, None, None, :, None],
            places.key_segments[:, None, None, None, :],
        )
    seen = problem.seen(
        options,
        Blocking(length, slots, 1, 1, slots),
        jnp.arange(slots)[None, None, None, None, :],
        positions[:, None, None, :, None],
        segments,
        None if places.lengths is None else places.lengths[:, None, None, None, None],
    )
    return jnp.ones((1, 1, 1, 1, 1), bool) if seen is None else seen
