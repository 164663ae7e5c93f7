"""The TPU kernels: the recurrences of `xla` with the tile of scores in VMEM.

The rows of queries are a block of all R heads that share a key head, head after head. Of the two
ways a tile can lie, the TPU compiler's estimate is lower with

    [rows, keys] forward: the weights meet the values in a plain product. Maximum and total of a row
    are columns that fill a register's lanes, [rows, 128].
    [keys, rows] backward: log-sum-exp and delta, which lie along the lanes in memory, meet the tile
    as they are, and two of its three products are plain.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxdistill.kernels import on_tpu, tiles
from jaxdistill.kernels.attention import pallas_grid, problem
from jaxdistill.kernels.attention.pallas_grid import Call, Step
from jaxdistill.kernels.attention.problem import Options, Places
from jaxdistill.kernels.tiles import dot, lane_sum


def forward(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array]:
    """Output [B, G, R, T, K] in the type of value, log-sum-exp [B, G, R, T] in float32."""
    call, (query, key, value), places, length = _prepare(options, query, key, value, places)
    rows = call.heads * call.blocking.query
    output, log_sum_exp = pallas_grid.run(
        _forward_kernel,
        call,
        problem.key_bounds(options, call.blocking, places),
        places,
        {"query": query, "key": key, "value": value},
        {"output": (query.shape, value.dtype), "log_sum_exp": (query.shape[:4], jnp.float32)},
        [(rows, query.shape[-1]), (rows, tiles.LANES), (rows, tiles.LANES)],
    )
    return output[:, :, :, :length], log_sum_exp[:, :, :, :length]


def backward(
    options: Options,
    operands: tuple[jax.Array, jax.Array, jax.Array, Places],
    log_sum_exp: jax.Array,
    delta: jax.Array,
    to_output: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their types; one nobody asks for is dead code."""
    call, (query, key, value), places, length = _prepare(options, *operands)
    per_row = {"log_sum_exp": log_sum_exp, "delta": delta, "to_output": to_output}
    inputs = {"query": query, "key": key, "value": value} | {
        name: problem.pad(x, 3, query.shape[3]) for name, x in per_row.items()
    }
    (to_query,) = pallas_grid.run(
        _query_kernel,
        call,
        problem.key_bounds(options, call.blocking, places),
        places,
        inputs,
        {"query": (query.shape, query.dtype)},
        [(call.heads * call.blocking.query, query.shape[-1])],
    )
    to_key, to_value = pallas_grid.run(
        _key_kernel,
        call._replace(outer_is_query=False),
        problem.query_bounds(options, call.blocking, places),
        places,
        inputs,
        {"key": (key.shape, key.dtype), "value": (value.shape, value.dtype)},
        [(call.blocking.key, key.shape[-1])] * 2,
    )
    slots = call.blocking.keys
    return to_query[:, :, :, :length], to_key[:, :, :slots], to_value[:, :, :slots]


# ---- The kernels --------------------------------------------------------------------------------


def _forward_kernel(call: Call, step: Step, inputs: dict, outputs: dict, scratch: list) -> None:
    # [rows, K]; [rows, 128], the same in all lanes; [rows, 128], each lane with keys of its own
    total_output, maximum, total = scratch

    @pl.when(step.is_start)
    def _() -> None:
        total_output[...] = jnp.zeros_like(total_output)
        maximum[...] = jnp.full_like(maximum, -jnp.inf)
        total[...] = jnp.zeros_like(total)

    @pl.when(step.is_needed)
    def _() -> None:
        scores, _, seen = _scores(call, step, inputs, rows_axis=0)
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        before = maximum[...]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        # Until a key is seen the maximum is -inf: subtracting 0 leaves exp(-inf) = 0, not NaN.
        finite = jnp.where(now == -jnp.inf, 0.0, now)
        weights = jnp.exp(scores - _wide(finite, scores.shape[1]))
        shrink = jnp.exp(before - finite)
        value = inputs["value"][...]
        maximum[...] = now
        total[...] = total[...] * shrink + lane_sum(weights)
        part = dot(weights.astype(value.dtype), value, (1, 0))
        total_output[...] = total_output[...] * _wide(shrink, part.shape[1]) + part

    @pl.when(step.is_end)
    def _() -> None:
        sums = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), total.shape)
        empty = sums == 0
        positive = jnp.where(empty, 1.0, sums)
        output = total_output[...] / _wide(positive, total_output.shape[1])
        _write_queries(outputs["output"], output)
        row = jnp.where(empty, -jnp.inf, maximum[...] + jnp.log(positive)).T[:1]
        block = call.blocking.query
        for head in range(call.heads):
            outputs["log_sum_exp"][head : head + 1, :] = row[:, head * block : (head + 1) * block]


def _query_kernel(call: Call, step: Step, inputs: dict, outputs: dict, scratch: list) -> None:
    (total,) = scratch  # [rows, K]

    @pl.when(step.is_start)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(step.is_needed)
    def _() -> None:
        _, to_scores = _gradients(call, step, inputs)
        key = inputs["key"][...]
        total[...] += dot(to_scores.astype(key.dtype), key, (0, 0))

    @pl.when(step.is_end)
    def _() -> None:
        _write_queries(outputs["query"], total[...] * call.options.scale)


