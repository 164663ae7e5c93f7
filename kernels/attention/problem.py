"""What the lean implementations share: which query sees which key, and which blocks need a look.

They work on arrays with the heads folded, query [B, G, R, T, K] and key [B, G, S, K]: R = H / G
query heads read one key head, so a block of keys is fetched once for all of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """What is fixed when the program is traced."""

    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    block_query: int | None
    block_key: int | None
    interpret: Any  # of the TPU kernel, see `on_tpu.INTERPRET`


class Places(NamedTuple):
    """Where queries and keys stand, int32; None where nothing was said.

    positions: [B, T], the key slot of each query; default its index.
    query_segments: [B, T]. key_segments: [B, S].
    lengths: [B], how many of the key slots exist.
    """

    positions: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None
    lengths: jax.Array | None


class Blocking(NamedTuple):
    """Sizes of blocks, how many there are, and how many keys exist before padding."""

    query: int
    key: int
    num_query: int
    num_key: int
    keys: int

    @property
    def pads_keys(self) -> bool:
        return self.num_key * self.key != self.keys


class Bounds(NamedTuple):
    """The blocks of the other side, first <= block <= last, that a block has to do with.

    first, last: int32 [B, blocks], or [1, blocks] where all rows are alike; a block that has to do
    with none has first > last. steps: as many blocks as any of them can have, known when tracing.
    """

    first: jax.Array
    last: jax.Array
    steps: int


def seen(
    options: Options,
    blocking: Blocking,
    keys: jax.Array,
    positions: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    length: jax.Array | None,
) -> jax.Array | None:
    """Which pairs of a tile count, a boolean that broadcasts to it; None where all do.

    Args:
      keys: slots of the keys. positions: those of the queries. segments: of queries and of keys.
      length: how many keys exist. All broadcast against the tile.
    """
    conditions = []
    if options.causal:
        conditions.append(keys <= positions)
    if options.window is not None:
        conditions.append(keys > positions - options.window)
        if not options.causal:
            conditions.append(keys < positions + options.window)
    if segments is not None:
        conditions.append(segments[0] == segments[1])
    if length is not None:
        conditions.append(keys < length)
    if blocking.pads_keys:
        conditions.append(keys < blocking.keys)
    together = None
    for condition in conditions:
        together = condition if together is None else together & condition
    return together


def capped(options: Options, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores of products of queries and keys, and their slope in the scaled products if not 1."""
    scaled = products * options.scale
    if options.soft_cap is None:
        return scaled, None
    bounded = jnp.tanh(scaled / options.soft_cap)
    return options.soft_cap * bounded, 1 - bounded * bounded


