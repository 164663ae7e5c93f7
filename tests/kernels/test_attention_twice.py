"""Second derivatives of attention: those of "xla" are right, those of "pallas" refused by jax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import attention, on_tpu

from tests.kernels import attention_cases as cases

MIXED: dict[str, Any] = {"window": 7, "soft_cap": 2.0}


def forward_over_reverse(total: Callable, operands: tuple, directions: tuple) -> tuple:
    return jax.jvp(jax.grad(total, (0, 1, 2)), operands, directions)[1]


def reverse_over_reverse(total: Callable, operands: tuple, directions: tuple) -> tuple:
    def along(*operands: jax.Array) -> jax.Array:
        gradients = jax.grad(total, (0, 1, 2))(*operands)
        return sum(jnp.vdot(x, y) for x, y in zip(gradients, directions, strict=True))

    return jax.grad(along, (0, 1, 2))(*operands)


both_ways = pytest.mark.parametrize("way", [forward_over_reverse, reverse_over_reverse])


def hessian_times(way: Callable, **how: Any) -> tuple:
    arrays = cases.make(cases.case_of("window", "small"), jnp.float32)
    directions = cases.make(cases.case_of("window", "small"), jnp.float32, std=0.5)[:3]

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        output, sums = attention(query, key, value, with_log_sum_exp=True, **MIXED, **how)
        return jnp.sum(jnp.sin(output)) + jnp.sum(sums)

    return jax.jit(lambda *x: way(total, x, directions))(*arrays[:3])


@both_ways
def test_xla_agrees_with_the_reference(way: Callable) -> None:
    lean = hessian_times(way, implementation="xla", block_query=8, block_key=16)
    true = hessian_times(forward_over_reverse, implementation="reference")
    for actual, expected in zip(lean, true, strict=True):
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@both_ways
def test_pallas_is_refused(way: Callable) -> None:
    token = on_tpu.INTERPRET.set(True)
    try:
        with pytest.raises(NotImplementedError):
            hessian_times(way, implementation="pallas")
    finally:
        on_tpu.INTERPRET.reset(token)
