"""Attention, lean and reference, against the float64 oracle: what it sees, and what it costs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import attention
from jaxdistill.kernels.attention import xla

from tests.kernels import attention_cases as cases

BLOCKS = {"block_query": 8, "block_key": 16, "implementation": "xla"}
WHOLE = {"implementation": "xla"}
REFERENCE = {"implementation": "reference"}

each_case = pytest.mark.parametrize("case", cases.NAMES)
each_dtype = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"]
)


def each_way() -> pytest.MarkDecorator:
    """(how, dtype); a compilation takes a second, so what is alike is slow."""
    ways = {"blocks": BLOCKS, "whole": WHOLE, "reference": REFERENCE}
    pairs = itertools.product(ways, ("float32", "bfloat16"))
    by_default = {("blocks", "float32"), ("blocks", "bfloat16"), ("reference", "float32")}
    return pytest.mark.parametrize(
        ("how", "dtype"),
        [
            pytest.param(
                ways[way],
                jnp.dtype(dtype),
                id=f"{way}-{dtype}",
                marks=() if (way, dtype) in by_default else pytest.mark.slow,
            )
            for way, dtype in pairs
        ],
    )


def small(name: str, dtype: jnp.dtype = jnp.float32) -> cases.Arrays:
    return cases.make(cases.case_of(name, "small"), dtype)


@each_case
@each_way()
def test_against_float64(how: dict, dtype: jnp.dtype, case: str) -> None:
    """Output, log-sum-exp and the gradients of all operands through both."""
    cases.check(case, dtype, **how)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case == "everything" else pytest.mark.slow)
        for case in cases.NAMES
    ],
)
@pytest.mark.parametrize("how", [BLOCKS, REFERENCE], ids=["blocks", "reference"])
def test_rows_on_four_devices(how: dict, case: str) -> None:
    cases.check(case, jnp.float32, "shard_map", **how)


@pytest.mark.parametrize("how", [BLOCKS, REFERENCE], ids=["blocks", "reference"])
@pytest.mark.parametrize("std", [0.01, 30.0, 3e4])
def test_small_and_extreme_scores(std: float, how: dict) -> None:
    if std < 100:
        cases.check("window", jnp.float32, std=std, **how)
        return
    # float32 scores of 1e5 have errors of 1e-2: exact is only which one is the largest.
    arrays = cases.make(cases.case_of("window", "small"), jnp.float32, std)
    results = cases.in_place("jit", {"window": 7} | how)(arrays, {})
    assert all(np.isfinite(x).all() for x in results)


@pytest.mark.parametrize("how", [BLOCKS, REFERENCE], ids=["blocks", "reference"])
def test_extreme_scores_pick_one_key(how: dict) -> None:
    """Scores of +-1e4 in the middle of smaller ones: the output is one value, to the last digit."""
    keys = np.zeros((1, 40, 1, 1), np.float32)
    keys[0, 13], keys[0, 30] = 1e4, -1e4
    values = np.random.default_rng(0).normal(size=keys.shape).astype(np.float32)
    query = np.ones_like(keys)
    output, log_sum_exp = attention(
        query, keys, values, causal=False, with_log_sum_exp=True, scale=1.0, **how
    )
    np.testing.assert_array_equal(output[0, :, 0, 0], np.full(40, values[0, 13, 0, 0]))
    np.testing.assert_array_equal(log_sum_exp, np.full((1, 40, 1), 1e4, np.float32))


@pytest.mark.parametrize("how", [BLOCKS, WHOLE, REFERENCE], ids=["blocks", "whole", "reference"])
def test_a_row_that_sees_nothing_is_zero_without_gradient(how: dict) -> None:
    arrays = small("causal")
    lengths = np.array([37, 0, 1, 37])
    run = cases.in_place("jit", how)
    output, log_sum_exp, *gradients = run(arrays, {"lengths": lengths})
    np.testing.assert_array_equal(output[1], 0)
    np.testing.assert_array_equal(log_sum_exp[1], -np.inf)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)
    assert np.isfinite(np.asarray(log_sum_exp)[[0, 2, 3]]).all()


@pytest.mark.parametrize("how", [BLOCKS, WHOLE, REFERENCE], ids=["blocks", "whole", "reference"])
def test_packed_equals_unpacked(how: dict) -> None:
    """Three sequences in one row, their ids in any order, or each in a row of its own."""
    rng = np.random.default_rng(3)
    segments = np.repeat([5, 1, 3], 12)[None]
    shapes = ((1, 36, 4, 8), (1, 36, 2, 8), (1, 36, 2, 8), (1, 36, 4, 8), (1, 36, 4))
    packed = cases.Arrays(*(rng.normal(size=x).astype(np.float32) for x in shapes))
    unpacked = cases.Arrays(*(x.reshape(3, 12, *x.shape[2:]) for x in packed))
    together = cases.in_place("jit", how)(packed, {"segment_ids": segments})
    alone = cases.in_place("jit", how)(unpacked, {})
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=2e-6)


@pytest.mark.parametrize("how", [BLOCKS, WHOLE, REFERENCE], ids=["blocks", "whole", "reference"])
def test_slots_past_the_length_are_never_looked_at(how: dict) -> None:
    """Huge numbers there reach no value and no gradient; their own gradient is zero."""
    arrays = small("causal")
    lengths = np.array([37, 20, 1, 30])
    past = np.arange(37)[None, :] >= lengths[:, None]
    filled = arrays._replace(key=arrays.key.copy(), value=arrays.value.copy())
    filled.key[past] = 1e30
    filled.value[past] = 1e30
    run = cases.in_place("jit", how)
    clean, dirty = (run(x, {"lengths": lengths}) for x in (arrays, filled))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    for gradient in dirty[3:]:
        np.testing.assert_array_equal(gradient[past], 0)


def test_gradients_against_finite_differences() -> None:
    """Of the whole function, in float32: the oracle's own gradients are no witness of theirs."""
    arrays = small("everything")
    fixed, by_row = cases.split(cases.case_of("everything", "small").options)
    *_, to_query, to_key, to_value = cases.oracle(arrays, **fixed, **by_row)
    rng = np.random.default_rng(0)
    for name, gradient in (("query", to_query), ("key", to_key), ("value", to_value)):
        direction = rng.normal(size=gradient.shape)

        def total(step: float, name: str = name, direction: np.ndarray = direction) -> float:
            moved = getattr(arrays, name).astype(np.float64) + step * direction
            output, sums, *_ = cases.oracle(arrays._replace(**{name: moved}), **fixed, **by_row)
            weighted = np.where(np.isinf(sums), 0, sums) * arrays.to_sum
            return (output * arrays.to_output).sum() + weighted.sum()

        numeric = (total(1e-5) - total(-1e-5)) / 2e-5
        np.testing.assert_allclose(numeric, (gradient * direction).sum(), rtol=1e-6)


