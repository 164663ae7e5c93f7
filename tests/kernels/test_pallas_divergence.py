"""The TPU kernels of the linear divergence head: interpreted here, compiled for TPUs ahead of time.

Blocks of 16 tokens and 128 columns, the smallest the kernels take, divide none of these shapes.
"""

import functools
import re
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxdistill.kernels import ImplementationError, blocks, linear_divergence

from tests.kernels import ahead_of_time
from tests.kernels.linear_divergence_tests import (
    KINDS,
    WIDE,
    LinearDivergenceTests,
    check_against_oracle,
    compiled,
    each_kind,
)

BLOCKS = {"chunk_tokens": 16, "chunk_vocab": 128, "implementation": "pallas"}
NAN_MEMORY = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


@pytest.mark.usefixtures("interpreted")
class TestPallas(LinearDivergenceTests):
    """What takes longest to compile is slow."""

    implementation = "pallas"
    chunks: ClassVar[dict[str, int]] = {"chunk_tokens": 16, "chunk_vocab": 128}
    vocabularies = (256, 257, 263)
    models = WIDE
    few = ()

    def by_default(self, kind: str, vocab_size: int, place: str, dtype: str) -> bool:
        if vocab_size != 263:
            return False
        return kind == "reverse_kl" or (place, dtype) == ("jit", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", [NAN_MEMORY], indirect=True, ids=["nan_and_races"])
@pytest.mark.usefixtures("interpreted", "no_races")
class TestPallasNanMemory(TestPallas):
    """In the simulation of a TPU's memories, where nothing is zero before it is written."""

    vocabularies = (263,)  # seven kinds in every place and type take minutes already

    @pytest.mark.xfail(
        raises=ValueError, strict=True, reason="jax's simulation of a TPU takes no batched grid"
    )
    def test_under_vmap(self) -> None:
        super().test_under_vmap()


def prefer_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the width, which only large models need, into as many parts as there are: two."""
    monkeypatch.setattr(blocks, "seconds_of", lambda _sweep, tile, _sizes: -tile.parts)


@pytest.mark.parametrize("layout", ["vd", pytest.param("dv", marks=pytest.mark.slow)])
@each_kind
@pytest.mark.usefixtures("interpreted")
def test_widths_in_two_parts(kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_parts(monkeypatch)
    check_against_oracle(kind, WIDE, layout, **BLOCKS)


@pytest.mark.parametrize(
    ("kind", "layout", "parts"),
    [
        ("symmetric_kl", "vd", 2),
        ("jensen_shannon", "dv", 1),
        pytest.param("symmetric_kl", "dv", 2, marks=pytest.mark.slow),
        pytest.param("jensen_shannon", "vd", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("interpreted", [NAN_MEMORY], indirect=True, ids=["nan_and_races"])
@pytest.mark.usefixtures("interpreted", "no_races")
def test_nothing_is_read_before_it_is_written(
    kind: str, layout: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the padding, in fresh VMEM and past every edge; no block is raced for."""
    if parts == 2:
        prefer_parts(monkeypatch)
    heads = WIDE.student[1].copy(), WIDE.teacher[1].copy()
    for head in heads:
        head[WIDE.columns :] = np.nan
    poisoned = WIDE._replace(
        student=(WIDE.student[0], heads[0]), teacher=(WIDE.teacher[0], heads[1])
    )
    check_against_oracle(kind, poisoned, layout, **BLOCKS)


@pytest.mark.usefixtures("interpreted")
def test_both_models_trained_as_by_the_reference() -> None:
    """Of large widths and heads of one size."""
    arrays = WIDE.student[0], WIDE.student[1][:300], *WIDE.teacher
    options = {"teacher_gradient": True}
    found = compiled("jensen_shannon", WIDE, **BLOCKS, **options)(*arrays)
    reference = compiled("jensen_shannon", WIDE, implementation="reference", **options)
    expected = reference(*arrays)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        scale = np.abs(wanted).max()
        assert scale > 0
        np.testing.assert_allclose(gradient, wanted, atol=1e-4 * scale)


def test_refused_where_there_is_no_tpu() -> None:
    message = "implementation 'pallas' is lowered for a TPU, but this program is lowered for cpu"
    with pytest.raises(ImplementationError, match=message):
        compiled("forward_kl", WIDE, **BLOCKS)(*WIDE.student, *WIDE.teacher)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 8}, "chunk_tokens must be a multiple of 16 for implementation 'pallas'"),
        ({"chunk_vocab": 64}, "chunk_vocab must be a multiple of 128 for implementation 'pallas'"),
        ({"dtype": np.float16}, "takes float32 and bfloat16, but float16 was given: choose 'xla'"),
        ({"chunk_vocab": 2**15}, "cannot fit widths 256 and 512 in blocks of 16 tokens and 32768"),
        ({"width": 2**17}, "cannot fit widths 131072 and 512 in blocks of 16 tokens and 128 col"),
    ],
)
def test_says_what_it_cannot_serve(change: dict, message: str) -> None:
    options = BLOCKS | change
    dtype, width = options.pop("dtype", np.float32), options.pop("width", 256)
    student = jax.ShapeDtypeStruct((4, width), dtype), jax.ShapeDtypeStruct((300, width), dtype)
    teacher = jax.ShapeDtypeStruct((4, 512), dtype), jax.ShapeDtypeStruct((300, 512), dtype)
    function = functools.partial(linear_divergence, **options)
    with pytest.raises(ImplementationError, match=re.escape(message)):
        jax.eval_shape(function, *student, *teacher)


