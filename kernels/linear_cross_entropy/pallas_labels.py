"""The columns of a tile that are labels, of which a token may have several.

The labels of a token come sorted, so those among the tile's columns stand side by side. A step of
the loop takes one of each token that has one left: for 64 labels in a vocabulary of 150,000 columns
a tile takes a step or two, not 64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels.head_grid import Place
from jaxdistill.kernels.tiles import row_sum


def for_each(
    place: Place, labels: Any, columns: jax.Array, body: Callable[..., Any], start: Any
) -> Any:
    """carry = body(carry, hit, at) from `start`, until each label [tokens, K] in the tile was met.

    hit [tokens, vocab]: the column of the label. at [tokens, K]: which one it is.
    """
    ids = labels[...]
    first = place.vocab_block * place.tile.vocab
    before = _count(ids < first)
    inside = _count((ids >= first) & (ids < first + place.tile.vocab))
    index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)

    def step(number: jax.Array, carry: Any) -> Any:
        left = number < inside
        at = (index == before + number) & left
        label = jnp.where(left, row_sum(jnp.where(at, ids, 0)), -1)
        return body(carry, columns == label, at)

    most = jnp.max(inside.astype(jnp.float32)).astype(jnp.int32)
    return lax.fori_loop(0, most, step, start)


def _count(which: jax.Array) -> jax.Array:
    """How many there are in each row, [tokens, 1]."""
    return row_sum(which.astype(jnp.int32))
