"""Attention: queries, keys and values in, their mixture out; with a form for decoding."""

import functools
import math
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxdistill.kernels import arguments, dispatch, on_tpu, tiles
from jaxdistill.kernels.attention import pallas_grid, pallas_tpu, reference, xla
from jaxdistill.kernels.attention.problem import Options, Places
from jaxdistill.kernels.dispatch import ImplementationError

PALLAS_TYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.typing.ArrayLike | None = None,
    key_segment_ids: jax.typing.ArrayLike | None = None,
    positions: jax.typing.ArrayLike | None = None,
    lengths: jax.typing.ArrayLike | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    with_log_sum_exp: bool = False,
    implementation: str = "auto",
    block_query: int | None = None,
    block_key: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention whose scores are never in memory as a whole.

        x[t, s] = scale * query[t, h] . key[s, g],  g = h // (H / G);  or c tanh(x / c), c the cap
        log_sum_exp[t, h] = log sum_s exp(x[t, s]) over the slots s that t sees
        output[t, h] = sum_s exp(x[t, s] - log_sum_exp[t, h]) value[s, g]

    A query at slot p sees slot s if s <= p (`causal`), |p - s| < window, their segments are equal
    and s < the row's length, each where asked for. A query that sees nothing gives output 0 and
    log_sum_exp -inf, and no gradient.

    Args:
      query: `[B, T, H, K]`. key, value: `[B, S, G, K]`, H a multiple of G; one floating type.
      causal: whether later slots are hidden.
      window: how many slots a query sees, its own included; without `causal` on both sides.
      segment_ids: integers `[B, T]`, and of the keys too where T = S; 0 is as any other.
      key_segment_ids: integers `[B, S]`, where they are not those of the queries.
      positions: integers `[B, T]`, the slot each query stands at; default its index.
      lengths: integers `[B]`, how many of the S slots of a row exist; default all.
      soft_cap: bound of the scaled scores.
      scale: default 1 / sqrt(K).
      with_log_sum_exp: whether to return it too.
      implementation: "auto", "pallas" (a TPU kernel; float32 or bfloat16), "xla" (lean) or
        "reference" (all scores). A name that cannot serve raises; "auto" logs what it chose at
        level INFO, once. It takes "pallas" where the default backend is a TPU, in a process of
        one device or inside shard_map (a jit over several devices cannot split a kernel).
      block_query, block_key: size of the tile of scores that exists at a time ("pallas": of
        queries a multiple of 128, of keys too); default from a byte budget.

    Returns:
      output `[B, T, H, K]` in the type of the operands; with_log_sum_exp also `[B, T, H]`, float32,
      nats. Sums run in float32; the backward pass recomputes the scores in O(T + S) memory. It can
      be differentiated again, but that of "pallas" raises jax's NotImplementedError.

    Raises:
      ValueError: an argument of the wrong shape, type or range.
      ImplementationError: an implementation that does not exist or cannot serve the call.

    Source: arXiv 2205.14135 and 2307.08691 (tiles, recomputation), 2305.13245 (grouped queries),
      2408.00118 (soft cap).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import attention
      >>> same = np.zeros((1, 3, 1, 2), np.float32)
      >>> value = np.array([3.0, 1.0, 2.0], np.float32).reshape(1, 3, 1, 1) * np.ones(2, np.float32)
      >>> print(attention(same, same, value)[0, :, 0, 0])  # means of what came before
      [3. 2. 2.]
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_operands(query, key, value)
    places = _places(query, key, segment_ids, key_segment_ids, positions, lengths)
    options = Options(
        causal,
        window,
        soft_cap,
        query.shape[-1] ** -0.5 if scale is None else scale,
        block_query,
        block_key,
        on_tpu.INTERPRET.get(),
    )
    _check_options(options)
    query, key, value, places = _vary_alike(query, key, value, places)
    folded = _fold_query(query, key.shape[2])
    function = _function(implementation, options, folded, key.shape[1])
    output, log_sum_exp = function(
        options, folded, key.swapaxes(1, 2), value.swapaxes(1, 2), places
    )
    output = output.transpose(0, 3, 1, 2, 4).reshape(query.shape)
    if not with_log_sum_exp:
        return output
    return output, log_sum_exp.transpose(0, 3, 1, 2).reshape(query.shape[:3])


