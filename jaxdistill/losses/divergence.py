"""Divergences of a student's distribution from a teacher's, at every position.

P is the teacher's and Q the student's softmax(logits / temperature). The gradient of a divergence
shrinks by 1 / temperature^2 when the temperature is high; `scale_by_temperature_squared` undoes
that where the divergence is added to a cross-entropy at temperature 1.
"""

import jax
import jax.numpy as jnp

from jaxdistill.losses.distribution import expectation, student_and_teacher


def forward_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Forward KL divergence KL(P || Q): the student must cover all the teacher does.

        sum_v P_v (log P_v - log Q_v)        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., V]`; -inf is a column of probability 0, and contributes nothing.
      temperature: scalar above 0, for both sides.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
        Default all count.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1503.02531.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import forward_kl
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(forward_kl(np.zeros((1, 2)), teacher).round(4))  # log 2 - entropy of the teacher
      [0.3681]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    divergence = expectation(log_p, log_p - log_q)
    return _scaled(divergence, temperature, scale_by_temperature_squared)


def reverse_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Reverse KL divergence KL(Q || P): the student must stay where the teacher is.

        sum_v Q_v (log Q_v - log P_v)        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., V]`; the sum leaves out columns where it is -inf, in which the
        divergence proper is infinite.
      temperature: scalar above 0, for both sides.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
        Default all count.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2306.08543.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import reverse_kl
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(reverse_kl(np.zeros((1, 2)), teacher).round(4))
      [0.5108]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    divergence = expectation(log_q, jnp.where(log_p > -jnp.inf, log_q - log_p, 0.0))
    return _scaled(divergence, temperature, scale_by_temperature_squared)


def _scaled(
    divergence: jax.Array, temperature: jax.typing.ArrayLike, by_temperature_squared: bool
) -> jax.Array:
    if not by_temperature_squared:
        return divergence
    return divergence * jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32)) ** 2
