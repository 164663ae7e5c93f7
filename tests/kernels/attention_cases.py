"""Attention's oracle in float64 and the cases every implementation is held against it on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxdistill.kernels import attention

ROWS, WIDTH = 4, 8


class Case(NamedTuple):
    """Query heads, key heads, queries, key slots, and arguments of `attention`."""

    heads: int
    groups: int
    length: int
    slots: int
    options: dict[str, Any]


@functools.cache
def table(length: int, slots: int) -> dict[str, Case]:
    """All cases at a size; the arrays among their options come with the rows of the batch."""
    rng = np.random.default_rng(length)
    segments = np.sort(rng.integers(0, 4, (ROWS, length)))
    key_segments = np.arange(ROWS * slots).reshape(ROWS, slots) % 3
    positions = np.sort(rng.integers(-1, slots, (ROWS, length)))
    lengths = np.array([length, length // 2, 0, 5])
    both = {"causal": False, "segment_ids": segments, "key_segment_ids": key_segments}
    everything = {"segment_ids": segments, "window": 11, "soft_cap": 3.0, "lengths": lengths}
    return {
        "causal": Case(2, 2, length, length, {}),
        "full": Case(2, 1, length, slots, {"causal": False}),
        "window": Case(4, 2, length, length, {"window": 7}),
        "window_both_sides": Case(2, 1, length, slots, {"causal": False, "window": 5}),
        "segments": Case(6, 2, length, length, {"segment_ids": segments, "scale": 0.5}),
        "segments_of_keys": Case(2, 2, length, slots, both),
        "soft_cap": Case(3, 1, length, length, {"soft_cap": 2.0}),
        "lengths": Case(2, 1, length, length, {"causal": False, "lengths": lengths}),
        "positions": Case(2, 2, length, slots, {"positions": positions, "window": 9}),
        "everything": Case(4, 2, length, length, everything | {"scale": 0.3}),
    }


# Queries and slots: prime, of whole blocks (of 16, or 128), and one more; "large" divides by none.
SIZES = {
    "small": (37, 53),
    "small_aligned": (32, 48),
    "small_one_more": (33, 49),
    "large": (300, 270),
    "large_aligned": (256, 384),
    "large_one_more": (257, 385),
    "large_prime": (257, 269),
}
NAMES = tuple(table(*SIZES["small"]))


class Arrays(NamedTuple):
    """Operands, and cotangents of output and log-sum-exp."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    to_output: np.ndarray
    to_sum: np.ndarray


def case_of(name: str, size: str) -> Case:
    return table(*SIZES[size])[name]


def make(case: Case, dtype: jnp.dtype, std: float = 1.0) -> Arrays:
    """Scaled scores have about this standard deviation."""
    rng = np.random.default_rng(case.heads)
    shape = ROWS, case.length, case.heads, WIDTH

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    query = (rng.normal(size=shape) * std).astype(dtype)
    key, value = (normal(ROWS, case.slots, case.groups, WIDTH) for _ in range(2))
    to_sum = rng.normal(size=shape[:3]).astype(np.float32)
    return Arrays(query, key, value, normal(*shape), to_sum)


def visible(
    length: int,
    slots: int,
    rows: int,
    causal: bool = True,
    window: int | None = None,
    segment_ids: np.ndarray | None = None,
    key_segment_ids: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    **_: object,
) -> np.ndarray:
    """bool [B, T, S], one pair at a time."""
    seen = np.ones((rows, length, slots), bool)
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    for b, t, s in np.ndindex(*seen.shape):
        p = t if positions is None else positions[b, t]
        hidden = (
            (causal and s > p)
            or (window is not None and abs(p - s) >= window)
            or (segment_ids is not None and segment_ids[b, t] != key_segment_ids[b, s])
            or (lengths is not None and s >= lengths[b])
        )
        seen[b, t, s] = not hidden
    return seen


