"""Identities of the distillation of classifiers, and what it does at the edge of probabilities."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

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


def mean_of_dist(student, teacher, *rest, **options) -> jax.Array:
    return losses.dist(student, teacher, *rest, **options).mean()


def test_dist_zero_and_stationary_where_equal() -> None:
    value, gradient = summed(mean_of_dist, TEACHER, epsilon=0.0)(TEACHER + 5.0)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_dist_does_not_see_affine_changes() -> None:
    """Of the probabilities of a row in its first part, of a class in its second, of all in both."""
    p = softmax(TEACHER.astype(np.float64))
    by_row = np.linspace(0.1, 0.9, 8)[:, None]
    by_class = np.array([1, -1, 2, -2, 1, -2, 1]) * 1e-3 + 1e-2
    mixed = 0.3 * p + 0.7 / 7
    rows_changed = by_row * p + (1 - by_row) / 7
    classes_changed = 0.9 * p + 0.1 * by_class / by_class.sum()
    for changed, seen_inter, seen_intra in (
        (mixed, False, False),
        (rows_changed, False, True),
        (classes_changed, True, False),
    ):
        student = np.log(changed).astype(np.float32)
        inter = mean_of_dist(student, TEACHER, intra_weight=0.0, epsilon=0.0)
        intra = mean_of_dist(student, TEACHER, inter_weight=0.0, epsilon=0.0)
        assert [bool(inter > 1e-5), bool(intra > 1e-5)] == [seen_inter, seen_intra]


def test_dist_of_opposites_is_twice_the_weights() -> None:
    p = softmax(TEACHER.astype(np.float64))
    opposite = np.log((1 - p) / 6)  # -p / 6 + 1 / 6 in every row and class
    options = {"inter_weight": 1.0, "intra_weight": 3.0, "epsilon": 0.0}
    value = mean_of_dist(opposite.astype(np.float32), TEACHER, **options)
    np.testing.assert_allclose(value, 8, rtol=1e-5)


def test_dist_dropped_rows_do_not_exist() -> None:
    """Whatever they hold; with a mask of none the mean is 0."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[[1, 6]], teacher[[1, 6]] = np.nan, np.inf
    mask = ~np.isin(ROWS, [1, 6])
    value, gradient = summed(mean_of_dist, teacher, mask)(student)
    expected, of_kept = summed(mean_of_dist, TEACHER[mask])(STUDENT[mask])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient)[mask], of_kept, atol=1e-6)
    assert not np.asarray(gradient)[~mask].any()
    value, gradient = summed(mean_of_dist, teacher, np.zeros(8))(student)
    assert value == 0
    assert not np.asarray(gradient).any()


def test_dist_without_variation_has_no_gradient() -> None:
    """A student of one answer: rows that are uniform, classes that no example moves."""
    uniform = np.full((8, 7), 0.3, np.float32)
    one_row = np.repeat(STUDENT[:1], 8, axis=0) + np.arange(8, dtype=np.float32)[:, None] / 3

    @jax.jit
    @jax.value_and_grad
    def run(student: jax.Array, inter: float, intra: float, epsilon: float) -> jax.Array:
        weights = {"inter_weight": inter, "intra_weight": intra}
        return mean_of_dist(student, TEACHER, epsilon=epsilon, **weights)

    for student, epsilon in itertools.product((uniform, one_row), (0.0, 1e-8)):
        weights = (1.0, 1.0) if student is uniform else (0.0, 2.0)
        value, gradient = run(student, *weights, epsilon)
        np.testing.assert_allclose(value, 2, rtol=1e-6)
        assert not np.asarray(gradient).any()
    one = STUDENT[:1], TEACHER[:1]  # does not vary over rows
    expected = mean_of_dist(*one, intra_weight=0.0) + 2
    np.testing.assert_allclose(mean_of_dist(*one), expected, rtol=1e-6)


