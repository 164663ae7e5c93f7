"""Distillation from a teacher that has another tokenizer."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses.distribution import log_softmax


def universal_logit(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
) -> jax.Array:
    """Universal logit distillation: distance of sorted probabilities, whichever tokens they are of.

        sum_i |Q_(i) - P_(i)|,  Q_(1) >= Q_(2) >= ... the student's probabilities in order,
        P_(i) the teacher's; beyond the smaller vocabulary they are 0

    Which token is likely does not enter, only how likely the first, the second and so on are: it
    is added to a cross-entropy (times 1.5 in the paper), which says the former. No gradient flows
    into the teacher or the temperature.

    Positions are paired by their index. Of each answer take the logits that predict its tokens, in
    order, from place 0; the mask is 1 up to the end of the shorter answer, and may leave out the
    end-of-sequence token of the student, as was done for the paper, or of both. TRL's GOLD with its
    default "observed" alignment starts one place later: it leaves out the prediction of an
    answer's first token.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., U]`; -inf is a column of probability 0.
      temperature: scalar above 0, for both sides.
      student_vocab_size: the student's columns from here on are padding and do not exist; default
        all count.
      teacher_vocab_size: the teacher's likewise.

    Returns:
      `[...]`, float32, no unit, in [0, 2].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2402.12030.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import universal_logit
      >>> student = np.log(np.array([[0.25, 0.75]]))
      >>> teacher = np.log(np.array([[0.5, 0.25, 0.25]]))
      >>> print(universal_logit(student, teacher).round(4))  # 0.75 - 0.5, 0, 0.25 - 0
      [0.5]
    """
    log_q = log_softmax("student_logits", student_logits, temperature, student_vocab_size)
    log_p = log_softmax("teacher_logits", teacher_logits, temperature, teacher_vocab_size)
    if log_p.shape[:-1] != log_q.shape[:-1]:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits but for the vocabulary, "
            f"{(*log_q.shape[:-1], 'U')}, but its shape is {log_p.shape}"
        )
    columns = max(log_q.shape[-1], log_p.shape[-1])
    teacher = lax.stop_gradient(_sorted(log_p, columns))
    return jnp.sum(jnp.abs(_sorted(log_q, columns) - teacher), axis=-1)


def _sorted(log_p: jax.Array, columns: int) -> jax.Array:
    """Probabilities in descending order, with zeros up to so many columns."""
    ordered = jnp.sort(jnp.exp(log_p), axis=-1, descending=True)
    widths = [(0, 0)] * (log_p.ndim - 1) + [(0, columns - log_p.shape[-1])]
    return jnp.pad(ordered, widths)
