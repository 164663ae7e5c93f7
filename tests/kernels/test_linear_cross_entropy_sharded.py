"""A vocabulary split over devices gives what one device gives, and the same gradients."""

import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxdistill.kernels import linear_cross_entropy, on_tpu

RNG = np.random.default_rng(0)
SHAPE, PADDED = (4, 6), 264
HIDDEN = RNG.normal(size=(*SHAPE, 8)).astype(np.float32)
HEAD = RNG.normal(size=(PADDED, 8)).astype(np.float32)
LABELS = RNG.integers(0, PADDED, SHAPE)
COTANGENTS = tuple(RNG.normal(size=SHAPE).astype(np.float32) for _ in range(3))
OPTIONS = {"temperature": 1.3, "soft_cap": 5.0, "with_entropy": True}
CHUNKS = {
    "pallas": {"chunk_tokens": 16, "chunk_vocab": 128},
    "xla": {"chunk_tokens": 5, "chunk_vocab": 16},
    "reference": {},
}
DATA, TENSOR = PartitionSpec("data"), PartitionSpec("tensor")
each_implementation = pytest.mark.parametrize("implementation", CHUNKS)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """Interpreted as on a TPU: the plain interpreter does not run inside shard_map."""
    reads = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "nan"}
    token = on_tpu.INTERPRET.set(pltpu.InterpretParams(**reads))
    yield
    on_tpu.INTERPRET.reset(token)


def mesh_of(data: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), ("data", "tensor"), (AxisType.Auto,) * 2, devices=devices)


def run(implementation: str, axis_name: str | None, vocab_size: int, *arrays: jax.Array) -> tuple:
    """The three outputs and the gradients of hidden and head."""
    hidden, head, labels, *cotangents = arrays

    def function(hidden: jax.Array, head: jax.Array) -> tuple:
        options = OPTIONS | {"vocab_size": vocab_size, "axis_name": axis_name}
        if axis_name is not None:
            options |= CHUNKS[implementation]
        out = linear_cross_entropy(hidden, head, labels, implementation=implementation, **options)
        return out.log_prob, out.log_sum_exp, out.entropy

    outputs, pull = jax.vjp(function, hidden, head)
    return outputs, pull(tuple(cotangents))


def split(implementation: str, vocab_size: int, mesh: Mesh) -> Callable:
    function = functools.partial(run, implementation, "tensor", vocab_size)
    in_specs = (DATA, TENSOR, DATA, DATA, DATA, DATA)
    specs = DATA, (DATA, TENSOR)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=specs))


@functools.cache
def whole(vocab_size: int) -> tuple:
    labels = LABELS % vocab_size
    function = jax.jit(functools.partial(run, "reference", None, vocab_size))
    return function(HIDDEN, HEAD, labels, *COTANGENTS)


@pytest.mark.parametrize(
    ("data", "tensor", "vocab_size"),
    [(1, 4, 264), (2, 4, 130), pytest.param(1, 8, 130, marks=pytest.mark.slow), (1, 8, 264)],
)
@each_implementation
def test_split_equals_whole(implementation: str, data: int, tensor: int, vocab_size: int) -> None:
    """130 of 264 columns: one device has some that do not count, others have none that do."""
    head = HEAD.copy()
    head[vocab_size:] = np.nan
    labels = LABELS % vocab_size
    function = split(implementation, vocab_size, mesh_of(data, tensor))
    found = function(HIDDEN, head, labels, *COTANGENTS)
    for actual, expected in zip(
        jax.tree.leaves(found), jax.tree.leaves(whole(vocab_size)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=4e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_label_out_of_range_is_nan_on_every_device(implementation: str) -> None:
    labels = LABELS % 130
    labels[0, :4] = [-1, 130, 263, 1000]
    function = split(implementation, 130, mesh_of(1, 4))
    (log_prob, log_sum_exp, entropy), _ = function(HIDDEN, HEAD, labels, *COTANGENTS)
    expected = np.zeros(SHAPE, bool)
    expected[0, :4] = True
    np.testing.assert_array_equal(np.isnan(log_prob), expected)
    assert np.isfinite(log_sum_exp).all()
    assert np.isfinite(entropy).all()


@pytest.mark.parametrize("std", [0.3, 30.0])
def test_large_logits_and_small(std: float) -> None:
    """One device has nearly all of the probability, or each its share."""
    hidden = HIDDEN * np.float32(std)
    function = split("xla", PADDED, mesh_of(1, 4))
    found = function(hidden, HEAD, LABELS, *COTANGENTS)
    expected = jax.jit(functools.partial(run, "reference", None, PADDED))(
        hidden, HEAD, LABELS, *COTANGENTS
    )
    for actual, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, true, atol=2e-6 * (1 + 5 * std))


def test_gradient_through_shard_map() -> None:
    """The gradient taken outside shard_map, as a training step takes it."""

    def mean(hidden: jax.Array, head: jax.Array, axis_name: str | None) -> jax.Array:
        labels = jnp.zeros(hidden.shape[:-1], jnp.int32)
        return linear_cross_entropy(hidden, head, labels, axis_name=axis_name).log_prob

    mesh = mesh_of(2, 4)
    inside = jax.shard_map(
        functools.partial(mean, axis_name="tensor"),
        mesh=mesh,
        in_specs=(DATA, TENSOR),
        out_specs=DATA,
    )
    split, whole = (
        jax.jit(jax.grad(lambda *x, f=f: f(*x).mean(), argnums=(0, 1)))(HIDDEN, HEAD)
        for f in (inside, functools.partial(mean, axis_name=None))
    )
    for actual, expected in zip(split, whole, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("head_specs", "options", "message"),
    [
        (PartitionSpec(), {}, "axis_name must be an axis over which shard_map splits head, with"),
        (TENSOR, {"axis_name": "model"}, "but it is 'model' and head is split over ['tensor']"),
        (TENSOR, {"vocab_size": 265}, "vocab_size must lie in [1, 264], the columns of head over"),
    ],
)
def test_says_what_is_wrong(head_specs: PartitionSpec, options: dict, message: str) -> None:
    def function(hidden: jax.Array, head: jax.Array) -> jax.Array:
        labels = jnp.zeros(hidden.shape[:-1], jnp.int32)
        arguments = {"axis_name": "tensor"} | options
        return linear_cross_entropy(hidden, head, labels, **arguments).log_prob

    split = jax.shard_map(function, mesh=mesh_of(1, 4), in_specs=(DATA, head_specs), out_specs=DATA)
    with pytest.raises(ValueError, match=re.escape(message)):
        split(HIDDEN, HEAD)


def test_outside_shard_map_there_is_no_axis() -> None:
    with pytest.raises(ValueError, match="'tensor' and head is split over none"):
        linear_cross_entropy(HIDDEN, HEAD, LABELS, axis_name="tensor")
