"""What the feature losses share: their checks, exact products and directions of vectors."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks

ArrayLike = jax.typing.ArrayLike


def as_features(name: str, array: ArrayLike, shape: str = "[..., D]") -> jax.Array:
    """Floating with at least as many axes as `shape` names, as float32."""
    array = jnp.asarray(array)
    axes = shape.strip("[]").split(", ")
    rank = len(axes) - ("..." in axes)
    fits = array.ndim >= rank if "..." in axes else array.ndim == rank
    if not fits or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating with shape {shape}, "
            f"but it is {array.dtype} with shape {array.shape}"
        )
    return array.astype(jnp.float32)


def student_and_teacher_features(
    student: ArrayLike, teacher: ArrayLike, shape: str, what: str = "features"
) -> tuple[jax.Array, jax.Array]:
    """Both as float32, equal in all axes but the last; no gradient flows into the teacher's."""
    student = as_features(f"student_{what}", student, shape)
    teacher = lax.stop_gradient(as_features(f"teacher_{what}", teacher, shape))
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher_{what} must have the shape of student_{what}, {student.shape}, in all axes "
            f"but the last, but the shape is {teacher.shape}"
        )
    return student, teacher


def row_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """Which rows exist, boolean; all do if there is no mask."""
    if mask is None:
        return jnp.ones(shape, bool)
    return checks.as_tokens("mask", mask, shape) != 0


def zero_where_dropped(features: jax.Array, keep: jax.Array) -> jax.Array:
    """Rows that do not exist become 0, be they NaN, and receive no gradient."""
    return jnp.where(keep[..., None], features, 0.0)


def product(equation: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """einsum in full float32, also where the hardware would round its inputs to bfloat16."""
    return jnp.einsum(equation, first, second, precision=lax.Precision.HIGHEST)


def scaled(features: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Over the largest magnitude, for what does not depend on scale: then no power overflows.

    The divisor is a constant; the gradient of such a function has no part along it anyway.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(features), axis=axes, keepdims=True))
    return features / jnp.where(largest > 0, largest, 1.0)


def magnitude(values: jax.Array) -> jax.Array:
    """|values|, with the gradient 0 at 0, where that of jnp.abs is 1."""
    return values * lax.stop_gradient(jnp.sign(values))


def norm(vectors: jax.Array) -> jax.Array:
    """Euclidean norm over the last axis, kept; a zero vector receives the gradient 0, not NaN."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def unit(vectors: jax.Array) -> jax.Array:
    """vectors / norm over the last axis; a zero vector stays 0 and receives no gradient."""
    length = norm(vectors)
    return jnp.where(length > 0, vectors, 0.0) / jnp.where(length > 0, length, 1.0)
