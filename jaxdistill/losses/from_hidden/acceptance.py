"""Acceptance of a drafter's tokens from hidden states, beside `from_hidden.total_variation`."""

from typing import Unpack

import jax
import jax.numpy as jnp

from jaxdistill.losses import acceptance, checks
from jaxdistill.losses.distribution import student_and_teacher
from jaxdistill.losses.from_hidden.divergence import TileOptions, over_student_and_teacher


def log_acceptance(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    **options: Unpack[TileOptions],
) -> jax.Array:
    """How unlikely a drafted token is to be accepted, from hidden states: `losses.log_acceptance`.

        -log sum_v min(P_v, Q_v)

    Arguments, result, errors and stopped gradients are those of `from_hidden.adaptive_kl`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.eye(2, dtype=np.float32), np.zeros((2, 2), np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> print(from_hidden.log_acceptance(hidden[:1], head, hidden[:1], teacher_head).round(4))
      [0.5108]
    """

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return acceptance.log_acceptance(student, teacher, temperature=temperature)

    models = student_hidden, student_head, teacher_hidden, teacher_head
    return over_student_and_teacher(loss, *models, **options)


def tvd_plus_plus(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None = None,
    *,
    key: jax.Array | None = None,
    num_samples: int = 16,
    statistics: str = "student",
    axis_name: str | tuple[str, ...] | None = None,
    temperature: jax.typing.ArrayLike = 1.0,
    **options: Unpack[TileOptions],
) -> jax.Array:
    """TVD++ from hidden states; see `losses.tvd_plus_plus`.

        exact:   -sum_v Q_v A_v
        sampled: -(1/K) sum_k A_{a_k} log Q_{a_k},  a_1 .. a_K ~ Q independently

    A key draws the same samples as in the logits form. The rewards of all tiles are normalised
    together.

    Args:
      student_hidden, student_head, teacher_hidden, teacher_head: as for `from_hidden.forward_kl`.
      mask, key, num_samples, statistics, axis_name, temperature: see `losses.tvd_plus_plus`.
      vocab_size, student_soft_cap, teacher_soft_cap, head_layout: as for `from_hidden.forward_kl`.

    Returns:
      `[...]`, float32.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.eye(2, dtype=np.float32), np.zeros((2, 2), np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> values = from_hidden.tvd_plus_plus(hidden, head, hidden, teacher_head)
      >>> print(np.asarray(values).round(4))
      [-0.5774  0.5774]
    """
    acceptance.check_rewards(num_samples, statistics)
    shape = jnp.shape(student_hidden)[:-1]
    keep = checks.as_tokens("mask", jnp.ones(shape, bool) if mask is None else mask, shape) != 0
    models = student_hidden, student_head, teacher_hidden, teacher_head

    def exact(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_q, log_p = student_and_teacher(student, teacher, temperature, None)
        return acceptance.certain_tokens(log_q, log_p, statistics)

    def sampled(
        student: jax.Array, teacher: jax.Array, uniform: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_q, log_p = student_and_teacher(student, teacher, temperature, None)
        return acceptance.sampled_rewards(log_q, log_p, uniform, statistics)

    if key is None:
        mass, reward = over_student_and_teacher(exact, *models, **options)
        return acceptance.normalised_exact(mass, reward, keep, axis_name)
    drawn = {"uniform": jax.random.uniform(key, (*shape, num_samples))}
    scores, rewards, reward = over_student_and_teacher(sampled, *models, drawn, **options)
    return acceptance.normalised_sampled(scores, rewards, reward, keep, axis_name)
