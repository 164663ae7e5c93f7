"""The TPU kernels of the linear cross-entropy head, interpreted; compiled in `.._compiled.py`."""

import functools
import logging
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import ImplementationError, blocks, dispatch, linear_cross_entropy

from tests.kernels import oracle
from tests.kernels.linear_cross_entropy_tests import (
    HEAD,
    HIDDEN,
    LinearCrossEntropyTests,
    assert_equals_oracle,
    compiled,
)

CHUNKS = {"chunk_tokens": 16, "chunk_vocab": 128, "implementation": "pallas"}
MEMORY = {
    "uninitialized_memory": "nan",
    "out_of_bounds_reads": "uninitialized",
    "detect_races": True,
}
NAN_MEMORY = pltpu.InterpretParams(**MEMORY)
no_batches = pytest.mark.xfail(
    raises=ValueError, strict=True, reason="jax's simulation of a TPU takes no batched grid"
)
TWO_CORES = pltpu.InterpretParams(**MEMORY, num_cores_or_threads=2, random_seed=0)


@pytest.mark.usefixtures("interpreted")
class TestPallas(LinearCrossEntropyTests):
    """Aligned, V + 1, prime: in blocks of 128 the last one is full, has 1 column, has 7."""

    implementation = "pallas"
    chunks: ClassVar[dict[str, int]] = {"chunk_tokens": 16, "chunk_vocab": 128}
    vocabularies = (256, 257, 263)
    products = 5  # logits three times, both gradients

    def by_default(self, vocab_size: int, place: str, dtype: str) -> bool:
        return place == "jit"


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", [NAN_MEMORY], indirect=True, ids=["nan_and_races"])
@pytest.mark.usefixtures("interpreted", "no_races")
class TestPallasNanMemory(TestPallas):
    """In the simulation of a TPU's memories, where nothing is zero before it is written."""

    @no_batches
    def test_vmap_equals_a_loop(self) -> None:
        super().test_vmap_equals_a_loop()

    @no_batches
    def test_vmap_of_several_labels_equals_a_loop(self) -> None:
        super().test_vmap_of_several_labels_equals_a_loop()


@pytest.mark.parametrize(("chunk_tokens", "chunk_vocab"), [(None, None), (64, 384), (None, 128)])
@pytest.mark.usefixtures("interpreted")
def test_sizes_of_chunks_change_nothing(chunk_tokens: int | None, chunk_vocab: int | None) -> None:
    """Of 384 columns the last block is padding alone."""
    sizes = {"chunk_tokens": chunk_tokens, "chunk_vocab": chunk_vocab}
    outputs, gradients = compiled(implementation="pallas", **sizes)(HIDDEN, HEAD)
    assert_equals_oracle(outputs, *gradients)


@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize("interpreted", [TWO_CORES], indirect=True, ids=["two_cores"])
@pytest.mark.usefixtures("interpreted", "no_races")
def test_no_memory_is_read_unwritten_and_no_race(layout: str) -> None:
    """On a TPU of two cores that take parallel blocks in any order: 3 of tokens, 3 of columns."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(39, 8)), rng.normal(size=(261, 8))
    labels, cotangents = rng.integers(0, 261, 39), rng.normal(size=(3, 39))
    arrays = hidden.astype(np.float32), head.astype(np.float32)

    def function(hidden: jax.Array, head: jax.Array) -> tuple:
        head = head if layout == "vd" else head.T
        options = CHUNKS | {"head_layout": layout, "with_entropy": True}
        return linear_cross_entropy(hidden, head, labels, **options)[:3]

    @jax.jit
    def run(*arrays: jax.Array) -> tuple:
        outputs, pull = jax.vjp(function, *arrays)
        return *outputs, *pull(tuple(jnp.asarray(cotangents, jnp.float32)))

    found = jax.block_until_ready(run(*arrays))
    true_outputs, true_gradients = oracle.cross_entropy(hidden, head, labels, tuple(cotangents))
    for actual, true in zip(found, (*true_outputs, *true_gradients), strict=True):
        np.testing.assert_allclose(actual, true, atol=3e-5)


@pytest.mark.usefixtures("interpreted")
def test_wide_states_are_summed_in_parts() -> None:
    """Width 1100: parts of 512, 512 and 76."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(20, 1100)).astype(np.float32) / 30
    head, labels = rng.normal(size=(200, 1100)).astype(np.float32), rng.integers(0, 200, 20)
    for layout in ("vd", "dv"):

        def total(hidden: jax.Array, head: jax.Array, layout: str = layout) -> jax.Array:
            head = head if layout == "vd" else head.T
            return linear_cross_entropy(
                hidden, head, labels, head_layout=layout, implementation="pallas"
            ).log_prob.sum()

        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)
        cotangents = np.ones(20), np.zeros(20), np.zeros(20)
        wide = hidden.astype(np.float64), head.astype(np.float64)
        _, true_gradients = oracle.cross_entropy(*wide, labels, cotangents)
        for gradient, true in zip(gradients, true_gradients, strict=True):
            np.testing.assert_allclose(gradient, true, atol=2e-5)


