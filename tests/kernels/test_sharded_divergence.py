"""The linear divergence head with both vocabularies split over a mesh axis equals the whole one."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jaxdistill.kernels import linear_divergence

from tests.kernels.test_linear_divergence import KINDS

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(4, 3, 8)).astype(np.float32), RNG.normal(size=(64, 8)).astype(np.float32)
TEACHER = RNG.normal(size=(4, 3, 6)).astype(np.float32), RNG.normal(size=(64, 6)).astype(np.float32)
COTANGENT = RNG.normal(size=(4, 3)).astype(np.float32)
OPTIONS = {"temperature": 1.3, "student_soft_cap": 5.0, "teacher_soft_cap": 4.0}


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
    mesh_shape: dict[str, int], layout: str = "vd", **options: object
) -> None:
    """NaN in the padding, of which there is a whole device's part where vocab_size is small."""
    models = [*STUDENT, *TEACHER]
    vocab_size = options["vocab_size"]
    for at in (1, 3):
        models[at] = models[at].copy()
        models[at][vocab_size:] = np.nan
    whole_options = options | {"implementation": "xla"}
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
    assert np.abs(expected[1][1]).max() > 1e-2


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


def test_small_divergence_keeps_its_digits() -> None:
    """Logits near 100 and a divergence near 1e-4: sums of devices are of centred terms."""
    student = STUDENT[0] + 12, np.abs(STUDENT[1]) * 0.1 + 1
    teacher = student[0], student[1] + RNG.normal(size=(64, 8)).astype(np.float32) * 2e-3
    whole = linear_divergence(*student, *teacher, implementation="xla")
    function = jax.jit(split({"tensor": 8}, "vd", implementation="xla"))
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