def test_dist_epsilon_silences_rare_classes() -> None:
    """A class of probabilities around 1e-6 correlates, but not beside 1e-8."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, 6] = teacher[:, 6] = TEACHER[:, 6] - 20
    parts = []
    for epsilon in (0.0, 1e-8):
        options = {"inter_weight": 0.0, "intra_weight": 7.0, "epsilon": epsilon}
        value, gradient = summed(mean_of_dist, teacher, **options)(student)
        parts.append((value, np.abs(gradient[:, 6]).max()))
    (exact, exact_gradient), (damped, damped_gradient) = parts
    assert damped > exact + 0.3
    assert exact_gradient > 10 * damped_gradient > 0


def test_dist_high_temperature_is_the_correlation_of_logits() -> None:
    """So its gradient does not shrink with temperature^2."""
    value = mean_of_dist(STUDENT, TEACHER, temperature=1e3, inter_weight=1.0, intra_weight=0.0)
    expected = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(STUDENT, TEACHER, strict=True)]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-2)


def test_dist_parts_of_microbatches() -> None:
    """Rows add up in the first part; the second is the mean of each microbatch's own."""
    halves = [losses.dist(STUDENT[i : i + 4], TEACHER[i : i + 4]) for i in (0, 4)]
    means = [x.mean() for x in halves]
    np.testing.assert_allclose((halves[0] + halves[1]).mean(), np.mean(means), rtol=1e-6)
    assert abs((halves[0] + halves[1]).mean() - mean_of_dist(STUDENT, TEACHER)) > 0.01
    rows = [losses.dist(STUDENT[i : i + 4], TEACHER[i : i + 4], intra_weight=0.0) for i in (0, 4)]
    expected = mean_of_dist(STUDENT, TEACHER, intra_weight=0.0)
    np.testing.assert_allclose((rows[0] + rows[1]).mean(), expected, rtol=1e-6)


def test_dist_over_four_devices_is_that_of_one() -> None:
    """Value and gradient, one device with a row less and one with none."""
    mask = np.array([1, 1, 0, 1, 0, 0, 1, 1])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    loss = functools.partial(losses.dist, temperature=2.0)

    def of_all(*local: jax.Array) -> losses.Weighted:
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), loss(*local, axis_name="data"))

    sharded = jax.shard_map(of_all, mesh=mesh, in_specs=(rows,) * 3, out_specs=whole)
    run = jax.jit(jax.value_and_grad(lambda s: sharded(s, TEACHER, mask).mean()))
    value, gradient = run(STUDENT)
    expected, of_one = summed(lambda *arrays: loss(*arrays).mean(), TEACHER, mask)(STUDENT)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, of_one, atol=1e-7)
    assert np.abs(of_one).max() > 1e-2


kd, dist = (functools.partial(loss, STUDENT) for loss in (losses.decoupled_kd, losses.dist))


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
        (
            lambda: losses.dist(STUDENT[0], TEACHER[0]),
            "student_logits must be floating with shape [N, V], but it is float32 with shape (7,)",
        ),
        (
            lambda: dist(TEACHER[:4]),
            "teacher_logits must have the shape of student_logits, (8, 7), in all axes but the "
            "last, but the shape is (4, 7)",
        ),
        (
            lambda: dist(TEACHER[:, :6]),
            "teacher_logits must have the shape of student_logits, (8, 7), but its shape is (8, 6)",
        ),
        (lambda: dist(TEACHER, STUDENT), "mask must have shape (8,), but its shape is (8, 7)"),
        (lambda: dist(TEACHER, inter_weight=-1.0), "inter_weight must lie in [0.0, inf], but"),
        (lambda: dist(TEACHER, intra_weight=-1.0), "intra_weight must lie in [0.0, inf], but"),
        (lambda: dist(TEACHER, epsilon=-1e-8), "epsilon must lie in [0.0, inf], but it is -1e-08"),
        (lambda: dist(TEACHER, vocab_size=0), "vocab_size must lie in [1, 7], the columns of"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
