"""One query a row and a cache: equal to the last row of the whole attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import attention_decode, on_tpu

from tests.kernels import attention_cases as cases

RNG = np.random.default_rng(0)
ROWS, SLOTS, HEADS, GROUPS = 4, 300, 6, 2
QUERY = RNG.normal(size=(ROWS, HEADS, 8)).astype(np.float32)
KEY, VALUE = RNG.normal(size=(2, ROWS, SLOTS, GROUPS, 8)).astype(np.float32)
LENGTHS = np.array([1, 300, 0, 140])

WAYS: dict[str, dict[str, Any]] = {
    "whole": {"implementation": "xla"},
    "blocks": {"implementation": "xla", "block_key": 64},
    "reference": {"implementation": "reference"},
    "pallas": {"implementation": "pallas", "block_key": 128},
}


def expected(dtype: jnp.dtype, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = cases.Arrays(
        *(x.astype(dtype) for x in (QUERY[:, None], KEY, VALUE)),
        np.zeros((ROWS, 1, HEADS, 8), dtype),
        np.zeros((ROWS, 1, HEADS), np.float32),
    )
    output, sums, *_ = cases.oracle(arrays, positions=LENGTHS[:, None] - 1, **options)
    return output[:, 0], sums[:, 0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"window": 50, "soft_cap": 2.0, "scale": 0.5}])
@pytest.mark.parametrize("way", WAYS)
def test_against_float64(way: str, options: dict, dtype: jnp.dtype) -> None:
    @jax.jit
    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attention_decode(*arrays, with_log_sum_exp=True, **options, **WAYS[way])

    token = on_tpu.INTERPRET.set(way == "pallas")
    output, sums = run(*(x.astype(dtype) for x in (QUERY, KEY, VALUE)), LENGTHS)
    on_tpu.INTERPRET.reset(token)
    true_output, true_sums = expected(dtype, **options)
    assert (output.dtype, sums.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(sums, true_sums, atol=5e-6)
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 5e-6
    error = np.abs(np.asarray(output, np.float64) - true_output).max()
    assert error <= tolerance * np.abs(true_output).max()


def test_one_program_for_all_lengths() -> None:
    run = jax.jit(attention_decode)
    for length in (1, 7, 300):
        run(QUERY, KEY, VALUE, np.full(ROWS, length))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": QUERY[:, None]}, r"query must have shape \[B, H, K\], but its shape is \(4, 1"),
        ({"query": QUERY[:, :5]}, "query must have a multiple of key's 2 heads, but it has 5"),
        ({"lengths": LENGTHS[:3]}, r"lengths must have shape \(4,\), but the shape is \(3,\)"),
        ({"lengths": LENGTHS * 1.0}, "lengths must be integers, but the type is float"),
        ({"key": KEY[0]}, r"key must have shape \[B, S, G, K\], none of them 0, but its shape is"),
    ],
)
def test_says_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "lengths": LENGTHS} | change
    with pytest.raises(ValueError, match=message):
        attention_decode(**arguments)
