"""The linear divergence head with both vocabularies split over a mesh axis equals the whole one."""

import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxdistill.kernels import linear_divergence, on_tpu

from tests.kernels.linear_divergence_tests import KINDS

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(4, 3, 8)).astype(np.float32), RNG.normal(size=(64, 8)).astype(np.float32)
TEACHER = RNG.normal(size=(4, 3, 6)).astype(np.float32), RNG.normal(size=(64, 6)).astype(np.float32)
COTANGENT = RNG.normal(size=(4, 3)).astype(np.float32)
# Of 4 devices each has two blocks of 128 columns, of 8 one, and part of a block is past the end.
WIDE_RNG = np.random.default_rng(0)
WIDE_STUDENT = STUDENT[0], WIDE_RNG.normal(size=(600, 8)).astype(np.float32)
WIDE_TEACHER = TEACHER[0], WIDE_RNG.normal(size=(600, 6)).astype(np.float32)
OPTIONS = {"temperature": 1.3, "student_soft_cap": 5.0, "teacher_soft_cap": 4.0}


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """Interpreted as on a TPU: the plain interpreter does not run inside shard_map."""
    reads = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "nan"}
    token = on_tpu.INTERPRET.set(pltpu.InterpretParams(**reads))
    yield
    on_tpu.INTERPRET.reset(token)


def values_and_gradients(function: Callable, *arrays: np.ndarray) -> tuple:
    @jax.jit
    def run(*arrays: jax.Array) -> tuple:
        values, pull = jax.vjp(function, *arrays)
        return values, pull(COTANGENT)

    return run(*arrays)


def split(mesh_shape: dict[str, int], layout: str, **options: object) -> Callable:
    """(student, teacher) -> values: heads over "tensor", tokens over "data" where there is one."""
    sizes, names = tuple(mesh_shape.values()), tuple(mesh_shape)
    devices = jax.devices()[: int(np.prod(sizes))]
    types = (AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(sizes, names, axis_types=types, devices=devices)
    rows = PartitionSpec("data" if "data" in names else None)
    head = PartitionSpec("tensor") if layout == "vd" else PartitionSpec(None, "tensor")

    def own(*arrays: jax.Array) -> jax.Array:
        return linear_divergence(*arrays, axis_name="tensor", head_layout=layout, **options)

    specs = rows, head, rows, head
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows)


def assert_split_equals_whole(
    mesh_shape: dict[str, int],
    layout: str = "vd",
    models: tuple[np.ndarray, ...] = (*STUDENT, *TEACHER),
    **options: object,
) -> None:
    """NaN in the padding, of which there is a whole device's part where vocab_size is small."""
    models = list(models)
    vocab_size = options["vocab_size"]
    for at in (1, 3):
        models[at] = models[at].copy()
        models[at][vocab_size:] = np.nan
    chunks = {"chunk_tokens": None, "chunk_vocab": None}
    whole_options = options | chunks | {"implementation": "xla"}
    expected = values_and_gradients(
        lambda *arrays: linear_divergence(*arrays, **whole_options), *models
    )
    if layout == "dv":
        models[1], models[3] = models[1].T, models[3].T
    values, gradients = values_and_gradients(split(mesh_shape, layout, **options), *models)
    if layout == "dv":
        gradients = gradients[0], gradients[1].T, gradients[2], gradients[3].T
    np.testing.assert_allclose(values, expected[0], atol=1e-6)
    for gradient, wanted in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=2e-6)
    assert np.abs(expected[1][1]).max() > 1e-3


def by_default(*cases: tuple) -> list:
    """All kinds with two implementations on 4 and 8 devices; what is not among these is slow."""
    every = itertools.product(KINDS, (4, 8), ("xla", "reference"))
    return [pytest.param(*x, marks=() if x in cases else pytest.mark.slow) for x in every]


@pytest.mark.parametrize(
    ("kind", "devices", "implementation"),
    by_default(
        *((kind, 8, "xla") for kind in KINDS),
        ("reverse_kl", 4, "xla"),
        ("reverse_kl", 4, "reference"),
        ("jensen_shannon", 8, "reference"),
    ),
)
def test_split_equals_whole(kind: str, devices: int, implementation: str) -> None:
    """61 columns: the last device has padding; chunks of 5 columns divide no device's part."""
    options = OPTIONS | {"kind": kind, "share": KINDS[kind], "implementation": implementation}
    chunks = {"chunk_tokens": 5, "chunk_vocab": 5}
    assert_split_equals_whole({"tensor": devices}, vocab_size=61, **chunks, **options)


