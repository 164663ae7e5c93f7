"""Divergences from a teacher's top k: K + 1 outcomes, every kind, against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxdistill.kernels import linear_divergence, linear_divergence_top_k, on_tpu
from jaxdistill.kernels.linear_divergence.kinds import KINDS, MIXTURES

from tests.kernels import matrix, oracle

SHARE = 0.3
RNG = np.random.default_rng(0)
SHAPE, VOCABULARY, K = (4, 6), 23, 4
HIDDEN = RNG.normal(size=(*SHAPE, 8)).astype(np.float32)
HEAD = RNG.normal(size=(VOCABULARY, 8)).astype(np.float32)
TEACHER = RNG.normal(size=(*SHAPE, VOCABULARY)).astype(np.float32)
LOG_P = np.asarray(jax.nn.log_softmax(2 * TEACHER))
IDS = np.argsort(-LOG_P, axis=-1)
TOP = IDS[..., :K], np.take_along_axis(LOG_P, IDS, -1)[..., :K]
COTANGENT = RNG.normal(size=SHAPE).astype(np.float32)
CHUNKS = {"chunk_tokens": 5, "chunk_vocab": 16, "implementation": "xla"}
each_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=() if x == "reverse_kl" else pytest.mark.slow) for x in KINDS],
)


def share_of(kind: str) -> float | None:
    return SHARE if kind in MIXTURES else None


def divergence(kind: str, *arrays: jax.Array, **options: object) -> jax.Array:
    return linear_divergence_top_k(*arrays, kind=kind, share=share_of(kind), **options)


def value_and_gradients(function, *models: jax.Array) -> tuple:
    """Values, and the gradients of hidden and head."""

    @jax.jit
    def run(*models: jax.Array) -> tuple:
        values, pull = jax.vjp(function, *models)
        return values, *pull(jnp.asarray(COTANGENT))

    return run(*models)


# ---- The matrix of design.md -------------------------------------------------------------------

BOUNDED = ("jensen_shannon", "skew_reverse_kl", "total_variation")


def records_of(labels: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Three ids a token and their log-probabilities, which leave 3/4 to the rest."""
    offsets = np.array([0, 7, 31])
    ids = np.stack([(labels + offset) % vocab_size for offset in offsets], axis=-1)
    return ids, np.broadcast_to(np.log(np.float32([0.05, 0.15, 0.05])), ids.shape)


def values_of(kind: str, *arrays: jax.Array) -> jax.Array:
    hidden, head, _, _, labels = arrays
    offsets = (jnp.int32(0), jnp.int32(7), jnp.int32(31))
    ids = jnp.stack([(labels + offset) % head.shape[0] for offset in offsets], axis=-1)
    log_p = jnp.broadcast_to(jnp.log(jnp.float32([0.05, 0.15, 0.05])), ids.shape)
    options = {"temperature": matrix.TEMPERATURE} | CHUNKS
    return divergence(kind, hidden, head, ids, log_p, **options)


