"""What relations between examples do not depend on, and what dropped examples leave behind."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxdistill import losses

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(6, 3)).astype(np.float32)
TEACHER = RNG.normal(size=(6, 4)).astype(np.float32)
TURN = np.linalg.qr(RNG.normal(size=(3, 3)))[0].astype(np.float32)
MASK = np.array([1, 0, 1, 1, 0, 1])
RKD = [losses.rkd_distance, losses.rkd_angle]
POOLED = functools.partial(losses.relation_cosine, pooled=True)
DEBIASED = functools.partial(losses.linear_cka, debiased=True)


@functools.partial(jax.jit, static_argnums=0)
def value(loss, *arrays) -> jax.Array:
    """One number a set, compiled: thousands of small operations would take longer."""
    result = loss(*arrays)
    return result.mean() if isinstance(result, losses.Weighted) else result


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, *arrays) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda *arrays: value(loss, *arrays).sum())(*arrays)


def far_from_equal(found: jax.Array, other: jax.Array) -> bool:
    return bool(abs(found - other) > 0.01)


@pytest.mark.parametrize("loss", RKD)
def test_rkd_does_not_see_rotation_scale_and_shift(loss) -> None:
    expected = value(loss, STUDENT, TEACHER)
    np.testing.assert_allclose(value(loss, 5 * STUDENT @ TURN + 2, TEACHER), expected, rtol=1e-4)
    np.testing.assert_allclose(value(loss, STUDENT @ TURN, 3 * STUDENT + 1), 0, atol=1e-6)
    assert far_from_equal(value(loss, STUDENT * [1, 3, 1], TEACHER), expected)


@pytest.mark.parametrize("loss", RKD)
def test_rkd_has_no_gradient_along_rotation_scale_and_shift(loss) -> None:
    gradient = np.asarray(value_and_gradient(loss, STUDENT, TEACHER)[1])
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-6)
    np.testing.assert_allclose((gradient * STUDENT).sum(), 0, atol=1e-6)
    turning = gradient.T @ STUDENT
    np.testing.assert_allclose(turning, turning.T, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "smallest", "weight"), [(losses.rkd_distance, 2, 30), (losses.rkd_angle, 3, 120)]
)
def test_rkd_is_weighted_by_pairs_and_triples(loss, smallest: int, weight: int) -> None:
    run = jax.jit(loss)
    assert run(STUDENT, TEACHER).weight == weight
    too_few = run(STUDENT, TEACHER, np.arange(6) < smallest - 1)
    assert too_few.weight == too_few.mean() == 0


@pytest.mark.parametrize("loss", [*RKD, losses.relation_cosine, losses.linear_cka, DEBIASED])
def test_dropped_rows_are_as_if_cut_off_though_they_hold_nan(loss) -> None:
    kept = MASK == 1
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[~kept] = teacher[~kept] = np.nan
    found, gradient = value_and_gradient(loss, student, teacher, MASK)
    expected, cut = value_and_gradient(loss, STUDENT[kept], TEACHER[kept])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[kept], cut, atol=1e-6)
    assert not np.asarray(gradient)[~kept].any()


@pytest.mark.parametrize("loss", [*RKD, losses.relation_cosine, losses.linear_cka])
def test_equal_rows_and_no_rows(loss) -> None:
    """Distances, directions and variances of 0: finite value and gradient."""
    for student, mask in ((np.ones_like(STUDENT), MASK), (STUDENT, 0 * MASK)):
        found, gradient = value_and_gradient(loss, student, TEACHER, mask)
        assert np.isfinite(found)
        assert np.isfinite(gradient).all()
    assert found == 0
    assert not np.asarray(gradient).any()


def test_relation_cosine_does_not_see_scale_and_rotation_but_shift() -> None:
    expected = value(losses.relation_cosine, STUDENT, TEACHER)
    np.testing.assert_allclose(
        value(losses.relation_cosine, 1e4 * STUDENT @ TURN, TEACHER), expected, rtol=1e-5
    )
    np.testing.assert_allclose(
        value(losses.relation_cosine, STUDENT, 2 * STUDENT @ TURN), 0, atol=1e-6
    )
    assert far_from_equal(value(losses.relation_cosine, STUDENT + 1, TEACHER), expected)


def test_columns_that_do_not_exist_have_no_relations() -> None:
    """The two vocabularies may be padded to different widths, with anything."""
    padded = np.pad(STUDENT, ((0, 0), (0, 2)), constant_values=-np.inf)
    cut = functools.partial(losses.relation_cosine, vocab_size=3)
    found, gradient = value_and_gradient(cut, padded, TEACHER)
    np.testing.assert_allclose(
        found, value(losses.relation_cosine, STUDENT, TEACHER[:, :3]), rtol=1e-6
    )
    np.testing.assert_array_equal(np.asarray(gradient).any(0), [1, 1, 1, 0, 0])


def test_pooled_relations_weigh_samples_by_their_size() -> None:
    """As the authors have it: one sample alone is the same, and a large one drowns the others."""
    pair = np.stack([STUDENT, STUDENT[::-1] + 1]), np.stack([TEACHER, TEACHER])
    each = value(losses.relation_cosine, *pair)
    np.testing.assert_allclose(value(POOLED, STUDENT, TEACHER), each[0], rtol=1e-6)
    scale = np.array([1e3, 1.0], np.float32)[:, None, None]
    assert value(POOLED, *pair).shape == ()
    np.testing.assert_allclose(value(POOLED, pair[0] * scale, pair[1] * scale), each[0], rtol=1e-4)
    assert far_from_equal(value(POOLED, *pair), each.mean())


def test_samples_of_text_alone_add_no_relation_loss() -> None:
    """LLaVA-KD trains on them too; all of them together give 0 and no gradient either."""
    student, teacher = np.stack([STUDENT] * 2), np.stack([TEACHER] * 2)
    mask = np.stack([MASK, 0 * MASK])
    values = value(losses.relation_cosine, student, teacher, mask)
    np.testing.assert_allclose(
        values, [value(losses.relation_cosine, STUDENT, TEACHER, MASK), 0], rtol=1e-6
    )
    np.testing.assert_allclose(value(POOLED, student, teacher, mask), values[0], rtol=1e-6)
    nothing = value_and_gradient(POOLED, student, teacher, 0 * mask)
    assert not any(np.asarray(x).any() for x in nothing)


@pytest.mark.parametrize("cka", [losses.linear_cka, DEBIASED])
def test_cka_invariances(cka) -> None:
    expected = value(cka, STUDENT, TEACHER)
    np.testing.assert_allclose(value(cka, STUDENT @ TURN * 5 + 3, TEACHER), expected, rtol=1e-4)
    np.testing.assert_allclose(value(cka, STUDENT, -2 * STUDENT @ TURN + 1), 1, rtol=1e-5)
    np.testing.assert_allclose(value(cka, TEACHER, STUDENT), expected, rtol=1e-5)
    order = RNG.permutation(6)
    np.testing.assert_allclose(value(cka, STUDENT[order], TEACHER[order]), expected, rtol=1e-5)
    assert far_from_equal(value(cka, STUDENT * [1, 9, 1], TEACHER), expected)


def test_cka_of_few_examples_is_near_1_unless_debiased() -> None:
    """Independent features, 8 examples of 400 dimensions, 20 sets: the truth is 0."""
    student, teacher = RNG.normal(size=(2, 20, 8, 400)).astype(np.float32)
    assert np.mean(value(losses.linear_cka, student, teacher)) > 0.9
    assert abs(np.mean(value(DEBIASED, student, teacher))) < 0.1


def test_debiased_cka_needs_four_examples() -> None:
    """Of three nothing is left but rounding, in 40 sets of them."""
    student, teacher = RNG.normal(size=(2, 40, 3, 5)).astype(np.float32)
    np.testing.assert_array_equal(value(DEBIASED, student, teacher), 0)
    assert value(DEBIASED, STUDENT[:4], TEACHER[:4]) != 0


def test_cka_far_from_the_origin() -> None:
    """Columns of 1e4, one of them constant: neither their size nor its rounding counts."""
    constant = np.full((6, 1), 1e4 / 3, np.float32)
    shifted = np.concatenate([STUDENT, constant], axis=1)
    np.testing.assert_allclose(
        value(losses.linear_cka, shifted, TEACHER),
        value(losses.linear_cka, STUDENT, TEACHER),
        rtol=1e-5,
    )
    small = np.concatenate([1e-3 * STUDENT, constant], axis=1)
    np.testing.assert_allclose(
        value(losses.linear_cka, small, TEACHER),
        value(losses.linear_cka, STUDENT, TEACHER),
        rtol=1e-5,
    )


INVALID = [
    (
        lambda: losses.rkd_distance(STUDENT, TEACHER[:5]),
        "teacher_features must have the shape of student_features, (6, 3), in all axes but the "
        "last, but the shape is (5, 4)",
    ),
    (
        lambda: losses.rkd_angle(STUDENT[None], TEACHER[None]),
        "student_features must be floating with shape [N, D], but it is float32 with shape "
        "(1, 6, 3)",
    ),
    (
        lambda: losses.rkd_distance(STUDENT, TEACHER, np.ones((6, 1))),
        "mask must have shape (6,), but its shape is (6, 1)",
    ),
    (
        lambda: losses.relation_cosine(STUDENT, TEACHER.astype(int)),
        "teacher_logits must be floating with shape [..., V], but it is int",
    ),
    (
        lambda: losses.relation_cosine(STUDENT, TEACHER, vocab_size=4),
        "vocab_size must lie in [1, 3], the columns of student_logits, but it is 4",
    ),
    (
        lambda: losses.relation_cosine(STUDENT[0], TEACHER[0]),
        "student_logits must be floating with shape [..., K, V], but it is float32 with shape (3,)",
    ),
    (
        lambda: losses.linear_cka(STUDENT, TEACHER, np.ones(5)),
        "mask must have shape (6,), but its shape is (5,)",
    ),
    (
        lambda: losses.linear_cka(STUDENT, TEACHER[:3]),
        "teacher_features must have the shape of student_features, (6, 3), in all axes but the "
        "last, but the shape is (3, 4)",
    ),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
