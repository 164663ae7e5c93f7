"""DIST: correlations over classes and over examples, on one device and on four."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdistill import losses
from tests.losses.oracle import softmax

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(8, 7)) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=(8, 7)) * 2).astype(np.float32)


def summed(loss, *rest, **options):
    """Compiled value and gradient in the student of the loss's sum."""
    return jax.jit(jax.value_and_grad(lambda student: loss(student, *rest, **options).sum()))


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
    mask = ~np.isin(np.arange(8), [1, 6])
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


dist = functools.partial(losses.dist, STUDENT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
