"""Forward KL from the teacher's top k: identities, each tail's bias, masses that round to 1."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax, softmax

TAILS = ("bucket", "ignore", "renormalise")
RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(5, 7)) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=(5, 7)) * 2).astype(np.float32)
IDS, LOG_P = (np.asarray(x) for x in losses.top_k_teacher(TEACHER, 3))
P = softmax(TEACHER.astype(np.float64))
KEPT = np.zeros((5, 7), bool)
np.put_along_axis(KEPT, IDS, True, axis=-1)
MASS = (P * KEPT).sum(-1, keepdims=True)


def value_and_gradient(loss, student=STUDENT) -> tuple:
    """Values of the rows, and the gradient of each in its own logits."""
    values, pull = jax.vjp(loss, jnp.asarray(student))
    return values, pull(jnp.ones_like(values))[0]


def topk(student, ids=IDS, log_p=LOG_P, **options):
    return losses.topk_forward_kl(student, ids, log_p, **options)


@pytest.mark.parametrize("tail", TAILS)
def test_whole_vocabulary_is_forward_kl(tail: str) -> None:
    options = {"temperature": 2.0, "scale_by_temperature_squared": True, "vocab_size": 6}
    ids, log_p = losses.top_k_teacher(TEACHER, 6, temperature=2.0, vocab_size=6)
    found = value_and_gradient(lambda s: topk(s, ids, log_p, tail=tail, **options))
    expected = value_and_gradient(lambda s: losses.forward_kl(s, TEACHER, **options))
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [("bucket", 0 * P), ("ignore", MASS * P - P * KEPT), ("renormalise", P - P * KEPT / MASS)],
)
def test_gradient_at_the_teacher(tail: str, expected: np.ndarray) -> None:
    """Only the bucket rests there; the others still move mass from the rest to the ids."""
    value, gradient = value_and_gradient(lambda s: topk(s, tail=tail), TEACHER)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    if tail == "bucket":
        np.testing.assert_allclose(value, 0, atol=1e-6)
    else:
        assert (np.asarray(gradient)[KEPT] < -1e-3).all()


@pytest.mark.parametrize(
    ("tail", "least"), [("ignore", (MASS * np.log(MASS))[:, 0]), ("renormalise", 0)]
)
def test_optimum_without_bucket_has_no_rest(tail: str, least) -> None:
    """q = p / sum p on the ids: there the biased tails rest, and the bucket does not."""
    confident = np.where(KEPT, TEACHER, -60.0)
    value, gradient = value_and_gradient(lambda s: topk(s, tail=tail), confident)
    np.testing.assert_allclose(value, least, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    _, gradient = value_and_gradient(topk, confident)
    np.testing.assert_allclose(np.sum(gradient, axis=-1, where=~KEPT), MASS[:, 0] - 1, rtol=1e-4)


def test_ignore_is_renormalise_weighted_by_mass() -> None:
    gradients = [value_and_gradient(lambda s, t=t: topk(s, tail=t))[1] for t in TAILS[1:]]
    np.testing.assert_allclose(gradients[0], MASS * gradients[1], rtol=1e-5, atol=1e-6)


def test_bucket_leaves_the_shape_of_the_rest() -> None:
    """Columns outside the ids are pushed in proportion to what the student gives them."""
    _, gradient = value_and_gradient(topk)
    q = softmax(STUDENT.astype(np.float64))
    factor = 1 - (1 - MASS) / np.sum(q, axis=-1, where=~KEPT, keepdims=True)
    np.testing.assert_allclose(np.where(KEPT, 0, gradient), factor * q * ~KEPT, atol=1e-6)


def test_bucket_never_exceeds_the_dense_divergence() -> None:
    """Each id more tells more of it."""
    values = [topk(STUDENT, *losses.top_k_teacher(TEACHER, k)) for k in (1, 3, 6, 7)]
    assert (np.diff(np.stack(values), axis=0) > -1e-6).all()
    np.testing.assert_allclose(values[-1], losses.forward_kl(STUDENT, TEACHER), rtol=1e-5)


def test_student_mass_that_rounds_to_one() -> None:
    """1 - sum q is 0 in float32, and 6 e^-40 in truth."""
    student = np.where(np.arange(7) == 2, 0.0, -40.0).astype(np.float32)
    log_p = np.log(np.array([0.9], np.float32))
    value, gradient = value_and_gradient(lambda s: topk(s, np.array([2]), log_p), student)
    expected = 0.9 * np.log(0.9) + 0.1 * (np.log(0.1) - np.log(6) + 40)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(np.arange(7) == 2, 0.1, -0.1 / 6), rtol=1e-5)


@pytest.mark.parametrize("excess", [0.0, 1e-6, 1e-2])
def test_teacher_mass_of_one_or_a_rounding_more(excess: float) -> None:
    """Nothing is left for the bucket: finite, and that of "ignore" whatever the student has."""
    log_p = np.log(np.array([0.7, 0.3 + excess], np.float32))
    for student in (np.zeros(7, np.float32), np.float32([50, 50, 0, 0, 0, 0, 0])):
        arrays = [np.array([0, 1]), log_p]
        found = value_and_gradient(lambda s, a=arrays: topk(s, *a), student)
        expected = value_and_gradient(lambda s, a=arrays: topk(s, *a, tail="ignore"), student)
        for actual, desired in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, desired, atol=3e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_places_that_are_not_used(tail: str) -> None:
    """Log-probability -inf: as if the place were not there, be its id another place's."""
    ids = np.concatenate([IDS, IDS[:, :1], np.zeros((5, 2), int)], axis=-1)
    log_p = np.concatenate([LOG_P, np.full((5, 3), -np.inf, np.float32)], axis=-1)
    found = value_and_gradient(lambda s: topk(s, ids, log_p, tail=tail))
    expected = value_and_gradient(lambda s: topk(s, tail=tail))
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_record_without_a_used_place(tail: str) -> None:
    nothing = np.full((5, 3), -np.inf, np.float32)
    value, gradient = value_and_gradient(lambda s: topk(s, IDS, nothing, tail=tail))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_student_that_forbids_the_rest(tail: str) -> None:
    student = np.where(KEPT, STUDENT, -np.inf).astype(np.float32)
    value, gradient = value_and_gradient(lambda s: topk(s, tail=tail), student)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


