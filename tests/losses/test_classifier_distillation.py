"""Identities of the distillation of classifiers, and what it does at the edge of probabilities."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax, pick, softmax

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(8, 7)) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=(8, 7)) * 2).astype(np.float32)
LABELS = RNG.integers(0, 7, 8)
ROWS = np.arange(8)


def target_part(*arrays, **options) -> jax.Array:
    return losses.decoupled_kd(*arrays, target_weight=1.0, non_target_weight=0.0, **options)


def non_target_part(*arrays, **options) -> jax.Array:
    return losses.decoupled_kd(*arrays, target_weight=0.0, non_target_weight=1.0, **options)


def summed(loss, *rest, **options):
    """Compiled value and gradient in the student of the loss's sum."""
    return jax.jit(jax.value_and_grad(lambda student: loss(student, *rest, **options).sum()))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_divergence_is_the_two_parts(temperature: float) -> None:
    """KL = TCKD + (1 - p_target) NCKD, value and gradient."""
    p_target = pick(softmax(TEACHER.astype(np.float64) / temperature), LABELS).astype(np.float32)
    options = {"temperature": temperature, "scale_by_temperature_squared": True}

    def parts(student: jax.Array) -> jax.Array:
        rest = non_target_part(student, TEACHER, LABELS, **options)
        return target_part(student, TEACHER, LABELS, **options) + (1 - p_target) * rest

    expected = losses.forward_kl(STUDENT, TEACHER, **options)
    np.testing.assert_allclose(parts(STUDENT), expected, rtol=1e-5, atol=1e-6)
    _, gradient = summed(parts)(STUDENT)
    _, expected = summed(losses.forward_kl, TEACHER, **options)(STUDENT)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_each_part_sees_what_the_other_does_not() -> None:
    """The target's logit moves TCKD alone; the others' spread at one sum moves NCKD alone."""
    sure = TEACHER.copy()
    sure[ROWS, LABELS] += 3
    assert (target_part(sure, TEACHER, LABELS) > 0.1).all()
    np.testing.assert_allclose(non_target_part(sure, TEACHER, LABELS), 0, atol=1e-5)
    permuted = TEACHER.copy()
    for row, label in enumerate(LABELS):
        others = np.delete(ROWS[:7], label)
        permuted[row, others] = TEACHER[row, np.roll(others, 1)]
    np.testing.assert_allclose(target_part(permuted, TEACHER, LABELS), 0, atol=1e-5)
    assert (non_target_part(permuted, TEACHER, LABELS) > 0.1).all()


def test_two_classes_have_no_others() -> None:
    arrays = STUDENT[:, :2], TEACHER[:, :2], LABELS % 2
    expected = losses.forward_kl(*arrays[:2], temperature=4.0, scale_by_temperature_squared=True)
    np.testing.assert_allclose(losses.decoupled_kd(*arrays), expected, rtol=1e-4, atol=1e-6)
    assert not np.asarray(non_target_part(*arrays)).any()