def pad(array: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    """The array with `axis` filled up to `size`, by zeros or (mode "edge") its last entry."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, missing if x == axis else 0) for x in range(array.ndim)]
    return jnp.pad(array, widths, mode=mode)


def pad_places(places: Places, blocking: Blocking) -> Places:
    """Places of whole blocks; the last entry fills them up, so blocks' extremes stay."""

    def filled(array: jax.Array | None, size: int) -> jax.Array | None:
        return None if array is None else pad(array, 1, size, "edge")

    queries, keys = blocking.num_query * blocking.query, blocking.num_key * blocking.key
    return Places(
        filled(places.positions, queries),
        filled(places.query_segments, queries),
        filled(places.key_segments, keys),
        places.lengths,
    )


def key_bounds(options: Options, blocking: Blocking, places: Places) -> Bounds:
    """For each block of queries, the blocks of keys it has to do with. Places are padded."""
    if _are_none(places):
        return _known_bounds(_known(options, blocking))
    steps = blocking.num_key
    if places.positions is None:
        steps = min(steps, _most(options, blocking.query, blocking.key))
    return _bounds(_needed(options, blocking, places), steps)


def query_bounds(options: Options, blocking: Blocking, places: Places) -> Bounds:
    """For each block of keys, the blocks of queries it has to do with. Places are padded."""
    if _are_none(places):
        return _known_bounds(tuple(zip(*_known(options, blocking), strict=True)))
    steps = blocking.num_query
    if places.positions is None:
        steps = min(steps, _most(options, blocking.key, blocking.query))
    return _bounds(jnp.swapaxes(_needed(options, blocking, places), 1, 2), steps)


def _are_none(places: Places) -> bool:
    return all(place is None for place in places)


@functools.cache
def _known(options: Options, blocking: Blocking) -> tuple[tuple[bool, ...], ...]:
    """`_needed` of the indices, [num_query][num_key], in Python: what is known when tracing.

    The program then has nothing to compute before the kernel. (`jax.ensure_compile_time_eval`
    would compile some twenty operations for it, and does not work inside shard_map.)
    """
    return tuple(
        tuple(
            _meet(options, blocking, query, query + blocking.query - 1, key * blocking.key)
            for key in range(blocking.num_key)
        )
        for query in range(0, blocking.num_query * blocking.query, blocking.query)
    )


def _known_bounds(needed: Sequence[Sequence[bool]]) -> Bounds:
    """As `_bounds`."""
    blocks = len(needed[0])
    first = [row.index(True) if any(row) else blocks for row in needed]
    last = [blocks - 1 - row[::-1].index(True) if any(row) else -1 for row in needed]
    steps = max(1, *(1 + end - start for start, end in zip(first, last, strict=True)))
    return Bounds(jnp.asarray([first], jnp.int32), jnp.asarray([last], jnp.int32), steps)


def _most(options: Options, block: int, other: int) -> int:
    """How many blocks of `other` slots the window of a block of `block` slots can touch."""
    if options.window is None:
        return 2**30
    reach = options.window - 1
    slots = block + (reach if options.causal else 2 * reach)
    return (slots + other - 2) // other + 1


def _needed(options: Options, blocking: Blocking, places: Places) -> jax.Array:
    """bool [B or 1, num_query, num_key]: false only where a block sees nothing of the other."""
    first_key = (jnp.arange(blocking.num_key) * blocking.key)[None, None, :]
    positions = places.positions
    if positions is None:
        positions = jnp.arange(blocking.num_query * blocking.query)[None, :]
    low, high = (x[:, :, None] for x in _extremes(positions, blocking.num_query))
    needed = _meet(options, blocking, low, high, first_key) & (low <= high)
    if places.lengths is not None:
        needed = needed & (first_key < places.lengths[:, None, None])
    if places.query_segments is not None and places.key_segments is not None:
        query_low, query_high = _extremes(places.query_segments, blocking.num_query)
        key_low, key_high = _extremes(places.key_segments, blocking.num_key)
        needed = needed & (query_low[:, :, None] <= key_high[:, None, :])
        needed &= key_low[:, None, :] <= query_high[:, :, None]
    return needed


def _meet(options: Options, blocking: Blocking, low: Any, high: Any, first_key: Any) -> Any:
    """Whether queries at low .. high may see the block of keys at first_key; ints or arrays."""
    past_key = first_key + blocking.key
    needed = first_key < blocking.keys
    if options.causal:
        needed = needed & (first_key <= high)
    if options.window is not None:
        # Of the last block not all slots exist: it ends where the keys do.
        above = low - options.window + 1
        needed = needed & (past_key > above) & (blocking.keys > above)
        if not options.causal:
            needed = needed & (first_key < high + options.window)
    return needed


def _extremes(array: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest entry of each block, [B, blocks]."""
    grouped = array.reshape(array.shape[0], blocks, -1)
    return grouped.min(-1), grouped.max(-1)


def _bounds(needed: jax.Array, steps: int) -> Bounds:
    blocks = needed.shape[-1]
    some = jnp.any(needed, axis=-1)
    first = jnp.where(some, jnp.argmax(needed, axis=-1), blocks)
    last = jnp.where(some, blocks - 1 - jnp.argmax(needed[..., ::-1], axis=-1), -1)
    return Bounds(first.astype(jnp.int32), last.astype(jnp.int32), steps)
