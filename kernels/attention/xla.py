"""The lean twin: one tile of scores at a time, forward and backward, in plain XLA.

Forward, for each block of queries, over the blocks of keys it has to do with, with the running
maximum m, total l and output o, all rescaled by exp(m_before - m) when the maximum moves:

    p = exp(s - m);  l += sum p;  o += p V;    output = o / l,  log-sum-exp = m + log l

Backward recomputes s, so its residuals are the inputs, the output O and the log-sum-exp:

    P = exp(s - log-sum-exp);  dV = P^T dO;  dS = P (dO V^T - delta)
    delta = sum_k dO O - d(log-sum-exp);  dQ = scale dS K;  dK = scale dS^T Q
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import tiles
from jaxdistill.kernels.attention import problem
from jaxdistill.kernels.attention.problem import Blocking, Bounds, Options, Places

TILE_BYTES = 4 * 2**20  # of one float32 tile of all heads; a backward pass holds about three
BLOCKS = (1024, 512, 256, 128)  # below 128 the loops cost more than the tiles save


class _Running(NamedTuple):
    """Of the keys seen so far: maximum and total [B, G, R, Tb], output [B, G, R, Tb, K]."""

    maximum: jax.Array
    total: jax.Array
    output: jax.Array


class _Problem(NamedTuple):
    """Padded operands, all float arrays [B, G, R, T, K] or [B, G, S, K]."""

    options: Options
    blocking: Blocking
    query: jax.Array
    key: jax.Array
    value: jax.Array
    places: Places


def forward(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array]:
    """Output [B, G, R, T, K] in the type of value, log-sum-exp [B, G, R, T] in float32."""
    all_of = _padded(options, query, key, value, places)
    blocking = all_of.blocking
    bounds = _of_all_rows(problem.key_bounds(options, blocking, all_of.places))

    def take_queries(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        queries = _queries(all_of.query, blocking, block)

        def take_keys(running: _Running, keys: jax.Array) -> _Running:
            return _absorb(all_of, running, queries, block, keys)

        zeros = jnp.zeros_like(queries, dtype=jnp.float32)
        start = _Running(zeros[..., 0] - jnp.inf, zeros[..., 0], zeros)
        return _finish(_sweep(bounds, block, blocking.num_key, take_keys, start), value.dtype)

    output, log_sum_exp = _stack(take_queries, blocking.num_query)
    length = query.shape[3]
    return _rows(output)[:, :, :, :length], _rows(log_sum_exp)[:, :, :, :length]


def backward(
    options: Options,
    operands: tuple[jax.Array, jax.Array, jax.Array, Places],
    log_sum_exp: jax.Array,
    delta: jax.Array,
    to_output: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their types."""
    query, key, value, _ = operands
    all_of = _padded(options, *operands)
    blocking = all_of.blocking
    rows = blocking.num_query * blocking.query
    per_row = tuple(problem.pad(x, 3, rows) for x in (log_sum_exp, delta, to_output))
    bounds = _of_all_rows(problem.query_bounds(options, blocking, all_of.places))

    def take_keys(query_total: jax.Array, keys: jax.Array) -> tuple[jax.Array, tuple]:
        zeros = jnp.zeros_like(_keys(all_of.key, blocking, keys), dtype=jnp.float32)

        def take_queries(totals: tuple, offset: jax.Array) -> tuple[tuple, None]:
            block, parts = _parts(all_of, per_row, bounds, keys, offset)
            key_total, value_total, query_total = totals
            start = block * blocking.query
            query_total = tiles.add_block(query_total, parts[2], start, 3)
            return (key_total + parts[0], value_total + parts[1], query_total), None

        totals, _ = _scan(take_queries, (zeros, zeros, query_total), bounds.steps)
        return totals[2], totals[:2]

    start = jnp.zeros_like(all_of.query, dtype=jnp.float32)
    to_query, parts = _scan(take_keys, start, blocking.num_key)
    to_key, to_value = (_slots(part)[:, :, : blocking.keys] for part in parts)
    return (
        (to_query[:, :, :, : query.shape[3]] * options.scale).astype(query.dtype),
        (to_key * options.scale).astype(key.dtype),
        to_value.astype(value.dtype),
    )


