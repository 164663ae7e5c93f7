"""The linear cross-entropy head with K labels a token and the log-probability of all the rest."""

import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from jaxdistill.kernels import linear_cross_entropy, on_tpu

from tests.kernels import matrix, oracle

RNG = np.random.default_rng(0)
SHAPE, K, VOCABULARY, PADDED = (4, 6), 5, 130, 264
HIDDEN = RNG.normal(size=(*SHAPE, 8)).astype(np.float32)
HEAD = RNG.normal(size=(PADDED, 8)).astype(np.float32)
HEAD[VOCABULARY:] = np.nan
LABELS = RNG.integers(0, VOCABULARY, (*SHAPE, K))
LABELS[..., 3] = LABELS[..., 0]  # a label that stands twice
COTANGENTS = tuple(
    RNG.normal(size=shape).astype(np.float32) for shape in ((*SHAPE, K), SHAPE, SHAPE, SHAPE)
)
OPTIONS = {"temperature": 1.3, "soft_cap": 5.0, "with_entropy": True, "with_rest": True}
IMPLEMENTATIONS = {
    "pallas": {"implementation": "pallas", "chunk_tokens": 16, "chunk_vocab": 128},
    "xla": {"implementation": "xla", "chunk_tokens": 5, "chunk_vocab": 16},
    "reference": {"implementation": "reference"},
}
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    token = on_tpu.INTERPRET.set(True)
    yield
    on_tpu.INTERPRET.reset(token)


def run(options: dict, *arrays: jax.Array) -> tuple:
    """The four outputs, and the gradients of hidden and head."""
    hidden, head, labels, *cotangents = arrays
    outputs, pull = jax.vjp(
        lambda *models: tuple(linear_cross_entropy(*models, labels, **OPTIONS, **options)),
        hidden,
        head,
    )
    return outputs, pull(tuple(cotangents))


def with_float64(labels: np.ndarray = LABELS) -> tuple:
    """What `run` must give, in float64; the padding of the head has gradient 0."""
    outputs, (to_hidden, to_head) = oracle.several_labels(
        HIDDEN.reshape(-1, 8).astype(np.float64),
        HEAD[:VOCABULARY].astype(np.float64),
        labels.reshape(-1, labels.shape[-1]),
        tuple(x.reshape(-1, *x.shape[2:]).astype(np.float64) for x in COTANGENTS),
        temperature=1.3,
        soft_cap=5.0,
    )
    padding = np.zeros((PADDED - VOCABULARY, 8))
    shaped = tuple(x.reshape(*SHAPE, *x.shape[1:]) for x in outputs)
    return shaped, (to_hidden.reshape(HIDDEN.shape), np.concatenate([to_head, padding]))


def assert_close(found: tuple, expected: tuple, atol: float = 1e-5) -> None:
    for actual, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert actual.shape == true.shape
        np.testing.assert_allclose(actual, true, atol=atol)


@pytest.mark.parametrize("layout", ["vd", "dv"])
@each_implementation
def test_equals_oracle(implementation: str, layout: str) -> None:
    """All outputs, cap, temperature, NaN in the padding, a label twice, either way of the head."""
    options = IMPLEMENTATIONS[implementation] | {"head_layout": layout, "vocab_size": VOCABULARY}
    head = HEAD if layout == "vd" else HEAD.T
    outputs, (to_hidden, to_head) = jax.jit(functools.partial(run, options))(
        HIDDEN, head, LABELS, *COTANGENTS
    )
    to_head = to_head if layout == "vd" else to_head.T
    assert_close((outputs, (to_hidden, to_head)), with_float64())