def test_bad_record_under_jit_is_nan_there_alone() -> None:
    ids, log_p = IDS.copy(), np.log(np.full((5, 3), 0.2, np.float32))
    ids[1, 0], ids[2, 2], ids[3, 1] = -1, 7, ids[3, 0]
    mask = np.array([1, 0, 0, 0, 1])

    @jax.jit
    def run(student: jax.Array, ids: jax.Array) -> tuple:
        def mean(student: jax.Array) -> tuple:
            values = topk(student, ids, log_p)
            return losses.token_mean(values, mask).mean(), values

        return jax.value_and_grad(mean, has_aux=True)(student)

    (mean, values), gradient = run(STUDENT, ids)
    np.testing.assert_array_equal(np.isnan(values), mask == 0)
    np.testing.assert_allclose(mean, np.asarray(values)[[0, 4]].mean(), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_masked_positions_may_hold_nan() -> None:
    log_p = LOG_P.copy()
    log_p[1] = np.nan
    values = topk(STUDENT, log_p=log_p)
    np.testing.assert_allclose(np.delete(values, 1), np.delete(topk(STUDENT), 1), rtol=1e-6)


def test_traced_temperature_is_a_constant() -> None:
    @jax.jit
    def run(temperature: jax.Array) -> tuple:
        loss = functools.partial(topk, STUDENT, scale_by_temperature_squared=True)
        return jax.value_and_grad(lambda t: loss(temperature=t).sum())(temperature)

    for temperature in (1.0, 2.0):
        value, gradient = run(jnp.float32(temperature))
        expected = topk(STUDENT, temperature=temperature).sum() * temperature**2
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert gradient == 0


def test_top_k_teacher() -> None:
    teacher = np.concatenate([TEACHER, np.full((5, 1), 99.0, np.float32)], axis=-1)
    teacher[0, 1:] = -np.inf
    ids, log_probs = jax.jit(lambda x, t: losses.top_k_teacher(x, 3, temperature=t, vocab_size=7))(
        teacher.astype(jnp.bfloat16), 2.0
    )
    wide = teacher.astype(jnp.bfloat16).astype(np.float64)[:, :7] / 2
    expected = -np.sort(-log_softmax(wide), axis=-1)[:, :3]
    assert (ids.dtype, log_probs.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.take_along_axis(log_softmax(wide), ids, -1), expected)
    gradient = jax.grad(lambda x: losses.top_k_teacher(x, 3).log_probs.sum())(TEACHER)
    assert not gradient.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: topk(STUDENT, tail="renormalize"),
            "tail must be one of 'bucket', 'ignore', 'renormalise', but it is 'renormalize'",
        ),
        (
            lambda: topk(STUDENT, ids=IDS[:4]),
            "ids must have shape (5, 3), but the shape is (4, 3)",
        ),
        (
            lambda: topk(STUDENT, ids=3),
            "ids must have shape [..., K] with K at least 1, but the shape is ()",
        ),
        (
            lambda: topk(STUDENT, ids=IDS[:, :0], log_p=LOG_P[:, :0]),
            "ids must have shape [..., K] with K at least 1, but the shape is (5, 0)",
        ),
        (lambda: topk(STUDENT, ids=LOG_P), "ids must be integers, but the type is float32"),
        (
            lambda: topk(STUDENT, vocab_size=4),
            "ids must lie in [0, 4), but",
        ),
        (
            lambda: topk(STUDENT, log_p=LOG_P[:, :2]),
            "teacher_log_probs must have shape (5, 3), but its shape is (5, 2)",
        ),
        (
            lambda: topk(STUDENT, log_p=np.full((5, 3), 0.25, np.float32)),
            "exp(teacher_log_probs) must sum to at most 1 at each position, but a sum is 3.852",
        ),
        (
            lambda: topk(STUDENT, ids=np.where(np.arange(5)[:, None] == 2, 6, IDS)),
            "ids must differ at each position, but one stands twice at (2,)",
        ),
        (
            lambda: topk(STUDENT, log_p=1000 * STUDENT[:, :3]),
            "exp(teacher_log_probs) must sum to at most 1 at each position, but a sum is inf",
        ),
        (
            lambda: topk(STUDENT, temperature=0.0),
            "temperature must be finite and above 0, but it is 0.0",
        ),
        (
            lambda: losses.top_k_teacher(TEACHER, 7, vocab_size=6),
            "k must lie in [1, 6], but it is 7",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