def oracle(arrays: Arrays, **options: Any) -> tuple[np.ndarray, ...]:
    """Output, log-sum-exp and the gradients of query, key and value, in float64."""
    query, key, value, to_output, to_sum = (x.astype(np.float64) for x in arrays)
    rows, length, heads, width = query.shape
    seen = visible(length, key.shape[1], rows, **options)
    scale = options.get("scale", width**-0.5)
    cap = options.get("soft_cap")
    shared = heads // key.shape[2]
    output, sums = np.zeros_like(query), np.full(query.shape[:3], -np.inf)
    gradients = tuple(map(np.zeros_like, (query, key, value)))
    for b, h in np.ndindex(rows, heads):
        g = h // shared
        q, k, v = query[b, :, h], key[b, :, g], value[b, :, g]
        x = scale * q @ k.T
        slope = np.ones_like(x) if cap is None else 1 - np.tanh(x / cap) ** 2
        x = x if cap is None else cap * np.tanh(x / cap)
        maximum = np.where(seen[b], x, -1e300).max(-1, keepdims=True)
        weights = np.where(seen[b], np.exp(np.minimum(x - maximum, 0)), 0)
        total = weights.sum(-1, keepdims=True)
        some = total[:, 0] > 0
        p = weights / np.where(total == 0, 1, total)
        output[b, :, h] = p @ v
        sums[b, some, h] = (maximum[:, 0] + np.log(np.where(some, total[:, 0], 1)))[some]
        to_p = to_output[b, :, h] @ v.T
        to_x = p * (to_p - (p * to_p).sum(-1, keepdims=True) + to_sum[b, :, h, None]) * slope
        gradients[0][b, :, h] = scale * to_x @ k
        gradients[1][b, :, g] += scale * to_x.T @ q
        gradients[2][b, :, g] += p.T @ to_output[b, :, h]
    return output, sums, *gradients


@functools.cache
def expected(name: str, size: str, dtype: jnp.dtype, std: float = 1.0) -> tuple[np.ndarray, ...]:
    case = case_of(name, size)
    return oracle(make(case, dtype, std), **case.options)


def run(options: dict[str, Any], arrays: Arrays, by_row: dict[str, Any]) -> tuple:
    """The five results of `oracle` from attention and its derivative."""

    def function(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attention(*operands, with_log_sum_exp=True, **options, **by_row)

    results, pull = jax.vjp(function, *arrays[:3])
    return *results, *pull((arrays.to_output, arrays.to_sum))


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is fixed in the program, and what comes with the rows of the batch."""
    by_row = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    return {name: x for name, x in options.items() if name not in by_row}, by_row


def in_place(place: str, fixed: dict[str, Any]) -> Callable:
    """`run` under jit, or with the batch shared out over four devices.

    The interpreter of kernels knows nothing of values that vary over devices: no check for it.
    """
    function = functools.partial(run, fixed)
    if place == "jit":
        return jax.jit(function)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = PartitionSpec("data")
    check = fixed.get("implementation") != "pallas"
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
    )


def check(
    name: str,
    dtype: jnp.dtype,
    place: str = "jit",
    std: float = 1.0,
    size: str = "small",
    **how: Any,
) -> None:
    """Hold an implementation against float64, value by value; errors relative to the largest."""
    case = case_of(name, size)
    fixed, by_row = split(case.options)
    results = in_place(place, fixed | how)(make(case, dtype, std), by_row)
    assert_close(results, expected(name, size, dtype, std), dtype, std)


def assert_close(
    results: tuple, expected: tuple[np.ndarray, ...], dtype: jnp.dtype, std: float = 1.0
) -> None:
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-5 * (1 + std)
    names = ("output", "log_sum_exp", "query", "key", "value")
    for name, actual, true in zip(names, results, expected, strict=True):
        assert actual.dtype == (jnp.float32 if name == "log_sum_exp" else dtype), name
        assert actual.shape == true.shape, name
        wide = np.asarray(actual, np.float64)
        if name == "log_sum_exp":  # float32 whatever the operands' type; -inf where it should be
            np.testing.assert_allclose(wide, true, rtol=2e-6, atol=2e-6 * (1 + std), err_msg=name)
        else:
            error = np.abs(wide - true).max() / np.abs(true).max()
            assert error <= tolerance, f"{name}: {error}"