def test_finite_differences() -> None:
    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        options = OPTIONS | IMPLEMENTATIONS["xla"]
        out = linear_cross_entropy(hidden, head, LABELS[0] % 20, **options)
        parts = zip(out, COTANGENTS, strict=True)
        return sum(jnp.vdot(x, cotangent[0]) for x, cotangent in parts)

    check_grads(jax.jit(total), (HIDDEN[0], HEAD[:20]), 1, ["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


@each_implementation
def test_the_rest_where_the_labels_have_all_the_mass(implementation: str) -> None:
    """1 - sum p is 0 in float32; the rest is 4 e^-40, and its gradient is that of 4 columns."""
    hidden = np.ones((1, 1), np.float32)
    head = np.array([[0.0], [0.0], [-40.0], [-40.0], [-40.0], [-40.0]], np.float32)
    options = IMPLEMENTATIONS[implementation] | {"with_rest": True}
    value, gradient = jax.value_and_grad(
        lambda head: linear_cross_entropy(hidden, head, np.array([[0, 1]]), **options).rest[0]
    )(head)
    np.testing.assert_allclose(value, np.log(4) - 40 - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], [-0.5, -0.5, *[0.25] * 4], rtol=1e-5)


@each_implementation
def test_no_column_is_left(implementation: str) -> None:
    """-inf, and no gradient where a constant is; the log-probabilities sum to 1."""
    labels = np.broadcast_to(RNG.permutation(20), (*SHAPE, 20))
    options = IMPLEMENTATIONS[implementation] | {"with_rest": True}

    def total(hidden: jax.Array) -> tuple[jax.Array, tuple]:
        out = linear_cross_entropy(hidden, HEAD[:20], labels, **options)
        return jnp.sum(jnp.where(jnp.isinf(out.rest), 0.0, out.rest)), (out.rest, out.log_prob)

    gradient, (rest, log_prob) = jax.jit(jax.grad(total, has_aux=True))(HIDDEN)
    np.testing.assert_array_equal(rest, -np.inf)
    np.testing.assert_allclose(np.exp(log_prob).sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(gradient, 0)


@each_implementation
def test_label_out_of_range_is_nan_in_its_place_alone(implementation: str) -> None:
    """It takes nothing from the rest, and a mask removes it with its gradient."""
    labels = LABELS.copy()
    labels[0, 0] = [-1, 7, VOCABULARY, PADDED + 9, -VOCABULARY]
    options = OPTIONS | IMPLEMENTATIONS[implementation] | {"vocab_size": VOCABULARY}

    @jax.jit
    def run(hidden: jax.Array, labels: jax.Array) -> tuple:
        def total(hidden: jax.Array) -> tuple[jax.Array, tuple]:
            out = linear_cross_entropy(hidden, HEAD, labels, **options)
            known = jnp.where(jnp.isnan(out.log_prob), 0.0, out.log_prob)
            return known.sum() + out.rest.sum(), (out.log_prob, out.rest)

        return jax.grad(total, has_aux=True)(hidden)

    gradient, (log_prob, rest) = run(HIDDEN, labels)
    outside = np.zeros((*SHAPE, K), bool)
    outside[0, 0] = [True, False, True, True, True]
    np.testing.assert_array_equal(np.isnan(log_prob), outside)
    np.testing.assert_allclose(rest[0, 0], np.log1p(-np.exp(log_prob[0, 0, 1])), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_one_label_in_a_dimension_of_its_own(implementation: str) -> None:
    options = {"implementation": implementation, "vocab_size": VOCABULARY}
    plain = linear_cross_entropy(HIDDEN, HEAD, LABELS[..., 0], **options)
    found = linear_cross_entropy(HIDDEN, HEAD, LABELS[..., :1], **options)
    np.testing.assert_array_equal(found.log_prob, plain.log_prob[..., None])
    assert found.rest is None


@pytest.mark.slow
@each_implementation
def test_vmap_equals_a_loop(implementation: str) -> None:
    heads = np.stack([HEAD, 2 * HEAD, -HEAD, HEAD])[:, :VOCABULARY]
    function = jax.jit(functools.partial(run, IMPLEMENTATIONS[implementation]))
    arrays = HIDDEN, heads, LABELS, *COTANGENTS
    together = jax.jit(jax.vmap(function))(*arrays)
    one_by_one = [function(*x) for x in zip(*arrays, strict=True)]
    assert_close(together, jax.tree.map(lambda *x: np.stack(x), *one_by_one), atol=2e-6)


@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
@each_implementation
def test_any_leading_shape(implementation: str, shape: tuple[int, ...]) -> None:
    hidden, labels = np.ones((*shape, 8), np.float32), np.zeros((*shape, 2), int)
    options = {"with_rest": True, "implementation": implementation}
    out = linear_cross_entropy(hidden, HEAD[:9], labels, **options)
    assert out.log_prob.shape == (*shape, 2)
    assert out.log_sum_exp.shape == out.rest.shape == shape


# ---- A head split over devices -----------------------------------------------------------------

DATA, TENSOR = PartitionSpec("data"), PartitionSpec("tensor")


def split(options: dict, data: int, tensor: int) -> Callable:
    devices = jax.devices()[: data * tensor]
    axes = ("data", "tensor"), (AxisType.Auto,) * 2
    mesh = jax.make_mesh((data, tensor), *axes, devices=devices)
    function = functools.partial(run, options | {"axis_name": "tensor"})
    in_specs, out_specs = (DATA, TENSOR, *[DATA] * 5), (DATA, (DATA, TENSOR))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
@each_implementation
def test_split_equals_whole(implementation: str, data: int, tensor: int) -> None:
    """130 of 264 columns: one device has some that do not count, others have none that do."""
    options = IMPLEMENTATIONS[implementation] | {"vocab_size": VOCABULARY}
    found = split(options, data, tensor)(HIDDEN, HEAD, LABELS, *COTANGENTS)
    assert_close(found, with_float64())


@each_implementation
def test_split_where_devices_have_no_rest(implementation: str) -> None:
    """Token 0: all but one column are labels; token 1: all are, and one more is out of range."""
    labels = np.broadcast_to(np.arange(8), (*SHAPE, 8)).copy()
    labels[0, 0, 7], labels[0, 2, 7] = 0, 100
    cotangents = np.ones((*SHAPE, 8), np.float32), *COTANGENTS[1:]
    function = split(IMPLEMENTATIONS[implementation], 1, 4)
    (log_prob, _, _, rest), gradients = function(HIDDEN, HEAD[:8], labels, *cotangents)
    whole = functools.partial(run, {"implementation": "reference"})
    (true_log_prob, _, _, true_rest), true_gradients = jax.jit(whole)(
        HIDDEN, HEAD[:8], labels, *cotangents
    )
    assert np.isfinite(rest[0, [0, 2]]).all()
    assert np.isinf(rest).sum() == rest.size - 2
    assert np.isnan(log_prob).sum() == 1
    assert_close((log_prob, rest, gradients), (true_log_prob, true_rest, true_gradients))


# ---- The matrix of design.md -------------------------------------------------------------------

CHUNKS = {"chunk_tokens": 5, "chunk_vocab": 16, "implementation": "xla"}
WEIGHTS = np.array([0.2, -0.1, 0.3, 0.1], np.float32)


def labels_of(labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """Four a token, the first twice."""
    offsets = jnp.reshape(jnp.array([0, 7, 31, 0]), (1,) * labels.ndim + (4,))
    return (labels[..., None] + offsets) % vocab_size


def values_of(*arrays: jax.Array) -> jax.Array:
    hidden, head, _, _, labels = arrays
    several = labels_of(labels, head.shape[0])
    options = {"with_rest": True, "temperature": matrix.TEMPERATURE} | CHUNKS
    out = linear_cross_entropy(hidden, head, several, **options)
    return out.log_prob @ WEIGHTS + 0.3 * out.rest


def expected(arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    student, _ = matrix.flat_models(arrays)
    labels = np.asarray(labels_of(arrays[4].reshape(-1), len(student[1])))
    cotangents = weights[:, None] * WEIGHTS, 0 * weights, 0 * weights, 0.3 * weights
    (log_prob, _, _, rest), gradients = oracle.several_labels(
        *student, labels, cotangents, matrix.TEMPERATURE
    )
    return log_prob @ WEIGHTS + 0.3 * rest, gradients, gradients


@matrix.each_place_and_dtype()
def test_against_float64(vocab_size: int, place: str, dtype: str) -> None:
    matrix.assert_against_float64(values_of, expected, vocab_size, jnp.dtype(dtype), place)


def test_every_product_accumulates_in_float32() -> None:
    arrays = *matrix.make(3.0, 67, jnp.bfloat16), matrix.masks()["none"]
    function = functools.partial(matrix.run, values_of, None)
    types = re.findall(r":(\w+)\[[^\]]*\] = dot_general", str(jax.make_jaxpr(function)(*arrays)))
    assert len(types) >= 4
    assert set(types) == {"f32"}


# ---- What it costs, and what it refuses --------------------------------------------------------


def test_memory_is_that_of_a_tile() -> None:
    """1,024 tokens of 8,192 columns and 64 labels, by XLA's account."""
    shapes = (1024, 32), (8192, 32)
    models = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    labels = jax.ShapeDtypeStruct((1024, 64), jnp.int32)

    def temporary(**options: object) -> int:
        def mean(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
            out = linear_cross_entropy(hidden, head, labels, with_rest=True, **options)
            return out.log_prob.mean() + out.rest.mean()

        compiled = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*models, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    lean = temporary(implementation="xla", chunk_tokens=512, chunk_vocab=512)
    full = temporary(implementation="reference")
    assert full >= 4 * 1024 * 8192
    assert lean <= full / 10, f"{lean} bytes against {full}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": LABELS[..., 0], "with_rest": True},
            "labels must have shape (4, 6) and one more dimension for with_rest, but the shape is",
        ),
        ({"labels": LABELS[..., :0]}, "labels must have K at least 1, but the shape is (4, 6, 0)"),
        ({"labels": LABELS[:3]}, "labels must have shape (4, 6, 5), but the shape is (3, 6, 5)"),
        ({"labels": LABELS + PADDED}, "labels must lie in [0, 264), but"),
        ({"labels": LABELS[None]}, "labels must have shape (4, 6), but the shape is (1, 4, 6, 5)"),
    ],
)
def test_says_what_is_wrong(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(HIDDEN, HEAD, **change)
