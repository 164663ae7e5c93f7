"""The TPU kernels of the linear cross-entropy head, compiled by the TPU's own compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxdistill.kernels import linear_cross_entropy

from tests.kernels import ahead_of_time

# Tokens, width, vocabulary.
MODELS = {
    "SmolLM2-135M": (4096, 576, 49152),
    "Qwen3-1.7B": (8192, 2048, 151936),
    "Llama-3-8B": (8192, 4096, 128256),
    "Llama-3-70B": (8192, 8192, 128256),
    "twice as wide": (8192, 16384, 128256),
}


def loss(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, axis_name: str | None, **options: object
) -> jax.Array:
    """Cross-entropy with a z-loss, per token: gradients into all that training uses."""
    out = linear_cross_entropy(
        hidden, head, labels, implementation="pallas", axis_name=axis_name, **options
    )
    total = 1e-4 * out.log_sum_exp**2 - out.log_prob.reshape(*hidden.shape[:-1], -1).sum(-1)
    return total if out.rest is None else total + out.rest


def lower(
    devices: list,
    tokens: int,
    width: int,
    vocab: int,
    dtype: str = "bfloat16",
    mesh: tuple[int, int] | None = None,
    wanted: tuple[int, ...] = (0, 1),
    num_labels: int | None = None,
    **options: object,
) -> jax.stages.Lowered:
    """Value and gradients on one device, or on a mesh (data, tensor) of all."""
    function, places = loss, [SingleDeviceSharding(devices[0])] * 3
    axis_name = None
    if mesh is not None:
        axes = Mesh(np.array(devices).reshape(mesh), ("data", "tensor"), (AxisType.Auto,) * 2)
        rows, axis_name = PartitionSpec("data"), "tensor"
        specs = rows, PartitionSpec("tensor"), rows
        places = [NamedSharding(axes, spec) for spec in specs]

        def function(*arrays: object, **options: object) -> jax.Array:
            inside = jax.shard_map(
                lambda *x: loss(*x, **options), mesh=axes, in_specs=specs, out_specs=rows
            )
            return inside(*arrays)

    def mean(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        return function(hidden, head, labels, axis_name=axis_name, **options).mean()

    head = (width, vocab) if options.get("head_layout") == "dv" else (vocab, width)
    shapes = (
        ((tokens, width), dtype),
        (head, dtype),
        ((tokens, num_labels)[: 1 if num_labels is None else 2], "int32"),
    )
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
        for (shape, dtype), place in zip(shapes, places, strict=True)
    ]
    return jax.jit(jax.value_and_grad(mean, argnums=tuple(wanted))).lower(*arrays)


def compile_for(generation: str, model: str, **options: object) -> int:
    """Temporaries in bytes a chip."""
    tokens, width, vocab = MODELS[model]
    shape = {"tokens": tokens, "width": width, "vocab": vocab}
    return ahead_of_time.compile_for(generation, __name__, "lower", **shape, **options).temporary


@pytest.mark.parametrize(
    ("generation", "model"),
    [
        pytest.param(
            generation,
            model,
            marks=() if (generation, model) == ("v5e", "SmolLM2-135M") else pytest.mark.slow,
        )
        for generation in ahead_of_time.TOPOLOGIES
        for model in MODELS
    ],
)
def test_compiles_and_needs_a_tenth_of_the_logits(generation: str, model: str) -> None:
    """Of the float32 logits alone; full logits hold several of that size."""
    tokens, _, vocab = MODELS[model]
    temporary = compile_for(generation, model)
    assert temporary <= 4 * tokens * vocab / 10, f"{temporary / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v4", "v5e"])
def test_compiles_for_a_tpu_it_was_not_told_of(generation: str) -> None:
    """In the 16 MiB of VMEM that every core gives unasked."""
    tokens, _, vocab = MODELS["Qwen3-1.7B"]
    assert compile_for(generation, "Qwen3-1.7B", known=False) <= 4 * tokens * vocab / 10


@pytest.mark.slow
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
def test_compiles_in_a_sharded_step(generation: str) -> None:
    """Tokens over two devices, the vocabulary over the others: two, or four of two-core chips.

    The head's gradient is summed over the first two.
    """
    tokens, width, vocab = MODELS["Qwen3-1.7B"]
    temporary = compile_for(generation, "Qwen3-1.7B", mesh=(2, -1))
    logits, head = 4 * tokens * vocab / 4, 2 * width * vocab / 2
    assert temporary <= logits / 10 + head, f"{temporary / 2**20:.0f} MiB"


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_operand_costs_no_kernel(frozen: str) -> None:
    """Its gradient would be a temporary; without it there is none of that size."""
    tokens, width, vocab = MODELS["Qwen3-1.7B"]
    size = 2 * width * (vocab if frozen == "head" else tokens)
    wanted = (0,) if frozen == "head" else (1,)
    assert compile_for("v5e", "Qwen3-1.7B", wanted=wanted) < size / 10


@pytest.mark.slow
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"head_layout": "dv"},
        {"soft_cap": 30.0, "with_entropy": True, "vocab_size": 151000},
        {"num_labels": 64, "with_rest": True},
        {"num_labels": 200, "with_rest": True, "with_entropy": True, "dtype": "float32"},
    ],
    ids=["float32", "dv", "all", "64 labels", "200 labels"],
)
def test_options_compile(options: dict, generation: str) -> None:
    tokens, _, vocab = MODELS["Qwen3-1.7B"]
    temporary = compile_for(generation, "Qwen3-1.7B", **options)
    assert temporary <= 4 * tokens * vocab / 10, f"{temporary / 2**20:.0f} MiB"