def test_decoupled_zero_and_stationary_where_equal() -> None:
    value, gradient = summed(losses.decoupled_kd, TEACHER, LABELS)(TEACHER + 5.0)
    np.testing.assert_allclose(value, 0, atol=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("gap", [200.0, 1e4, -1e4])
def test_decoupled_is_exact_at_any_gap(gap: float) -> None:
    """A target that has everything, or nothing: both parts keep their value and gradient."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[ROWS, LABELS] += gap
    value, gradient = summed(non_target_part, teacher, LABELS, temperature=1.0)(student)
    expected, others = 0.0, np.zeros_like(gradient, dtype=np.float64)
    for row, label in enumerate(LABELS):
        s, t = (np.delete(x[row].astype(np.float64), label) for x in (student, teacher))
        expected += (softmax(t) * (log_softmax(t) - log_softmax(s))).sum()
        others[row, np.arange(7) != label] = softmax(s) - softmax(t)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, others, atol=1e-5)
    value, gradient = summed(target_part, teacher, LABELS, temperature=1.0)(student)
    log_q = log_softmax(student.astype(np.float64))
    log_rest = [np.logaddexp.reduce(np.delete(x, y)) for x, y in zip(log_q, LABELS, strict=True)]
    p = pick(softmax(teacher.astype(np.float64)), LABELS)
    cross = -(p * pick(log_q, LABELS) + (1 - p) * np.array(log_rest))
    expected = (cross + p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(pick(gradient, LABELS), float(gap > 0) - p, atol=1e-5)


def test_decoupled_teacher_without_some_classes() -> None:
    """-inf: no target, no others or one class less; finite, and what the formula says."""
    teacher = TEACHER[:4].copy()
    teacher[0, LABELS[0]] = -np.inf  # no target: TCKD = -log of the rest, NCKD as ever
    teacher[1, np.arange(7) != LABELS[1]] = -np.inf  # a label: TCKD is the likelihood, NCKD 0
    teacher[2, (LABELS[2] + 1) % 7] = -np.inf
    arrays = teacher, LABELS[:4]
    first = target_part(STUDENT[:4], *arrays, temperature=1.0)
    second = non_target_part(STUDENT[:4], *arrays, temperature=1.0)
    nll = -pick(log_softmax(STUDENT.astype(np.float64)), LABELS)
    np.testing.assert_allclose(first[:2], [-np.log(1 - np.exp(-nll[0])), nll[1]], rtol=1e-5)
    plain = non_target_part(STUDENT[:1], TEACHER[:1], LABELS[:1], temperature=1.0)
    np.testing.assert_allclose(second[0], plain[0], rtol=1e-5)
    assert second[1] == 0
    _, gradient = summed(losses.decoupled_kd, *arrays)(STUDENT[:4])
    assert np.isfinite(gradient).all()


def test_decoupled_paddings_may_differ_and_do_not_exist() -> None:
    narrow = losses.decoupled_kd(STUDENT[:, :5], TEACHER[:, :5], LABELS % 5)
    wide = np.concatenate([TEACHER[:, :5], np.full((8, 9), 1e3, np.float32)], axis=-1)
    found = losses.decoupled_kd(STUDENT, wide, LABELS % 5, vocab_size=5)
    np.testing.assert_array_equal(found, narrow)


def test_decoupled_temperature_is_a_constant() -> None:
    arrays = STUDENT, TEACHER, LABELS
    run = jax.jit(jax.value_and_grad(lambda t: losses.decoupled_kd(*arrays, temperature=t).sum()))
    value, gradient = run(jnp.float32(2.0))
    np.testing.assert_allclose(value, losses.decoupled_kd(*arrays, temperature=2.0).sum(), 1e-6)
    assert gradient == 0


def test_decoupled_label_out_of_range_under_jit_is_nan_there_alone() -> None:
    labels = np.array([0, -1, 7, 6, 1, 2, 3, 4])
    mask = np.array([1, 0, 0, 1, 1, 1, 1, 1])

    @jax.jit
    def run(student: jax.Array, labels: jax.Array) -> tuple:
        def mean(student: jax.Array) -> tuple:
            values = losses.decoupled_kd(student, TEACHER, labels)
            return losses.token_mean(values, mask).mean(), values

        return jax.value_and_grad(mean, has_aux=True)(student)

    (mean, values), gradient = run(STUDENT, labels)
    np.testing.assert_array_equal(np.isnan(values), mask == 0)
    assert np.isfinite(mean)
    assert np.isfinite(gradient).all()


def test_standardized_has_mean_zero_and_deviation_one() -> None:
    found = np.asarray(losses.standardize_logits(STUDENT), np.float64)
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(-1), 1, rtol=1e-6)
    one_hot = losses.standardize_logits(np.eye(7, dtype=np.float32))
    np.testing.assert_allclose(np.abs(one_hot).max(), np.sqrt(6), rtol=1e-6)  # the bound


def test_standardized_forgets_scale_and_shift() -> None:
    """So does the gradient: nothing along the row itself or along a constant."""
    scale = np.linspace(0.01, 100, 8, dtype=np.float32)[:, None]
    moved = scale * STUDENT + 3.0
    expected = losses.standardize_logits(STUDENT)
    np.testing.assert_allclose(losses.standardize_logits(moved), expected, atol=1e-4)
    weights = RNG.normal(size=STUDENT.shape).astype(np.float32)
    gradient = jax.grad(lambda z: (weights * losses.standardize_logits(z)).sum())(STUDENT)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose((gradient * STUDENT).sum(-1), 0, atol=1e-5)
    assert np.abs(gradient).max() > 0.1


def test_standardized_far_from_zero() -> None:
    """A shift that float32 can hold costs no digit."""
    small = RNG.integers(-5, 6, (8, 7)).astype(np.float32)
    expected = losses.standardize_logits(small)
    np.testing.assert_allclose(losses.standardize_logits(small + 1e7), expected, rtol=1e-6)


def test_standardized_student_needs_no_range() -> None:
    """A student that has the teacher's order and spacing is done, at any range."""
    standard = losses.standardize_logits(0.1 * TEACHER + 2), losses.standardize_logits(TEACHER)
    np.testing.assert_allclose(losses.forward_kl(*standard, temperature=2.0), 0, atol=1e-6)
    assert (losses.forward_kl(0.1 * TEACHER + 2, TEACHER, temperature=2.0) > 0.1).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4 / 3, -7.7e6])