def _key_kernel(call: Call, step: Step, inputs: dict, outputs: dict, scratch: list) -> None:
    key_total, value_total = scratch  # [keys, K] both

    @pl.when(step.is_start)
    def _() -> None:
        key_total[...] = jnp.zeros_like(key_total)
        value_total[...] = jnp.zeros_like(value_total)

    @pl.when(step.is_needed)
    def _() -> None:
        weights, to_scores = _gradients(call, step, inputs)
        query, to_output = _rows(inputs["query"]), _rows(inputs["to_output"])
        key_total[...] += dot(to_scores.astype(query.dtype), query, (1, 0))
        value_total[...] += dot(weights.astype(to_output.dtype), to_output, (1, 0))

    @pl.when(step.is_end)
    def _() -> None:
        scaled = key_total[...] * call.options.scale
        outputs["key"][...] = scaled.astype(outputs["key"].dtype)
        outputs["value"][...] = value_total[...].astype(outputs["value"].dtype)


def _scores(
    call: Call, step: Step, inputs: dict, rows_axis: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Scores, [rows, keys] if rows_axis is 0, their slope in the scaled products, which count."""
    sides = _rows(inputs["query"]), inputs["key"][...]
    products = dot(*(sides if rows_axis == 0 else sides[::-1]), (1, 1))
    return *problem.capped(call.options, products), _seen(call, step, inputs, rows_axis)


def _gradients(call: Call, step: Step, inputs: dict) -> tuple[jax.Array, jax.Array]:
    """Weights and gradients of the scaled products, both [keys, rows] and float32."""
    scores, slope, seen = _scores(call, step, inputs, rows_axis=1)
    weights = jnp.exp(scores - _row(inputs["log_sum_exp"]))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    to_weights = dot(inputs["value"][...], _rows(inputs["to_output"]), (1, 1))
    to_scores = weights * (to_weights - _row(inputs["delta"]))
    return weights, to_scores if slope is None else to_scores * slope


def _seen(call: Call, step: Step, inputs: dict, rows_axis: int) -> jax.Array | None:
    """Which pairs of the tile count; it broadcasts to the tile."""
    blocking = call.blocking
    if "positions" in inputs:
        positions = _along(rows_axis, inputs["positions"][...])
    else:
        positions = _indices(rows_axis, blocking.query) + step.query_block * blocking.query
    slots = _indices(1 - rows_axis, blocking.key) + step.key_block * blocking.key

    def of_all_heads(array: jax.Array) -> jax.Array:
        return jnp.concatenate([array] * call.heads, axis=rows_axis)

    segments = None
    if "query_segments" in inputs:
        segments = (
            of_all_heads(_along(rows_axis, inputs["query_segments"][...])),
            _along(1 - rows_axis, inputs["key_segments"][...]),
        )
    return problem.seen(
        call.options, blocking, slots, of_all_heads(positions), segments, step.length
    )


def _indices(axis: int, size: int) -> jax.Array:
    """0 .. size - 1 as a column (axis 0) or a row."""
    return lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _along(axis: int, row: jax.Array) -> jax.Array:
    """[1, N] as it is, or turned into a column (axis 0)."""
    if axis == 1:
        return row
    return jnp.broadcast_to(row, (tiles.LANES, row.shape[1])).T[:, :1]


def _wide(column: jax.Array, width: int) -> jax.Array:
    """[N, 128], the same in all lanes -> [N, width]."""
    return jnp.tile(column, (1, -(-width // tiles.LANES)))[:, :width]


def _rows(block: jax.Ref) -> jax.Array:
    """[R, Tb, K] -> [rows, K]."""
    heads, queries, width = block.shape
    return block[...].reshape(heads * queries, width)


def _row(block: jax.Ref) -> jax.Array:
    """[R, Tb] -> [1, rows]."""
    return jnp.concatenate([block[x : x + 1, :] for x in range(block.shape[0])], axis=1)


def _write_queries(block: jax.Ref, rows: jax.Array) -> None:
    """[rows, K] -> [R, Tb, K] in its type."""
    block[...] = rows.reshape(block.shape).astype(block.dtype)


def _prepare(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[Call, tuple[jax.Array, jax.Array, jax.Array], Places, int]:
    """The call, operands and places of whole blocks, and the number of queries before padding."""
    if not options.interpret:
        query = on_tpu.require_tpu(query)
    length = query.shape[3]
    blocking = pallas_grid.plan(options, query, key.shape[2])
    slots = blocking.num_key * blocking.key
    padded = (
        problem.pad(query, 3, blocking.num_query * blocking.query),
        problem.pad(key, 2, slots),
        problem.pad(value, 2, slots),
    )
    call = Call(options, blocking, query.shape[2], outer_is_query=True)
    return call, padded, problem.pad_places(places, blocking), length