# Tokens, widths of student and teacher, vocabulary.
MODELS = {
    "qwen3": (8192, 2048, 4096, 151_936),
    "smollm2": (4096, 576, 576, 49_152),
}


def lower(
    devices: list, kind: str, model: str, dtype: str, layout: str, implementation: str
) -> jax.stages.Lowered:
    """Value and gradients of the student for the first of these devices."""
    tokens, width, teacher_width, vocab_size = MODELS[model]

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        place = SingleDeviceSharding(devices[0])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    def pair(width: int) -> tuple:
        head = (vocab_size, width) if layout == "vd" else (width, vocab_size)
        return array(tokens, width), array(*head)

    def mean(*arrays: jax.Array) -> jax.Array:
        options = {"share": KINDS[kind], "temperature": 2.0, "head_layout": layout}
        return linear_divergence(
            *arrays, kind=kind, implementation=implementation, **options
        ).mean()

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    return step.lower(*pair(width), *pair(teacher_width))


def lower_sharded(devices: list, axis: str, model: str) -> jax.stages.Lowered:
    """A step on four devices, which split the tokens ("data") or both vocabularies ("tensor")."""
    # Of v4 a device is a core, and make_mesh would place whole chips.
    mesh = Mesh(np.asarray(devices[:4]), (axis,), axis_types=(AxisType.Auto,))
    tokens, *widths, vocab_size = MODELS[model]
    split, whole = PartitionSpec(axis), PartitionSpec()
    specs = ((split, whole) if axis == "data" else (whole, split)) * 2

    def mean(*arrays: jax.Array) -> jax.Array:
        if axis == "data":
            options = {"kind": "reverse_kl"}
        else:
            options = {"kind": "jensen_shannon", "share": 0.3, "axis_name": axis}
        value = linear_divergence(*arrays, implementation="pallas", **options).mean()
        return jax.lax.pmean(value, axis) if axis == "data" else value

    own = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=whole)
    tokens *= 4 if axis == "data" else 1
    shapes = [shape for width in widths for shape in ((tokens, width), (vocab_size, width))]
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(jax.value_and_grad(own, argnums=(0, 1))).lower(*arrays)


