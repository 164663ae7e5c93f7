"""Attention over four devices against float64: rows and heads apart, and sequences in a ring."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jaxdistill.kernels import attention_sharded, on_tpu

from tests.kernels import attention_cases as cases

CASE = cases.Case(4, 2, 48, 48, {})
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 3, (cases.ROWS, 48)))
LENGTHS = np.array([48, 30, 0, 5])
XLA = {"implementation": "xla", "block_query": 8, "block_key": 8}

WHAT: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False, "lengths": LENGTHS},
    "everything": {"segment_ids": SEGMENTS, "lengths": LENGTHS, "window": 17, "soft_cap": 3.0},
}


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    sizes = tuple(axes.values())
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple(axes), (AxisType.Auto,) * len(sizes), devices=devices)


def check(mesh: jax.sharding.Mesh, what: str, how: dict[str, Any], **axes: Any) -> None:
    arrays = cases.make(CASE, jnp.float32)
    fixed, by_row = cases.split(WHAT[what])

    @jax.jit
    def run(arrays: cases.Arrays, by_row: dict) -> tuple:
        def function(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
            return attention_sharded(
                *operands, mesh=mesh, with_log_sum_exp=True, **axes, **fixed, **how, **by_row
            )

        results, pull = jax.vjp(function, *arrays[:3])
        return *results, *pull((arrays.to_output, arrays.to_sum))

    cases.assert_close(run(arrays, by_row), cases.oracle(arrays, **fixed, **by_row), jnp.float32)


@pytest.mark.parametrize("what", WHAT)
def test_rows_and_heads(what: str) -> None:
    check(mesh_of(fsdp=2, tensor=2), what, XLA, rows="fsdp", heads="tensor")


@pytest.mark.parametrize("what", WHAT)
def test_ring(what: str) -> None:
    """Parts of 12 tokens; a row of length 0 and one that ends in the first part are among them."""
    check(mesh_of(sequence=4), what, XLA, sequence="sequence")


def test_ring_with_rows_and_heads() -> None:
    mesh = mesh_of(fsdp=2, sequence=2, tensor=2)
    axes = {"rows": ("fsdp",), "sequence": "sequence", "heads": "tensor"}
    check(mesh, "everything", {"implementation": "reference"}, **axes)


def test_ring_of_kernels() -> None:
    token = on_tpu.INTERPRET.set(True)
    check(mesh_of(sequence=2), "everything", {"implementation": "pallas"}, sequence="sequence")
    on_tpu.INTERPRET.reset(token)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"rows": "eight"},
            "query's rows must be a multiple of the 8 devices of axis 'eight', but",
        ),
        ({"heads": "eight"}, "query's heads must be a multiple of the 8 devices of axis 'eight'"),
        ({"heads": "four"}, "key's heads must be a multiple of the 4 devices of axis 'four', but"),
    ],
)
def test_what_does_not_divide_is_refused(axes: dict[str, str], message: str) -> None:
    (name,) = axes.values()
    query, key, value, *_ = cases.make(CASE, jnp.float32)
    mesh = mesh_of(**{name: {"four": 4, "eight": 8}[name]})
    with pytest.raises(ValueError, match=message):
        attention_sharded(query, key, value, mesh=mesh, **axes)