@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize("interpreted", [NAN_MEMORY], indirect=True, ids=["nan_and_races"])
@pytest.mark.usefixtures("interpreted", "no_races")
def test_wide_states_are_read_in_parts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 384 in three parts, which VMEM would not ask for; columns past 290 hold NaN."""
    monkeypatch.setattr(blocks, "seconds_of", lambda _sweep, tile, _sizes: -tile.parts)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(39, 384)).astype(np.float32) / 20
    head, labels = rng.normal(size=(300, 384)).astype(np.float32), rng.integers(0, 290, 39)
    head[290:] = np.nan

    def outputs(hidden: jax.Array, head: jax.Array) -> tuple:
        head = head if layout == "vd" else head.T
        options = CHUNKS | {"head_layout": layout, "with_entropy": True, "vocab_size": 290}
        return tuple(linear_cross_entropy(hidden, head, labels, **options)[:3])

    cotangents = rng.normal(size=(3, 39))
    found, pull = jax.vjp(jax.jit(outputs), hidden, head)
    gradients = pull(tuple(jnp.asarray(cotangents, jnp.float32)))
    wide = hidden.astype(np.float64), head[:290].astype(np.float64)
    true, true_gradients = oracle.cross_entropy(*wide, labels, tuple(cotangents))
    for actual, expected in zip(found, true, strict=True):
        np.testing.assert_allclose(actual, expected, atol=3e-6)
    np.testing.assert_allclose(gradients[0], true_gradients[0], atol=1e-5)
    np.testing.assert_allclose(gradients[1][:290], true_gradients[1], atol=1e-5)
    np.testing.assert_array_equal(gradients[1][290:], 0)


@pytest.mark.parametrize(("vocabulary", "width"), [(384, 8), (20, 128)])
@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.usefixtures("interpreted")
def test_a_head_may_be_read_transposed(layout: str, vocabulary: int, width: int) -> None:
    """Where one side fills registers and the other does not; what comes back lies as the head."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(20, width)).astype(np.float32)
    head = rng.normal(size=(vocabulary, width)).astype(np.float32)
    labels = rng.integers(0, 20, 20)

    def total(hidden: jax.Array, head: jax.Array, implementation: str) -> jax.Array:
        options = {"head_layout": layout, "implementation": implementation}
        return linear_cross_entropy(hidden, head, labels, **options).log_prob.sum()

    arrays = hidden, head if layout == "vd" else head.T
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(total, implementation=x), argnums=(0, 1)))(
            *arrays
        )
        for x in ("pallas", "reference")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected
    )


# ---- Which calls it serves ---------------------------------------------------------------------

STATES, ROWS, LABELS = np.ones((4, 8), np.float32), np.ones((130, 8), np.float32), np.zeros(4, int)


def test_a_program_for_a_cpu_is_refused() -> None:
    def log_prob(hidden: np.ndarray) -> jax.Array:
        return linear_cross_entropy(hidden, ROWS, LABELS, implementation="pallas").log_prob

    for function in (log_prob, jax.jit(log_prob), jax.grad(lambda x: log_prob(x).sum())):
        with pytest.raises(
            ImplementationError, match="this program is lowered for cpu: choose 'xla"
        ):
            function(STATES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 20}, "chunk_tokens must be a multiple of 16 for implementation 'pallas'"),
        ({"chunk_vocab": 64}, "chunk_vocab must be a multiple of 128 for implementation 'pallas',"),
    ],
)
def test_sizes_it_cannot_hold_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ImplementationError, match=message):
        linear_cross_entropy(STATES, ROWS, LABELS, implementation="pallas", **change)


def test_a_width_beyond_vmem_is_refused() -> None:
    hidden, head = np.ones((1, 20000), np.float32), np.ones((2, 20000), np.float32)
    with pytest.raises(
        ImplementationError, match="cannot fit widths 20000 in blocks of 16 tokens and 128 columns"
    ):
        linear_cross_entropy(hidden, head, np.zeros(1, int), implementation="pallas")


@pytest.mark.parametrize(
    ("devices", "inside", "width", "chosen"),
    [
        (1, False, 8, "pallas"),
        (8, False, 8, "xla"),
        (8, True, 8, "pallas"),
        (1, False, 20000, "xla"),
    ],
)
def test_auto_on_a_tpu(
    devices: int,
    inside: bool,
    width: int,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One device or inside shard_map, and a width that fits; else the lean twin, and it says so."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    dispatch._say_once.cache_clear()
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.sharding.PartitionSpec("data")

    def log_prob(hidden: jax.Array) -> jax.Array:
        labels = jnp.zeros(hidden.shape[:1], jnp.int32)
        head = jnp.ones((2, width), jnp.float32)
        return linear_cross_entropy(hidden, head, labels).log_prob

    function = jax.shard_map(log_prob, mesh=mesh, in_specs=rows, out_specs=rows)
    with caplog.at_level(logging.INFO, logger="jaxdistill.kernels"):
        jax.eval_shape(function if inside else log_prob, jnp.ones((4, width), jnp.float32))
    assert caplog.messages == [f"linear_cross_entropy: implementation='auto' chose '{chosen}'"]


def test_it_is_lowered_for_a_tpu_where_there_is_none() -> None:
    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        out = linear_cross_entropy(hidden, head, LABELS, implementation="pallas")
        return out.log_prob.sum()

    function = jax.jit(jax.grad(total, argnums=(0, 1)))
    text = function.trace(STATES, ROWS).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(r"kernel_name = \"(\w+)\"", text)
    sweeps = "forward", "hidden_gradient", "head_gradient"
    assert names == [f"linear_cross_entropy_{sweep}" for sweep in sweeps]