@pytest.mark.parametrize(
    ("layout", "kind", "implementation"),
    [
        ("vd", "symmetric_kl", "xla"),
        ("dv", "jensen_shannon", "xla"),
        ("dv", "symmetric_kl", "reference"),
    ],
)
@pytest.mark.parametrize("mesh_shape", [{"tensor": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_devices_without_a_column_and_tokens_split_too(
    mesh_shape: dict[str, int], layout: str, kind: str, implementation: str
) -> None:
    """37 columns: three devices of eight, one of four, have only padding."""
    options = OPTIONS | {"kind": kind, "share": KINDS[kind], "implementation": implementation}
    assert_split_equals_whole(mesh_shape, layout, vocab_size=37, **options)


@pytest.mark.parametrize(
    ("kind", "devices", "implementation"),
    by_default(
        ("forward_kl", 4, "xla"), ("jensen_shannon", 4, "xla"), ("skew_reverse_kl", 4, "reference")
    ),
)
def test_both_models_trained(kind: str, devices: int, implementation: str) -> None:
    options = OPTIONS | {"kind": kind, "share": KINDS[kind], "implementation": implementation}
    assert_split_equals_whole({"tensor": devices}, vocab_size=61, teacher_gradient=True, **options)


PALLAS = OPTIONS | {"implementation": "pallas", "chunk_tokens": 16, "chunk_vocab": 128}
WIDE = {"models": (*WIDE_STUDENT, *WIDE_TEACHER)}


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        pytest.param(
            *case,
            marks=()
            if case in (("symmetric_kl", 4), ("jensen_shannon", 4), ("reverse_kl", 8))
            else pytest.mark.slow,
        )
        for case in itertools.product(KINDS, (4, 8))
    ],
)
def test_kernels_split_equal_whole(kind: str, devices: int) -> None:
    """440 of 600 columns: one device has some that do not count, another or two none that do."""
    options = PALLAS | WIDE | {"kind": kind, "share": KINDS[kind]}
    assert_split_equals_whole({"tensor": devices}, vocab_size=440, **options)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("forward_kl", "dv"), pytest.param("skew_reverse_kl", "vd", marks=pytest.mark.slow)],
)
def test_kernels_with_tokens_split_and_both_models_trained(kind: str, layout: str) -> None:
    options = PALLAS | WIDE | {"kind": kind, "share": KINDS[kind], "teacher_gradient": True}
    mesh_shape = {"data": 2, "tensor": 4}
    assert_split_equals_whole(mesh_shape, layout, vocab_size=440, **options)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_small_divergence_keeps_its_digits(implementation: str) -> None:
    """Logits near 100 and a divergence near 1e-4: sums of devices are of centred terms."""
    student = STUDENT[0] + 12, np.abs(STUDENT[1]) * 0.1 + 1
    noise = np.random.default_rng(5).normal(size=(64, 8)).astype(np.float32)
    teacher = student[0], student[1] + noise * 1e-3
    whole = linear_divergence(*student, *teacher, implementation="xla")
    function = jax.jit(split({"tensor": 8}, "vd", implementation=implementation))
    assert 2e-5 < whole.min() < whole.max() < 1e-3
    np.testing.assert_allclose(function(*student, *teacher), whole, atol=2e-6)


def test_says_what_is_wrong() -> None:
    models = *STUDENT, *TEACHER
    message = r"vocab_size must lie in \[1, 64\], the columns of the heads over"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(split({"tensor": 4}, "vd", vocab_size=65), *models)
    with pytest.raises(ValueError, match="axis_name must be an axis over which shard_map splits"):
        linear_divergence(*models, axis_name="tensor")
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    everything = jax.shard_map(
        lambda *arrays: linear_divergence(*arrays, axis_name="tensor"),
        mesh=mesh,
        in_specs=PartitionSpec("tensor"),
        out_specs=PartitionSpec("tensor"),
    )
    with pytest.raises(ValueError, match="student_hidden must be the same on every device of axis"):
        jax.eval_shape(everything, *models)
