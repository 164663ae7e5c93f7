"""The TPU kernels of attention under the real TPU compiler, at the shapes of models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxdistill.kernels import attention, attention_decode, attention_sharded

from tests.kernels.ahead_of_time import TOPOLOGIES, compile_for

# name -> (query heads, key heads, width of a head, length, arguments of attention)
MODELS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "llama3_8b": (32, 8, 128, 4096, {}),
    "llama3_8b_long": (32, 8, 128, 8192, {}),
    "qwen3_1.7b": (16, 8, 128, 4096, {}),
    "gemma_2b": (8, 1, 256, 4096, {}),
    "gemma2_2b": (8, 4, 256, 8192, {"window": 4096, "soft_cap": 50.0}),
    "smollm2_135m": (9, 3, 64, 2000, {}),
}


def lower_gradients(
    devices: list[jax.Device], model: str, dtype: str, packed: bool = False
) -> jax.stages.Lowered:
    """Forward and backward; `packed` adds segment ids and lengths."""
    heads, groups, width, length, options = MODELS[model]
    place = SingleDeviceSharding(devices[0])

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, places: dict) -> tuple:
        def total(*operands: jax.Array) -> jax.Array:
            output, sums = attention(
                *operands, implementation="pallas", with_log_sum_exp=True, **options, **places
            )
            return jnp.sum(jnp.square(output.astype(jnp.float32))) + jnp.sum(sums)

        return jax.value_and_grad(total, (0, 1, 2))(query, key, value)

    key = array(2, length, groups, width)
    places = {}
    if packed:
        places = {
            "segment_ids": array(2, length, dtype="int32"),
            "lengths": array(2, dtype="int32"),
        }
    return jax.jit(run).lower(array(2, length, heads, width), key, key, places)


def lower_decode(devices: list[jax.Device], model: str) -> jax.stages.Lowered:
    heads, groups, width, length, options = MODELS[model]
    place = SingleDeviceSharding(devices[0])

    def run(*arguments: jax.Array) -> jax.Array:
        return attention_decode(*arguments, implementation="pallas", **options)

    query, cache = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        for shape in ((8, heads, width), (8, length, groups, width))
    )
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=place)
    return jax.jit(run).lower(query, cache, cache, lengths)


def lower_sharded(devices: list[jax.Device], model: str, ring: bool) -> jax.stages.Lowered:
    """Heads over one axis of the mesh, rows or the sequence over the other, and the gradient."""
    heads, groups, width, length, options = MODELS[model]
    names = ("sequence" if ring else "fsdp", "tensor")
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), names, (AxisType.Auto,) * 2)
    axes = {"sequence": "sequence"} if ring else {"rows": "fsdp"}
    spec = PartitionSpec(axes.get("rows"), axes.get("sequence"), "tensor", None)

    def total(*operands: jax.Array) -> jax.Array:
        output = attention_sharded(
            *operands, mesh=mesh, heads="tensor", implementation="pallas", **axes, **options
        )
        return jnp.sum(jnp.square(output.astype(jnp.float32)))

    query, key = (
        jax.ShapeDtypeStruct(
            (2, length, x, width), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        for x in (heads, groups)
    )
    return jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(query, key, key)


def bytes_of_operands(model: str, itemsize: int) -> int:
    heads, groups, width, length, _ = MODELS[model]
    return 2 * length * (heads + 2 * groups) * max(width, 128) * itemsize


def check(generation: str, model: str, dtype: str, packed: bool) -> None:
    """It compiles, so it fits VMEM; and what it takes of HBM grows with the length alone."""
    found = compile_for(
        generation, __name__, "lower_gradients", model=model, dtype=dtype, packed=packed
    )
    print(f"{generation} {model} {dtype} packed={packed}: {found.temporary / 2**20:.1f} MiB")
    assert found.temporary <= 5 * bytes_of_operands(model, jnp.dtype(dtype).itemsize)
    heads, _, _, length, _ = MODELS[model]
    scores = 2 * heads * length**2 * jnp.dtype(dtype).itemsize
    assert found.temporary < scores


def test_a_packed_step_compiles_for_v5e() -> None:
    check("v5e", "smollm2_135m", "bfloat16", packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_gradients_compile(generation: str, model: str) -> None:
    check(generation, model, "bfloat16", packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama3_8b", "gemma_2b", "smollm2_135m"])
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_gradients_compile(generation: str, model: str, dtype: str) -> None:
    check(generation, model, dtype, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama3_8b_long", "gemma2_2b", "smollm2_135m"])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_decode_compiles(generation: str, model: str) -> None:
    compile_for(generation, __name__, "lower_decode", model=model)


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True], ids=["rows", "ring"])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_a_sharded_step_compiles(generation: str, ring: bool) -> None:
    found = compile_for(generation, __name__, "lower_sharded", model="llama3_8b", ring=ring)
    assert found.temporary <= 10 * bytes_of_operands("llama3_8b", 2) / 4
