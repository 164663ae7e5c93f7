"""The TPU kernels: the recurrences of `xla` with the tile of scores in VMEM.

A tile is held transposed, [keys, rows], where the rows are a block of queries of all R heads that
share a key head, head after head. What there is one of for each row (maximum, total, log-sum-exp,
delta) then lies along the lanes: it meets the tile without a transposition, and is read and
written as [R, T] lies in memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxdistill.kernels import on_tpu, tiles
from jaxdistill.kernels.attention import pallas_grid, problem
from jaxdistill.kernels.attention.pallas_grid import Call, Step
from jaxdistill.kernels.attention.problem import Options, Places, dot


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
        [(query.shape[-1], rows), (1, rows), (1, rows)],
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
        [(query.shape[-1], call.heads * call.blocking.query)],
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
    total_output, maximum, total = scratch  # [K, rows], [1, rows], [1, rows]

    @pl.when(step.is_start)
    def _() -> None:
        total_output[...] = jnp.zeros_like(total_output)
        maximum[...] = jnp.full_like(maximum, -jnp.inf)
        total[...] = jnp.zeros_like(total)

    @pl.when(step.is_needed)
    def _() -> None:
        scores, _, seen = _scores(call, step, inputs)
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        before = maximum[...]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        # Until a key is seen the maximum is -inf: subtracting 0 leaves exp(-inf) = 0, not NaN.
        finite = jnp.where(now == -jnp.inf, 0.0, now)
        weights = jnp.exp(scores - finite)
        shrink = jnp.exp(before - finite)
        value = inputs["value"][...]
        maximum[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        part = dot(value, weights.astype(value.dtype), (0, 0))
        total_output[...] = total_output[...] * shrink + part

    @pl.when(step.is_end)
    def _() -> None:
        empty = total[...] == 0
        positive = jnp.where(empty, 1.0, total[...])
        _write_queries(outputs["output"], total_output[...] / positive)
        sums = jnp.where(empty, -jnp.inf, maximum[...] + jnp.log(positive))
        block = call.blocking.query
        for head in range(call.heads):
            outputs["log_sum_exp"][head : head + 1, :] = sums[:, head * block : (head + 1) * block]


def _query_kernel(call: Call, step: Step, inputs: dict, outputs: dict, scratch: list) -> None:
    (total,) = scratch  # [K, rows]

    @pl.when(step.is_start)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(step.is_needed)
    def _() -> None:
        _, to_scores = _gradients(call, step, inputs)
        key = inputs["key"][...]
        total[...] += dot(key, to_scores.astype(key.dtype), (0, 0))

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
    call: Call, step: Step, inputs: dict
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Scores [keys, rows], their slope in the scaled products, and which count."""
    products = dot(inputs["key"][...], _rows(inputs["query"]), (1, 1))
    return *problem.capped(call.options, products), _seen(call, step, inputs)


def _gradients(call: Call, step: Step, inputs: dict) -> tuple[jax.Array, jax.Array]:
    """Weights and gradients of the scaled products, both [keys, rows] and float32."""
    scores, slope, seen = _scores(call, step, inputs)
    weights = jnp.exp(scores - _row(inputs["log_sum_exp"]))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    to_weights = dot(inputs["value"][...], _rows(inputs["to_output"]), (1, 1))
    to_scores = weights * (to_weights - _row(inputs["delta"]))
    return weights, to_scores if slope is None else to_scores * slope


def _seen(call: Call, step: Step, inputs: dict) -> jax.Array | None:
    """Which pairs of the tile count; it broadcasts to [keys, rows]."""
    blocking = call.blocking
    if "positions" in inputs:
        positions = inputs["positions"][...]
    else:
        positions = lax.broadcasted_iota(jnp.int32, (1, blocking.query), 1)
        positions += step.query_block * blocking.query
    slots = lax.broadcasted_iota(jnp.int32, (blocking.key, 1), 0) + step.key_block * blocking.key
    segments = None
    if "query_segments" in inputs:
        # Keys lie along the sublanes of a tile: their row of ids is turned once, all lanes alike.
        of_keys = jnp.broadcast_to(inputs["key_segments"][...], (tiles.LANES, blocking.key))
        segments = _repeat(inputs["query_segments"][...], call.heads), of_keys.T[:, :1]
    repeated = _repeat(positions, call.heads)
    return problem.seen(call.options, blocking, slots, repeated, segments, step.length)


def _rows(block: jax.Ref) -> jax.Array:
    """[R, Tb, K] -> [rows, K]."""
    heads, queries, width = block.shape
    return block[...].reshape(heads * queries, width)


def _row(block: jax.Ref) -> jax.Array:
    """[R, Tb] -> [1, rows]."""
    return jnp.concatenate([block[x : x + 1, :] for x in range(block.shape[0])], axis=1)


def _repeat(row: jax.Array, heads: int) -> jax.Array:
    """[1, Tb] -> [1, rows], the same for every head."""
    return jnp.concatenate([row] * heads, axis=1)


def _write_queries(block: jax.Ref, transposed: jax.Array) -> None:
    """[K, rows] -> [R, Tb, K] in its type."""
    block[...] = transposed.T.reshape(block.shape).astype(block.dtype)


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
