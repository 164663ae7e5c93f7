"""Checks of the losses' arguments: one sentence with the argument, what was expected and given.

They run before anything is compiled. Shapes and types are always checked; values only where they
can be seen, which is outside jit, vmap and grad.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.kernels.arguments import check_labels, check_positive, is_concrete

__all__ = [
    "as_logits",
    "as_segments",
    "as_tokens",
    "check_between",
    "check_labels",
    "check_option",
    "check_positive",
    "check_same_shape",
    "is_concrete",
]


def as_logits(name: str, logits: jax.typing.ArrayLike, vocab_size: int | None) -> jax.Array:
    """Floating `[..., V]` as float32 `[..., vocab_size]`: the columns of a padding cut off."""
    logits = jnp.asarray(logits)
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating with shape [..., V], "
            f"but it is {logits.dtype} with shape {logits.shape}"
        )
    if vocab_size is not None and not 0 < vocab_size <= logits.shape[-1]:
        raise ValueError(
            f"vocab_size must lie in [1, {logits.shape[-1]}], the columns of {name}, "
            f"but it is {vocab_size}"
        )
    return logits[..., :vocab_size].astype(jnp.float32)


def as_tokens(name: str, values: jax.typing.ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Numbers or booleans of exactly this shape, as float32."""
    values = jnp.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but its shape is {values.shape}")
    return values.astype(jnp.float32)


def as_segments(segment_ids: jax.typing.ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Integers of exactly this shape, as int32."""
    ids = jnp.asarray(segment_ids)
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers with shape {shape}, "
            f"but they are {ids.dtype} with shape {ids.shape}"
        )
    return ids.astype(jnp.int32)


def check_same_shape(name: str, array: jax.Array, other_name: str, other: jax.Array) -> None:
    """Raise ValueError unless both shapes are equal."""
    if array.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {other.shape}, "
            f"but its shape is {array.shape}"
        )


def check_between(name: str, value: jax.typing.ArrayLike, low: float, high: float) -> None:
    """Raise ValueError unless a concrete scalar lies in [low, high]; a tracer passes unseen."""
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, but its shape is {jnp.shape(value)}")
    if is_concrete(value) and not low <= float(np.asarray(value)) <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], but it is {value}")


def check_option(name: str, value: str, options: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the named options."""
    if value not in options:
        allowed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name} must be one of {allowed}, but it is {value!r}")