def attention_decode(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    lengths: jax.typing.ArrayLike,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    with_log_sum_exp: bool = False,
    implementation: str = "auto",
    block_key: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`attention` of one query a row to a cache: that of the newest token, at slot lengths - 1.

    Blocks of keys past the length or before the window are not read.

    Args:
      query: `[B, H, K]`. key, value: the cache, `[B, S, G, K]`, the query's own slot included.
      lengths: integers `[B]`, how many slots of each row exist; 0 gives output 0.
      window, soft_cap, scale, with_log_sum_exp, implementation, block_key: as of `attention`.

    Returns:
      output `[B, H, K]`; with_log_sum_exp also `[B, H]`, float32, nats.

    Raises:
      ValueError, ImplementationError: as `attention`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import attention_decode
      >>> cache = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
      >>> print(attention_decode(np.zeros((1, 1, 1), np.float32), cache, cache, np.array([3])))
      [[[1.]]]
    """
    query, key, lengths = jnp.asarray(query), jnp.asarray(key), jnp.asarray(lengths)
    if query.ndim != 3:
        raise ValueError(f"query must have shape [B, H, K], but its shape is {query.shape}")
    _check_key(key)
    rows, heads, width = query.shape
    groups = key.shape[2]
    _check_groups(heads, groups)
    _check_integers("lengths", lengths, (rows,))
    # The heads that share a key head stand as so many queries at one slot: one block holds them.
    queries = query.reshape(rows, groups, heads // groups, width).swapaxes(1, 2)
    newest = jnp.broadcast_to(lengths[:, None] - 1, queries.shape[:2])
    result = attention(
        queries,
        key,
        value,
        window=window,
        positions=newest,
        soft_cap=soft_cap,
        scale=scale,
        with_log_sum_exp=with_log_sum_exp,
        implementation=implementation,
        block_key=block_key,
    )
    return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(rows, heads, *x.shape[3:]), result)


# ---- Implementations: the forward and backward pass of a module behind one derivative -----------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lean(
    module: ModuleType,
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    places: Places,
) -> tuple[jax.Array, jax.Array]:
    return module.forward(options, query, key, value, places)


def _forward(
    module: ModuleType,
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    places: Places,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    output, log_sum_exp = module.forward(options, query, key, value, places)
    return (output, log_sum_exp), ((query, key, value, places), output, log_sum_exp)


def _backward(
    module: ModuleType,
    options: Options,
    residuals: tuple,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    operands, output, log_sum_exp = residuals
    to_output, to_log_sum_exp = cotangents
    products = to_output.astype(jnp.float32) * output.astype(jnp.float32)
    delta = jnp.sum(products, axis=-1) - to_log_sum_exp
    return *module.backward(options, operands, log_sum_exp, delta, to_output), None


_lean.defvjp(_forward, _backward)

IMPLEMENTATIONS: dict[str, Callable] = {
    "pallas": functools.partial(_lean, pallas_tpu),
    "xla": functools.partial(_lean, xla),
    "reference": reference.attention,
}


def _function(
    implementation: str, options: Options, query: jax.Array, slots: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What serves the folded query; only "auto" may take another where the TPU kernel cannot."""
    if implementation == "pallas":
        _check_kernel(options, query, slots)
    ordered = on_tpu.best_first(IMPLEMENTATIONS, lambda: _check_kernel(options, query, slots))
    return dispatch.choose("attention", implementation, ordered)


def _check_kernel(options: Options, query: jax.Array, slots: int) -> None:
    """Raise ImplementationError unless the TPU kernel can serve."""
    other = "choose 'xla' or 'reference'"
    if query.dtype not in PALLAS_TYPES:
        raise ImplementationError(
            "query must be float32 or bfloat16 for implementation 'pallas' of attention, "
            f"but it is {query.dtype}: {other}"
        )
    for name, size in (("block_query", options.block_query), ("block_key", options.block_key)):
        if size is not None and size % tiles.LANES:
            raise ImplementationError(
                f"{name} must be a multiple of 128 for implementation 'pallas' of attention, "
                f"but it is {size}: {other}"
            )
    pallas_grid.plan(options, query, slots)


# ---- Arguments ----------------------------------------------------------------------------------


def _fold_query(query: jax.Array, groups: int) -> jax.Array:
    """[B, T, H, K] -> [B, G, R, T, K]."""
    rows, length, heads, width = query.shape
    grouped = query.reshape(rows, length, groups, heads // groups, width)
    return grouped.transpose(0, 2, 3, 1, 4)


def _vary_alike(
    query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array, jax.Array, Places]:
    leaves, structure = jax.tree.flatten((query, key, value, places))
    return jax.tree.unflatten(structure, tiles.vary_alike(*leaves))


def _places(
    query: jax.Array,
    key: jax.Array,
    segment_ids: jax.typing.ArrayLike | None,
    key_segment_ids: jax.typing.ArrayLike | None,
    positions: jax.typing.ArrayLike | None,
    lengths: jax.typing.ArrayLike | None,
) -> Places:
    rows, length = query.shape[:2]
    slots = key.shape[1]
    if key_segment_ids is None and segment_ids is not None:
        if length != slots:
            raise ValueError(
                f"key_segment_ids must be given where there are {length} queries and {slots} "
                "keys, but they are None: segment_ids are those of the queries"
            )
        key_segment_ids = segment_ids
    if key_segment_ids is not None and segment_ids is None:
        raise ValueError("segment_ids must be given with key_segment_ids, but they are None")

    def integers(
        name: str, array: jax.typing.ArrayLike | None, shape: tuple[int, ...]
    ) -> jax.Array | None:
        if array is None:
            return None
        _check_integers(name, array, shape)
        return jnp.asarray(array, jnp.int32)

    return Places(
        integers("positions", positions, (rows, length)),
        integers("segment_ids", segment_ids, (rows, length)),
        integers("key_segment_ids", key_segment_ids, (rows, slots)),
        integers("lengths", lengths, (rows,)),
    )


def _check_integers(name: str, array: jax.typing.ArrayLike, shape: tuple[int, ...]) -> None:
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise ValueError(f"{name} must be integers, but the type is {jnp.result_type(array)}")
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have shape {shape}, but the shape is {jnp.shape(array)}")


def _check_operands(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if query.ndim != 4 or not jnp.issubdtype(query.dtype, jnp.floating) or 0 in query.shape:
        raise ValueError(
            "query must be floating with shape [B, T, H, K], none of them 0, "
            f"but it is {query.dtype} with shape {query.shape}"
        )
    _check_key(key)
    _check_groups(query.shape[2], key.shape[2])
    expected = (query.shape[0], key.shape[1], key.shape[2], query.shape[3])
    for name, array in (("key", key), ("value", value)):
        if array.shape != expected or array.dtype != query.dtype:
            raise ValueError(
                f"{name} must be {query.dtype} with shape {expected} for query of shape "
                f"{query.shape}, but it is {array.dtype} with shape {array.shape}"
            )


def _check_key(key: jax.Array) -> None:
    if key.ndim != 4 or 0 in key.shape:
        raise ValueError(
            f"key must have shape [B, S, G, K], none of them 0, but its shape is {key.shape}"
        )


def _check_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"query must have a multiple of key's {groups} heads, but it has {heads}")


def _check_options(options: Options) -> None:
    arguments.check_chunk("window", options.window)
    arguments.check_chunk("block_query", options.block_query)
    arguments.check_chunk("block_key", options.block_key)
    if options.soft_cap is not None:
        arguments.check_positive("soft_cap", options.soft_cap)
    if not math.isfinite(options.scale):
        raise ValueError(f"scale must be finite, but it is {options.scale}")
