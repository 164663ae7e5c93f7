"""Universal logit distillation: what it does not see, its bounds, vocabularies of other sizes."""

import re

import jax
import numpy as np
import pytest

from jaxdistill import losses

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(5, 7)) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=(5, 9)) * 2).astype(np.float32)
ORDER = np.array([3, 1, 0, 6, 5, 2, 4])


def gradient(student: np.ndarray, teacher: np.ndarray) -> jax.Array:
    return jax.grad(lambda s: losses.universal_logit(s, teacher).sum())(student)


def test_a_permuted_vocabulary_is_the_same() -> None:
    """The distance to itself in another order is 0, with gradient 0."""
    np.testing.assert_allclose(losses.universal_logit(STUDENT, STUDENT[:, ORDER]), 0, atol=1e-6)
    value = losses.universal_logit(STUDENT, TEACHER)
    np.testing.assert_allclose(losses.universal_logit(STUDENT[:, ORDER], TEACHER), value, rtol=1e-6)
    np.testing.assert_allclose(
        gradient(STUDENT[:, ORDER], TEACHER), gradient(STUDENT, TEACHER)[:, ORDER], atol=1e-6
    )


def test_it_is_a_distance() -> None:
    value = losses.universal_logit(STUDENT, TEACHER)
    np.testing.assert_allclose(losses.universal_logit(TEACHER, STUDENT), value, rtol=1e-6)
    assert ((value > 0) & (value < 2)).all()
    sure = np.array([50.0, 0.0, 0.0, 0.0], np.float32)
    np.testing.assert_allclose(
        losses.universal_logit(np.zeros(100, np.float32), sure), 2 * 0.99, rtol=1e-5
    )


def test_absent_columns_are_columns_of_probability_zero() -> None:
    value, slope = losses.universal_logit(STUDENT, TEACHER), gradient(STUDENT, TEACHER)
    wide = np.concatenate([TEACHER, np.full((5, 3), -np.inf, np.float32)], axis=-1)
    np.testing.assert_allclose(losses.universal_logit(STUDENT, wide), value, rtol=1e-6)
    np.testing.assert_allclose(gradient(STUDENT, wide), slope, atol=1e-6)
    forbidden = np.concatenate([np.full((5, 4), -np.inf, np.float32), STUDENT], axis=-1)
    np.testing.assert_allclose(losses.universal_logit(forbidden, TEACHER), value, rtol=1e-6)
    np.testing.assert_allclose(gradient(forbidden, TEACHER)[:, 4:], slope, atol=1e-6)


def test_each_side_has_its_own_padding() -> None:
    padded = losses.universal_logit(
        np.pad(STUDENT, ((0, 0), (0, 1)), constant_values=99),
        np.pad(TEACHER, ((0, 0), (0, 7)), constant_values=99),
        student_vocab_size=7,
        teacher_vocab_size=9,
    )
    np.testing.assert_array_equal(padded, losses.universal_logit(STUDENT, TEACHER))


def test_a_ragged_answer_is_a_mask() -> None:
    """The paper's reduction: the mean over the positions of the shorter answer, then over rows."""
    student = RNG.normal(size=(2, 4, 7)).astype(np.float32)
    teacher = RNG.normal(size=(2, 4, 9)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    values = np.asarray(losses.universal_logit(student, teacher))
    expected = (values[0, :3].mean() + values[1, 0]) / 2
    np.testing.assert_allclose(losses.sequence_mean(values, mask).mean(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.universal_logit(STUDENT, TEACHER[:4]),
            "teacher_logits must have the shape of student_logits but for the vocabulary, "
            "(5, 'U'), but its shape is (4, 9)",
        ),
        (
            lambda: losses.universal_logit(STUDENT, TEACHER, student_vocab_size=9),
            "vocab_size must lie in [1, 7], the columns of student_logits, but it is 9",
        ),
        (
            lambda: losses.universal_logit(STUDENT, TEACHER, temperature=0.0),
            "temperature must be finite and above 0, but it is 0.0",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