def test_standardized_constant_row_is_zero_without_gradient(constant: float) -> None:
    student = np.full((2, 7), constant, np.float32)
    student[1] = STUDENT[1]

    def loss(student: jax.Array) -> jax.Array:
        standard = losses.standardize_logits(student), losses.standardize_logits(TEACHER[:2])
        return losses.forward_kl(*standard, temperature=2.0).sum()

    assert not np.asarray(losses.standardize_logits(student))[0].any()
    _, gradient = summed(loss)(student)
    assert not np.asarray(gradient)[0].any()
    assert np.abs(gradient[1]).max() > 0.01


def test_standardized_columns_that_do_not_exist() -> None:
    """-inf stays and a padding goes; neither counts, nor does a row of -inf alone break."""
    expected = losses.standardize_logits(STUDENT[:, :5])
    padded = STUDENT.copy()
    padded[:, 5:] = 1e6
    np.testing.assert_array_equal(losses.standardize_logits(padded, vocab_size=5), expected)
    padded[:, 5:] = -np.inf
    found = losses.standardize_logits(padded)
    np.testing.assert_allclose(found[:, :5], expected, rtol=1e-6)
    assert (found[:, 5:] == -jnp.inf).all()
    padded[0] = -np.inf
    gradient = jax.grad(lambda z: losses.standardize_logits(z)[:, :2].sum())(padded)
    assert np.isfinite(gradient).all()


kd = functools.partial(losses.decoupled_kd, STUDENT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kd(TEACHER[:4], LABELS),
            "teacher_logits must have the shape of student_logits, (8, 7), but its shape is (4, 7)",
        ),
        (
            lambda: kd(TEACHER, LABELS[:, None]),
            "labels must have shape (8,), but the shape is (8, 1)",
        ),
        (lambda: kd(TEACHER, LABELS * 0 + 7), "labels must lie in [0, 7), but 7 is among them"),
        (
            lambda: kd(TEACHER, LABELS, target_weight=-1.0),
            "target_weight must lie in [0.0, inf], but it is -1.0",
        ),
        (
            lambda: kd(TEACHER, LABELS, non_target_weight=-0.5),
            "non_target_weight must lie in [0.0, inf], but it is -0.5",
        ),
        (
            lambda: kd(TEACHER, LABELS, temperature=0.0),
            "temperature must be finite and above 0, but it is 0.0",
        ),
        (
            lambda: kd(TEACHER, 0 * LABELS, vocab_size=1),
            "student_logits must have at least 2 columns that count, but they have 1",
        ),
        (
            lambda: losses.standardize_logits(LABELS),
            "logits must be floating with shape [..., V], but it is int",
        ),
        (
            lambda: losses.standardize_logits(STUDENT, vocab_size=8),
            "vocab_size must lie in [1, 7], the columns of logits, but it is 8",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
