"""Identities of the losses of hidden states and patches, and what they refuse."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxdistill import losses

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(2, 3, 4)).astype(np.float32)
TEACHER = RNG.normal(size=(2, 3, 4)).astype(np.float32)
WIDE = RNG.normal(size=(2, 3, 5)).astype(np.float32)
PROJECTION = RNG.normal(size=(4, 5)).astype(np.float32)
BIAS = RNG.normal(size=5).astype(np.float32)
mse, cosine = jax.jit(losses.hidden_mse), jax.jit(losses.hidden_cosine)
alignment = jax.jit(losses.dmae_alignment, static_argnames="normalize")
reconstruction = jax.jit(losses.masked_reconstruction, static_argnames="normalize_patches")
HIDDEN = {"mse": mse, "cosine": cosine, "dmae": alignment}
each_hidden = pytest.mark.parametrize("loss", HIDDEN.values(), ids=HIDDEN)


@each_hidden
def test_zero_where_the_projected_student_is_the_teacher(loss) -> None:
    teacher = STUDENT @ PROJECTION + BIAS
    np.testing.assert_allclose(loss(STUDENT, teacher, PROJECTION, BIAS), 0, atol=1e-6)
    assert (np.asarray(loss(STUDENT, WIDE, PROJECTION, BIAS)) > 0.05).all()


@each_hidden
def test_projection_and_bias_may_be_left_out(loss) -> None:
    nothing = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    np.testing.assert_allclose(
        loss(STUDENT, TEACHER, *nothing), loss(STUDENT, TEACHER), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        loss(STUDENT, TEACHER, bias=BIAS[:4]), loss(STUDENT + BIAS[:4], TEACHER), rtol=1e-6
    )


def test_which_losses_see_the_scale() -> None:
    for loss in (cosine, alignment):
        np.testing.assert_allclose(
            loss(7 * STUDENT, 0.1 * TEACHER), loss(STUDENT, TEACHER), rtol=1e-5, atol=1e-6
        )
    values = [mse(k * STUDENT, k * TEACHER) for k in (1, 3)]
    np.testing.assert_allclose(values[1], 9 * values[0], rtol=1e-6)


def test_cosine_is_between_0_and_2() -> None:
    np.testing.assert_allclose(cosine(STUDENT, STUDENT), 0, atol=1e-6)
    np.testing.assert_allclose(cosine(STUDENT, -3 * STUDENT), 2, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"), [(cosine, 1.0), (alignment, 0.25)], ids=["cosine", "dmae"]
)
def test_a_vector_of_zeros_has_a_value_and_no_gradient(loss, expected: float) -> None:
    """From the zero vector, a unit vector along an axis is 1 away in cosine, 1/4 in the mean."""
    teacher = np.eye(4, dtype=np.float32)[:1]
    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss(s, teacher).sum()))(0 * teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize(
    "loss", [mse, cosine, functools.partial(alignment, normalize=False)], ids=HIDDEN
)
def test_stationary_where_equal(loss) -> None:
    """The kink of an absolute value too: no step leads away from agreement."""
    gradient = jax.jit(jax.grad(lambda s: loss(s, STUDENT).sum()))(STUDENT)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_dmae_without_norms_is_the_mean_absolute_difference() -> None:
    value = alignment(STUDENT, TEACHER, normalize=False)
    np.testing.assert_allclose(value, np.abs(STUDENT - TEACHER).mean(-1), rtol=1e-6)


def test_visible_patches_get_no_gradient() -> None:
    removed = np.array([[1, 0, 1], [0, 1, 1]])

    def objective(prediction: jax.Array) -> jax.Array:
        values = reconstruction(prediction, TEACHER)
        return losses.token_mean(values, removed).mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(STUDENT)
    np.testing.assert_allclose(value, ((STUDENT - TEACHER) ** 2)[removed == 1].mean(), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient).any(-1), removed == 1)


def test_normalised_patches_do_not_depend_on_brightness_and_contrast() -> None:
    values = [
        reconstruction(STUDENT, patches, normalize_patches=True)
        for patches in (TEACHER, 50 * TEACHER + 20)
    ]
    np.testing.assert_allclose(*values, rtol=1e-4)


def test_a_patch_of_one_colour_is_normalised_to_zeros() -> None:
    value = reconstruction(STUDENT, np.ones_like(STUDENT), normalize_patches=True)
    np.testing.assert_allclose(value, (STUDENT**2).mean(-1), rtol=1e-6)


INVALID = [
    (
        lambda: losses.hidden_mse(STUDENT, WIDE),
        "teacher_hidden must have the shape of student_hidden, (2, 3, 4), but its shape is "
        "(2, 3, 5); where only the widths differ, give a projection",
    ),
    (
        lambda: losses.hidden_cosine(STUDENT[:1], WIDE, PROJECTION),
        "teacher_hidden must have the shape of student_hidden, (1, 3, 5), but its shape is "
        "(2, 3, 5)",
    ),
    (
        lambda: losses.dmae_alignment(STUDENT, WIDE, PROJECTION.T),
        "projection must have shape (4, 5), the widths of student_hidden and teacher_hidden, "
        "but its shape is (5, 4)",
    ),
    (
        lambda: losses.hidden_mse(STUDENT, WIDE, PROJECTION[0]),
        "projection must be floating with shape [Ds, Dt], but it is float32 with shape (5,)",
    ),
    (
        lambda: losses.hidden_mse(STUDENT, WIDE, PROJECTION, BIAS[:4]),
        "bias must have shape (5,), but its shape is (4,)",
    ),
    (
        lambda: losses.hidden_mse(STUDENT, WIDE, PROJECTION, BIAS[None]),
        "bias must be floating with shape [Dt], but it is float32 with shape (1, 5)",
    ),
    (
        lambda: losses.hidden_mse(STUDENT.astype(int), TEACHER),
        "student_hidden must be floating with shape [..., D], but it is int",
    ),
    (
        lambda: losses.hidden_cosine(STUDENT, np.float32(1.0)),
        "teacher_hidden must be floating with shape [..., D], but it is float32 with shape ()",
    ),
    (
        lambda: losses.masked_reconstruction(STUDENT, WIDE),
        "patches must have the shape of prediction, (2, 3, 4), but its shape is (2, 3, 5)",
    ),
    (
        lambda: losses.masked_reconstruction(
            STUDENT[..., :1], TEACHER[..., :1], normalize_patches=True
        ),
        "patches must have 2 values or more to be normalised, but they have 1",
    ),
    (
        lambda: losses.masked_reconstruction(STUDENT > 0, TEACHER),
        "prediction must be floating with shape [..., P], but it is bool",
    ),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