def test_sizes_of_blocks_change_nothing() -> None:
    sizes = [(37, 8), (5, 64)]
    for block_query, block_key in sizes:
        how = {"block_query": block_query, "block_key": block_key, "implementation": "xla"}
        cases.check("positions", jnp.float32, **how)


def test_under_vmap_and_remat() -> None:
    arrays = small("window")[:3]

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(query, key, value, window=7, **BLOCKS)))

    expected = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
    by_row = jax.jit(jax.vmap(jax.grad(jax.checkpoint(total), (0, 1, 2))))
    rows = by_row(*(x[:, None] for x in arrays))
    for actual, true in zip(rows, expected, strict=True):
        np.testing.assert_allclose(actual[:, 0], true, atol=1e-5)


def test_traced_once_whatever_the_lengths() -> None:
    traces = []

    @jax.jit
    def run(query: jax.Array, lengths: jax.Array) -> jax.Array:
        traces.append(1)
        return attention(query, query, query, lengths=lengths, **BLOCKS)

    query = small("causal").query
    for length in (1, 5, 37):
        run(query, np.full(4, length))
    assert len(traces) == 1


def test_every_product_accumulates_in_float32() -> None:
    """XLA:CPU may keep digits that bfloat16 drops, so the program says it, not the numbers."""
    arrays = small("causal", jnp.bfloat16)
    for how in (BLOCKS, REFERENCE):
        text = str(jax.make_jaxpr(functools.partial(cases.run, how))(arrays, {}))
        products = [line for line in text.splitlines() if "= dot_general" in line]
        forward_and_backward = 7 if how is BLOCKS else 2
        wide = [line for line in products if ":f32[" in line]
        assert len(wide) >= forward_and_backward
        assert how is REFERENCE or len(wide) == len(products)


# ---- Memory, by XLA's own account ---------------------------------------------------------------


def temporary(implementation: str, length: int, heads: int, dtype: jnp.dtype) -> int:
    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        output = attention(query, key, value, implementation=implementation)
        return jnp.sum(output.astype(jnp.float32))

    query = jax.ShapeDtypeStruct((1, length, heads, 64), dtype)
    compiled = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(query, query, query).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@each_dtype
def test_memory_grows_with_the_length_not_its_square(dtype: jnp.dtype) -> None:
    """Nothing of [T, T]: at 8192 tokens the scores of four heads alone take 1 GiB."""
    lean = temporary("xla", 8192, 4, dtype)
    tile_and_tokens = 6 * xla.TILE_BYTES + 16 * 4 * 8192 * 4 * 64
    assert lean <= tile_and_tokens, f"{lean} bytes"
    assert lean <= 4 * 8192**2 * 4 / 4
    twice = temporary("xla", 16384, 4, dtype)
    assert twice <= 2.2 * lean
    assert temporary("reference", 2048, 4, dtype) >= 4 * 4 * 2048**2
