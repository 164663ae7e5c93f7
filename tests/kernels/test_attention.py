"""Attention, lean and reference, against the float64 oracle: what it sees, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import attention
from jaxdistill.kernels.attention import xla

from tests.kernels import attention_cases as cases
from tests.kernels.attention_tests import AttentionTests

BLOCKS = {"block_query": 8, "block_key": 16, "implementation": "xla"}
WHOLE = {"implementation": "xla"}
REFERENCE = {"implementation": "reference"}

each_dtype = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"]
)


def small(name: str, dtype: jnp.dtype = jnp.float32) -> cases.Arrays:
    return cases.make(cases.case_of(name, "small"), dtype)


class TestReference(AttentionTests):
    how = REFERENCE


class TestXla(AttentionTests):
    how = BLOCKS
    by_default = ("float32", "bfloat16")


class TestXlaWhole(AttentionTests):
    """One tile, without a loop."""

    how = WHOLE
    by_default = ()


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