def expected(kind: str, arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    student, teacher = matrix.flat_models(arrays)
    vocab_size = len(student[1])
    ids, log_p = records_of(arrays[4].reshape(-1), vocab_size)
    log_p = log_p.astype(np.float64)
    p_rest = 1 - np.exp(log_p).sum(-1, keepdims=True)
    outcomes_p = np.concatenate([log_p, np.log(p_rest)], axis=-1)

    def of_logs(_: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = (np.arange(vocab_size) == ids[..., None]).any(1)
        rest = np.log(np.where(kept, 0, np.exp(log_q)).sum(-1, keepdims=True))
        outcomes_q = np.concatenate([np.take_along_axis(log_q, ids, -1), rest], axis=-1)
        terms, derivative = oracle.of_probabilities(kind, outcomes_p, outcomes_q, share_of(kind))
        of_columns = np.broadcast_to(derivative[:, -1:], log_q.shape).copy()
        np.put_along_axis(of_columns, ids, derivative[:, :-1], -1)
        return terms.sum(-1), of_columns

    values, gradients, scales = oracle.of_two_heads(
        of_logs, student, teacher, weights, matrix.TEMPERATURE
    )
    return values, gradients, scales if kind in BOUNDED else gradients


@matrix.each_place_and_dtype()
@each_kind
def test_against_float64(kind: str, vocab_size: int, place: str, dtype: str) -> None:
    functions = (functools.partial(x, kind) for x in (values_of, expected))
    matrix.assert_against_float64(*functions, vocab_size, jnp.dtype(dtype), place)


# ---- Identities --------------------------------------------------------------------------------


@each_kind
def test_the_whole_vocabulary_gives_the_full_divergence(kind: str) -> None:
    """Where every column is recorded, in any order: values and gradients."""
    ids, log_p = IDS, np.take_along_axis(LOG_P, IDS, -1)
    found = value_and_gradients(
        lambda *models: divergence(kind, *models, ids, log_p, temperature=1.3), HIDDEN, HEAD
    )
    teacher = 1.3 * LOG_P, np.eye(VOCABULARY, dtype=np.float32)
    options = {"kind": kind, "share": share_of(kind), "temperature": 1.3}
    full = value_and_gradients(
        lambda *models: linear_divergence(*models, *teacher, **options), HIDDEN, HEAD
    )
    for actual, true in zip(found, full, strict=True):
        np.testing.assert_allclose(actual, true, atol=1e-5)


@each_kind
def test_more_ids_tell_more_of_it(kind: str) -> None:
    """A divergence of sums of outcomes is at most that of the outcomes."""
    function = jax.jit(functools.partial(divergence, kind, HIDDEN, HEAD))
    log_p = np.take_along_axis(LOG_P, IDS, -1)
    values = np.stack([function(IDS[..., :k], log_p[..., :k]) for k in (1, 4, VOCABULARY)])
    assert (values[0] > 1e-4).any()
    assert (np.diff(values, axis=0) > -1e-6).all()


@each_kind
def test_zero_and_stationary_at_the_teacher(kind: str) -> None:
    log_q = jax.nn.log_softmax(HIDDEN @ HEAD.T)
    ids = IDS[..., :K]
    log_p = jnp.take_along_axis(log_q, ids, -1)
    values, *gradients = value_and_gradients(
        lambda *models: divergence(kind, *models, ids, log_p), HIDDEN, HEAD
    )
    np.testing.assert_allclose(values, 0, atol=1e-6)
    if kind != "total_variation":  # which has no derivative there
        for gradient in gradients:
            np.testing.assert_allclose(gradient, 0, atol=1e-5)


@each_kind
def test_places_that_are_not_used(kind: str) -> None:
    """As if they were not there, be their id another place's or a column of the rest."""
    ids = np.concatenate([TOP[0], TOP[0][..., :1], IDS[..., -2:]], axis=-1)
    log_p = np.concatenate([TOP[1], np.full((*SHAPE, 3), -np.inf, np.float32)], axis=-1)
    found, plain = (
        value_and_gradients(lambda *m, r=r: divergence(kind, *m, *r), HIDDEN, HEAD)
        for r in ((ids, log_p), TOP)
    )
    for actual, true in zip(found, plain, strict=True):
        np.testing.assert_allclose(actual, true, atol=2e-6)


@each_kind
def test_a_teacher_that_leaves_no_rest(kind: str) -> None:
    """A mass that rounds to 1 or more: finite, and the gradient takes mass from the rest."""
    ids = np.broadcast_to([0, 1], (*SHAPE, 2))

    @jax.jit
    def run(hidden: jax.Array, head: jax.Array, log_p: jax.Array) -> tuple:
        values, pull = jax.vjp(lambda *m: divergence(kind, *m, ids, log_p), hidden, head)
        return values, pull(jnp.ones_like(values))

    for excess in (0.0, 1e-6, 1e-2):
        log_p = np.broadcast_to(np.log(np.float32([0.7, 0.3 + excess])), ids.shape)
        for scale in (0.01, 1.0, 30.0):
            for array in jax.tree.leaves(run(np.float32(scale) * HIDDEN, HEAD, log_p)):
                assert np.isfinite(array).all()
        values, (_, to_head) = run(np.ones_like(HIDDEN), 0 * HEAD, log_p)
        assert values.min() > 0.1
        assert np.asarray(to_head)[2:].min() > 0


@each_kind
def test_a_saturated_student_still_learns(kind: str) -> None:
    """Its mass on the ids rounds to 1; 1 - sum q would have no gradient."""
    hidden, head = np.ones((1, 1), np.float32), np.full((7, 1), -40, np.float32)
    head[2] = 0
    ids, log_p = np.array([[2]]), np.log(np.array([[0.9]], np.float32))
    run = jax.jit(jax.value_and_grad(lambda x: divergence(kind, hidden, x, ids, log_p).sum()))
    value, gradient = run(head)
    assert np.isfinite(value)
    assert value > 0.01
    assert np.isfinite(gradient).all()
    if kind == "forward_kl":
        np.testing.assert_allclose(gradient[:, 0], [*[-0.1 / 6] * 2, 0.1, *[-0.1 / 6] * 4], 1e-5)
    else:
        assert (np.asarray(gradient)[[0, 1, 3, 4, 5, 6]] < 0).all()


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalise"])
def test_bad_records_under_jit_are_nan_there_alone(tail: str) -> None:
    ids, log_p = TOP[0].copy(), np.log(np.full((*SHAPE, K), 0.2, np.float32))
    ids[0, 1, 0], ids[1, 2, 3], ids[2, 0, 1] = -1, VOCABULARY, ids[2, 0, 0]
    bad = np.zeros(SHAPE, bool)
    bad[0, 1] = bad[1, 2] = bad[2, 0] = True

    @jax.jit
    def run(head: jax.Array, ids: jax.Array) -> tuple:
        def total(head: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = linear_divergence_top_k(HIDDEN, head, ids, log_p, tail=tail)
            return jnp.sum(jnp.where(bad, 0.0, values)), values

        return jax.grad(total, has_aux=True)(head)

    gradient, values = run(HEAD, ids)
    np.testing.assert_array_equal(np.isnan(values), bad)
    assert np.isfinite(gradient).all()


@each_kind
def test_no_gradient_into_the_teacher_the_share_or_the_temperature(kind: str) -> None:
    def total(log_p: jax.Array, share: jax.Array, temperature: jax.Array) -> jax.Array:
        options = {"share": share if kind in MIXTURES else None, "temperature": temperature}
        return linear_divergence_top_k(HIDDEN, HEAD, TOP[0], log_p, kind=kind, **options).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(
        TOP[1], jnp.float32(SHARE), jnp.float32(1.3)
    )
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalise"])
def test_split_equals_whole(tail: str) -> None:
    """30 columns over two devices, 23 of which count; the others are NaN."""
    axes = ("data", "tensor"), (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), *axes, devices=jax.devices()[:4])
    head = np.concatenate([HEAD, np.full((7, 8), np.nan, np.float32)])
    rows, columns = PartitionSpec("data"), PartitionSpec("tensor")
    options = {"tail": tail, "vocab_size": VOCABULARY, "soft_cap": 3.0}

    def run(axis_name: str | None, hidden: jax.Array, head: jax.Array, *rest: jax.Array) -> tuple:
        *records, cotangent = rest
        values, pull = jax.vjp(
            lambda *m: linear_divergence_top_k(*m, *records, axis_name=axis_name, **options),
            hidden,
            head,
        )
        return values, pull(cotangent)

    split = jax.shard_map(
        functools.partial(run, "tensor"),
        mesh=mesh,
        in_specs=(rows, columns, rows, rows, rows),
        out_specs=(rows, (rows, columns)),
    )
    arrays = HIDDEN, head, *TOP, COTANGENT
    found, whole = jax.jit(split)(*arrays), jax.jit(functools.partial(run, None))(*arrays)
    for actual, true in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert np.isfinite(true).all()
        np.testing.assert_allclose(actual, true, atol=2e-6)


def test_memory_is_that_of_a_tile() -> None:
    """1,024 tokens of 8,192 columns and 64 ids, by XLA's account: value and gradients."""
    shapes = ((1024, 32), jnp.bfloat16), ((8192, 32), jnp.bfloat16), ((1024, 64), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*x) for x in (*shapes, ((1024, 64), jnp.float32))]

    def mean(*arrays: jax.Array) -> jax.Array:
        chunks = {"chunk_tokens": 512, "chunk_vocab": 512, "implementation": "xla"}
        return linear_divergence_top_k(*arrays, kind="reverse_kl", **chunks).mean()

    compiled = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*arrays).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 4 * 1024 * 8192 / 3, f"{temporary} bytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind must be one of 'forward_kl', 'reverse_kl'"),
        ({"kind": "jensen_shannon"}, "share must be a scalar for kind 'jensen_shannon', but it is"),
        ({"tail": "drop"}, "tail must be one of 'bucket', 'ignore', 'renormalise', but it is"),
        (
            {"tail": "ignore", "kind": "reverse_kl"},
            "tail must be 'bucket' for kind 'reverse_kl', but it is 'ignore': without the",
        ),
        ({"vocab_size": 24}, "vocab_size must lie in [1, 23], the columns of student_head, but"),
        ({"ids": TOP[0][:3]}, "ids must have shape (4, 6, 4), but the shape is (3, 6, 4)"),
        ({"ids": TOP[0] + 23}, "ids must lie in [0, 23), but"),
        ({"ids": 0 * TOP[0]}, "ids must differ at each position, but one stands twice at (0, 0)"),
        (
            {"teacher_log_probs": TOP[1][..., :2]},
            "teacher_log_probs must have the shape of ids, (4, 6, 4), but its shape is (4, 6, 2)",
        ),
        (
            {"teacher_log_probs": 0 * TOP[1]},
            "exp(teacher_log_probs) must sum to at most 1 at each position, but a sum is 4",
        ),
    ],
)
def test_says_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"ids": TOP[0], "teacher_log_probs": TOP[1]} | change
    arrays = arguments.pop("ids"), arguments.pop("teacher_log_probs")
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_divergence_top_k(HIDDEN, HEAD, *arrays, **arguments)


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalise"])
def test_the_tpu_kernel_gives_the_same(tail: str) -> None:
    """Interpreted, with memory full of NaN; a place that is not used, too."""
    ids, log_p = TOP[0], TOP[1].copy()
    log_p[0, 0, 2] = -np.inf

    def function(hidden: jax.Array, head: jax.Array, **options: object) -> jax.Array:
        options = {"tail": tail, "temperature": 1.3, "soft_cap": 5.0} | options
        return linear_divergence_top_k(hidden, head, ids, log_p, **options)

    expected = value_and_gradients(functools.partial(function, implementation="xla"), HIDDEN, HEAD)
    token = on_tpu.INTERPRET.set(pltpu.InterpretParams(uninitialized_memory="nan"))
    kernel = functools.partial(function, implementation="pallas")
    found = value_and_gradients(kernel, HIDDEN, HEAD)
    on_tpu.INTERPRET.reset(token)
    for actual, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, true, atol=2e-6)
