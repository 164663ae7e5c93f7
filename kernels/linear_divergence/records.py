"""A teacher recorded as its top k, `[..., K]` ids and log-probabilities: what a record must be."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments

# What half-precision records may add to a sum of probabilities by rounding.
ROUNDING = 0.02


def check_ids(ids: jax.typing.ArrayLike, leading: tuple[int, ...], vocab_size: int) -> None:
    """Raise ValueError unless ids are integers `[*leading, K]` in the vocabulary, where seen."""
    if jnp.ndim(ids) < 1 or jnp.shape(ids)[-1] < 1:
        raise ValueError(
            f"ids must have shape [..., K] with K at least 1, but the shape is {jnp.shape(ids)}"
        )
    arguments.check_labels("ids", ids, (*leading, jnp.shape(ids)[-1]), vocab_size)


def check_log_probs(ids: jax.typing.ArrayLike, log_probs: jax.typing.ArrayLike) -> None:
    """Raise ValueError for concrete records that are no part of a distribution."""
    if not arguments.is_concrete(log_probs):
        return
    with jax.ensure_compile_time_eval():  # they may be constants of a traced function
        numbers = jnp.asarray(log_probs).astype(jnp.float32)
        probabilities, used = jnp.exp(numbers), numbers > -jnp.inf
    check_sums("exp(teacher_log_probs)", probabilities)
    check_distinct(ids, used)


def check_sums(name: str, probabilities: jax.typing.ArrayLike) -> None:
    """Raise ValueError if the last axis sums to more than 1 anywhere: logits, or another scale."""
    sums = jax.device_get(probabilities).sum(axis=-1, dtype="float64")
    largest = sums.max(initial=0.0)
    if largest > 1 + ROUNDING:
        raise ValueError(
            f"{name} must sum to at most 1 at each position, but a sum is {largest:.4g}"
        )


def check_distinct(ids: jax.typing.ArrayLike, used: jax.typing.ArrayLike) -> None:
    """Raise ValueError if a concrete id stands in two used places of a position."""
    if not (arguments.is_concrete(ids) and arguments.is_concrete(used)):
        return
    with jax.ensure_compile_time_eval():  # they may be constants of a traced function
        twice = jax.device_get(stands_twice(ids, used))
    if twice.any():
        place = twice.argmax()  # of the first, in the flattened array
        position = tuple(
            int(place // math.prod(twice.shape[axis + 1 :]) % twice.shape[axis])
            for axis in range(twice.ndim)
        )
        raise ValueError(f"ids must differ at each position, but one stands twice at {position}")


def stands_twice(ids: jax.typing.ArrayLike, used: jax.typing.ArrayLike) -> jax.Array:
    """Whether an id stands in two used places of a position, `[..., K]` -> `[...]`."""
    ids = jnp.asarray(ids, jnp.int32)
    place = lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    ordered = jnp.sort(jnp.where(used, ids, -1 - place), axis=-1)
    return jnp.any(ordered[..., 1:] == ordered[..., :-1], axis=-1)
