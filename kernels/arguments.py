"""Checks of the heads' arguments; each message names the argument, what was expected and given."""

import math

import jax
import jax.numpy as jnp

VOCABULARY_AXIS = {"vd": 0, "dv": 1}


def is_concrete(value: object) -> bool:
    """Whether the value can be looked at now: inside jit, vmap and grad it may be a tracer."""
    return not isinstance(value, jax.core.Tracer)


def check_positive(name: str, value: jax.typing.ArrayLike) -> None:
    """Raise ValueError unless a concrete scalar is finite and above 0; a tracer passes unseen."""
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, but its shape is {jnp.shape(value)}")
    if not is_concrete(value):
        return
    number = float(jax.device_get(value))
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and above 0, but it is {number}")


def check_labels(
    name: str, labels: jax.typing.ArrayLike, shape: tuple[int, ...], vocab_size: int
) -> None:
    """Raise ValueError unless labels are integers of this shape within [0, vocab_size).

    The range can be seen only outside jit; inside, such a label gives NaN at its position.
    """
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"{name} must be integers, but the type is {jnp.result_type(labels)}")
    if jnp.shape(labels) != shape:
        raise ValueError(f"{name} must have shape {shape}, but the shape is {jnp.shape(labels)}")
    if not is_concrete(labels):
        return
    with jax.ensure_compile_time_eval():  # labels may be constants of a traced function
        values = jax.device_get(jnp.asarray(labels))
    outside = (values < 0) | (values >= vocab_size)
    if outside.any():
        raise ValueError(
            f"{name} must lie in [0, {vocab_size}), but {values[outside][0]} is among them: "
            "give a position to be left out any label in range, and mask it in the reduction"
        )


def check_head(
    name: str, hidden: jax.Array, head: jax.Array, head_layout: str, vocab_size: int | None
) -> int:
    """Raise ValueError unless `head` fits `hidden`; returns the number of columns that count."""
    if head_layout not in VOCABULARY_AXIS:
        raise ValueError(f'head_layout must be "vd" or "dv", but it is {head_layout!r}')
    if hidden.ndim < 1 or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"{name}hidden must be floating with shape [..., D], "
            f"but it is {hidden.dtype} with shape {hidden.shape}"
        )
    if head.ndim != 2 or not jnp.issubdtype(head.dtype, jnp.floating):
        raise ValueError(
            f"{name}head must be floating with two dimensions, "
            f"but it is {head.dtype} with shape {head.shape}"
        )
    axis = VOCABULARY_AXIS[head_layout]
    if head.shape[1 - axis] != hidden.shape[-1]:
        raise ValueError(
            f"{name}head of layout {head_layout!r} must have width {hidden.shape[-1]} as "
            f"{name}hidden has, but its shape is {head.shape}"
        )
    padded = head.shape[axis]
    if vocab_size is not None and not 0 < vocab_size <= padded:
        raise ValueError(
            f"vocab_size must lie in [1, {padded}], the columns of {name}head, "
            f"but it is {vocab_size}"
        )
    return padded if vocab_size is None else vocab_size


def check_two_heads(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    head_layout: str,
    vocab_size: int | None,
) -> int:
    """Raise ValueError unless two (hidden, head) fit each other; the columns that count."""
    columns = [
        check_head("student_", *student, head_layout, vocab_size),
        check_head("teacher_", *teacher, head_layout, vocab_size),
    ]
    if columns[0] != columns[1]:
        raise ValueError(
            f"student_head and teacher_head must have one vocabulary, but they have {columns[0]} "
            f"and {columns[1]} columns: if they share the first ones, say how many by vocab_size"
        )
    if student[0].shape[:-1] != teacher[0].shape[:-1]:
        raise ValueError(
            f"teacher_hidden must have leading shape {student[0].shape[:-1]} as "
            f"student_hidden has, but its shape is {teacher[0].shape}"
        )
    return columns[0]


def check_chunk(name: str, value: int | None) -> None:
    """Raise ValueError unless a chunk size is None or a whole number above 0."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number above 0 or None, but it is {value!r}")
