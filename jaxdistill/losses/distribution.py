"""The float32 softmax every loss stands on, and what it does with -inf and with padding."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks


def log_softmax(
    name: str,
    logits: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
    vocab_size: int | None,
) -> jax.Array:
    """Checked `[..., V]` logits -> float32 log-probabilities `[..., vocab_size]`.

    The temperature is a constant, as it is in the hidden-state forms: no gradient flows into it.
    """
    checks.check_positive("temperature", temperature)
    logits = checks.as_logits(name, logits, vocab_size)
    return jax.nn.log_softmax(logits / lax.stop_gradient(jnp.asarray(temperature, jnp.float32)))


def student_and_teacher(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
    vocab_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities (log Q, log P) of one shape; no gradient flows into the teacher's."""
    log_q = log_softmax("student_logits", student_logits, temperature, vocab_size)
    log_p = log_softmax("teacher_logits", teacher_logits, temperature, vocab_size)
    checks.check_same_shape("teacher_logits", log_p, "student_logits", log_q)
    return log_q, lax.stop_gradient(log_p)


def expectation(log_p: jax.Array, values: jax.Array) -> jax.Array:
    """sum_v p_v values_v -> `[...]`; a column where log_p = -inf counts for nothing."""
    safe = jnp.where(log_p > -jnp.inf, values, 0.0)
    return jnp.sum(jnp.exp(log_p) * safe, axis=-1)


def times_temperature_squared(
    values: jax.Array, temperature: jax.typing.ArrayLike, wanted: bool
) -> jax.Array:
    """The values, if wanted times the square of the temperature, which is a constant."""
    if not wanted:
        return values
    return values * lax.stop_gradient(jnp.asarray(temperature, jnp.float32)) ** 2


def label_value(values: jax.Array, labels: jax.typing.ArrayLike) -> jax.Array:
    """values[..., label] -> `[...]`.

    A label outside the vocabulary raises where it can be seen; under jit it gives NaN, not the
    value of some other label.
    """
    vocab_size = values.shape[-1]
    checks.check_labels("labels", labels, values.shape[:-1], vocab_size)
    labels = jnp.asarray(labels, jnp.int32)
    index = jnp.clip(labels, 0, vocab_size - 1)
    picked = jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
    return jnp.where(index == labels, picked, jnp.nan)