def plan(options: Options, query_shape: tuple[int, ...], slots: int) -> Blocking:
    """Blocks of nearly equal size; the tile of scores, of all rows and heads, is TILE_BYTES."""
    length = query_shape[3]
    matrices = math.prod(query_shape[:3])
    fitting = (x for x in BLOCKS if 4 * matrices * x * x <= TILE_BYTES)
    size = next(fitting, BLOCKS[-1])
    queries = min(options.block_query or _even(length, size), length)
    wide = max(TILE_BYTES // (4 * matrices * queries), size)
    keys = min(options.block_key or _even(slots, wide), slots)
    return Blocking(queries, keys, -(-length // queries), -(-slots // keys), slots)


def _even(length: int, size: int) -> int:
    return -(-length // -(-length // size))


def _padded(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> _Problem:
    blocking = plan(options, query.shape, key.shape[2])
    slots = blocking.num_key * blocking.key
    return _Problem(
        options,
        blocking,
        problem.pad(query, 3, blocking.num_query * blocking.query),
        problem.pad(key, 2, slots),
        problem.pad(value, 2, slots),
        problem.pad_places(places, blocking),
    )


def _of_all_rows(bounds: Bounds) -> Bounds:
    """Rows of the batch go through the loops together: what any of them needs."""
    return Bounds(bounds.first.min(0), bounds.last.max(0), bounds.steps)


def _sweep(bounds: Bounds, index: jax.Array, blocks: int, body: Callable, running: Any) -> Any:
    """running = body(running, block) over the blocks that block `index` has to do with."""
    if blocks == 1:
        return body(running, jnp.int32(0))
    first, last = bounds.first[index], bounds.last[index]

    def step(running: Any, offset: jax.Array) -> tuple[Any, None]:
        block = first + offset
        return lax.cond(block <= last, lambda: body(running, block), lambda: running), None

    return lax.scan(step, running, jnp.arange(bounds.steps))[0]


def _scan(body: Callable, start: Any, count: int) -> tuple[Any, Any]:
    """lax.scan over 0 .. count - 1, without a loop where it would turn once."""
    if count > 1:
        return lax.scan(body, start, jnp.arange(count))
    carry, out = body(start, jnp.int32(0))
    return carry, jax.tree.map(lambda x: x[None], out)


def _stack(function: Callable, count: int) -> Any:
    return _scan(lambda carry, index: (carry, function(index)), None, count)[1]


def _queries(array: jax.Array, blocking: Blocking, block: jax.Array) -> jax.Array:
    """Block of [B, G, R, T, ...]."""
    return lax.dynamic_slice_in_dim(array, block * blocking.query, blocking.query, 3)


def _keys(array: jax.Array, blocking: Blocking, block: jax.Array) -> jax.Array:
    """Block of [B, G, S, ...]."""
    return lax.dynamic_slice_in_dim(array, block * blocking.key, blocking.key, 2)


def _rows(blocks: jax.Array) -> jax.Array:
    """[blocks, B, G, R, Tb, *rest] -> [B, G, R, T, *rest]."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])


def _slots(blocks: jax.Array) -> jax.Array:
    """[blocks, B, G, Sb, K] -> [B, G, S, K]."""
    moved = jnp.moveaxis(blocks, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, moved.shape[-1])


def _tile(
    all_of: _Problem, queries: jax.Array, query_block: jax.Array, key_block: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Scores [B, G, R, Tb, Sb], their slope in the scaled products, and which count."""
    options, blocking, places = all_of.options, all_of.blocking, all_of.places
    keys = _keys(all_of.key, blocking, key_block)
    products = _einsum("bgrtk,bgsk->bgrts", queries, keys)

    def taken(array: jax.Array, block: jax.Array, size: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, block * size, size, 1)[:, None, None]

    positions = query_block * blocking.query + jnp.arange(blocking.query)[None, None, None]
    if places.positions is not None:
        positions = taken(places.positions, query_block, blocking.query)
    segments = None
    if places.query_segments is not None and places.key_segments is not None:
        segments = (
            taken(places.query_segments, query_block, blocking.query)[..., None],
            taken(places.key_segments, key_block, blocking.key)[..., None, :],
        )
    slots = key_block * blocking.key + jnp.arange(blocking.key)
    length = None if places.lengths is None else places.lengths[:, None, None, None, None]
    seen = problem.seen(
        options, blocking, slots[None, None, None, None], positions[..., None], segments, length
    )
    return *problem.capped(options, products), seen


def _absorb(
    all_of: _Problem,
    running: _Running,
    queries: jax.Array,
    query_block: jax.Array,
    key_block: jax.Array,
) -> _Running:
    scores, _, seen = _tile(all_of, queries, query_block, key_block)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    maximum = jnp.maximum(running.maximum, jnp.max(scores, axis=-1))
    # Until a key is seen the maximum is -inf: subtracting 0 leaves exp(-inf) = 0, not NaN.
    finite = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(scores - finite[..., None])
    shrink = jnp.exp(running.maximum - finite)
    values = _keys(all_of.value, all_of.blocking, key_block)
    part = _einsum("bgrts,bgsk->bgrtk", weights.astype(values.dtype), values)
    return _Running(
        maximum,
        running.total * shrink + jnp.sum(weights, axis=-1),
        running.output * shrink[..., None] + part,
    )


def _finish(running: _Running, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    empty = running.total == 0
    total = jnp.where(empty, 1.0, running.total)
    log_sum_exp = jnp.where(empty, -jnp.inf, running.maximum + jnp.log(total))
    return (running.output / total[..., None]).astype(dtype), log_sum_exp


def _parts(
    all_of: _Problem, per_row: tuple, bounds: Bounds, keys: jax.Array, offset: jax.Array
) -> tuple[jax.Array, tuple]:
    """A block of queries, and what its tile with `keys` adds to the gradients: key, value, query.

    Only these small parts go through the branch: it would copy the sums.
    """
    blocking = all_of.blocking
    if blocking.num_query == blocking.num_key == 1:
        return jnp.int32(0), _tile_gradients(all_of, per_row, offset, keys)
    wanted = bounds.first[keys] + offset
    block = jnp.minimum(wanted, blocking.num_query - 1)

    def nothing() -> tuple:
        key = jnp.zeros_like(_keys(all_of.key, blocking, keys), dtype=jnp.float32)
        queries = _queries(all_of.query, blocking, block)
        return key, key, jnp.zeros_like(queries, dtype=jnp.float32)

    parts = lax.cond(
        wanted <= bounds.last[keys],
        lambda: _tile_gradients(all_of, per_row, block, keys),
        nothing,
    )
    return block, parts


def _tile_gradients(
    all_of: _Problem, per_row: tuple, query_block: jax.Array, key_block: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parts of the gradients of key, value and query, float32, the scale left out."""
    queries = _queries(all_of.query, all_of.blocking, query_block)
    log_sum_exp, delta, to_output = (_queries(x, all_of.blocking, query_block) for x in per_row)
    scores, slope, seen = _tile(all_of, queries, query_block, key_block)
    weights = jnp.exp(scores - log_sum_exp[..., None])
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    keys = _keys(all_of.key, all_of.blocking, key_block)
    values = _keys(all_of.value, all_of.blocking, key_block)
    to_weights = _einsum("bgrtk,bgsk->bgrts", to_output, values)
    to_scores = weights * (to_weights - delta[..., None])
    if slope is not None:
        to_scores = to_scores * slope
    to_scores = to_scores.astype(queries.dtype)
    return (
        _einsum("bgrts,bgrtk->bgsk", to_scores, queries),
        _einsum("bgrts,bgrtk->bgsk", weights.astype(to_output.dtype), to_output),
        _einsum("bgrts,bgsk->bgrtk", to_scores, keys),
    )


def _einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        formula, a, b, precision=tiles.precision(a), preferred_element_type=jnp.float32
    )