def temporary_sharded(generation: str, **arguments: str) -> int:
    compiled = ahead_of_time.compile_for(generation, __name__, "lower_sharded", **arguments)
    return compiled.temporary


@pytest.mark.slow
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
def test_compiles_inside_a_sharded_step(generation: str) -> None:
    """A tenth of one device's share of one model's logits, beside the head's gradient."""
    found = temporary_sharded(generation, axis="data", model="smollm2")
    gradient = 2 * 2 * 49_152 * 576  # before and after its sum over devices
    print(f"{generation} sharded: {found / 2**20:.2f} MiB a device")
    assert found <= 4 * 4096 * 49_152 / 10 + gradient


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "qwen3"])
@pytest.mark.parametrize("generation", ["v5e", "v5p"])
def test_compiles_with_both_vocabularies_split(generation: str, model: str) -> None:
    """A tenth of one device's share of one model's logits, beside the hidden states' gradient."""
    tokens, width, _, vocab_size = MODELS[model]
    found = temporary_sharded(generation, axis="tensor", model=model)
    gradient = 2 * 2 * tokens * width  # before and after its sum over devices
    print(f"{generation} {model} split: {found / 2**20:.2f} MiB a device")
    assert found <= 4 * tokens * vocab_size / 4 / 10 + gradient


def temporary(generation: str, **arguments: str) -> int:
    arguments = {"dtype": "bfloat16", "layout": "vd", "implementation": "pallas"} | arguments
    compiled = ahead_of_time.compile_for(generation, __name__, "lower", **arguments)
    return compiled.temporary


def test_compiles_for_a_tpu() -> None:
    """Qwen3-1.7B taught by Qwen3-8B: the logits of both would take 9.3 GiB."""
    bytes_of_logits = 4 * 8192 * 151_936
    assert temporary("v5e", kind="forward_kl", model="qwen3") < bytes_of_logits / 100


def ahead_of_time_cases() -> Iterator[tuple[str, ...]]:
    for generation in ahead_of_time.TOPOLOGIES:
        for kind in KINDS:
            yield generation, kind, "qwen3", "bfloat16", "vd"
        yield generation, "reverse_kl", "smollm2", "bfloat16", "vd"
        yield generation, "jensen_shannon", "smollm2", "bfloat16", "dv"
        yield generation, "symmetric_kl", "smollm2", "float32", "vd"
        yield generation, "total_variation", "qwen3", "float32", "dv"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "kind", "model", "dtype", "layout"), list(ahead_of_time_cases())
)
def test_compiles_for_every_tpu(
    generation: str, kind: str, model: str, dtype: str, layout: str
) -> None:
    """In a tenth of one model's logits, so no head is copied."""
    tokens, *_, vocab_size = MODELS[model]
    found = temporary(generation, kind=kind, model=model, dtype=dtype, layout=layout)
    print(f"{generation} {kind} {model} {dtype} {layout}: {found / 2**20:.2f} MiB")
    assert found <= 4 * tokens * vocab_size / 10


@pytest.mark.slow
def test_compiles_for_a_tpu_it_was_not_told_of() -> None:
    """In the 16 MiB of VMEM that every core gives unasked."""
    options = {"model": "qwen3", "dtype": "bfloat16", "layout": "vd", "implementation": "pallas"}
    compiled = ahead_of_time.compile_for(
        "v5e", __name__, "lower", known=False, kind="jensen_shannon", **options
    )
    assert compiled.temporary <= 4 * 8192 * 151_936 / 10


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_temporaries_are_a_tenth_of_full_logits_on_v5e(dtype: str, layout: str) -> None:
    """Of heads [V, 576] too, which XLA lays out with rows along V: the kernel reads them so."""
    options = {"kind": "forward_kl", "model": "smollm2", "dtype": dtype, "layout": layout}
    full = temporary("v5e", implementation="reference", **options)
    assert temporary("v5e", **options) <= full / 10
