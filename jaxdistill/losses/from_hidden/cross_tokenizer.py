"""Universal logit distillation from hidden states."""

import jax

from jaxdistill.kernels.over_tokens import Model, over_tokens
from jaxdistill.losses import cross_tokenizer


def universal_logit(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    head_layout: str = "vd",
) -> jax.Array:
    """Universal logit distillation, a tile of tokens at a time; see `losses.universal_logit`.

        sum_i |Q_(i) - P_(i)|, both in descending order

    No gradient flows into the teacher or the temperature.

    Args:
      student_hidden, teacher_hidden: `[..., Ds]` and `[..., Dt]`, same leading shape.
      student_head, teacher_head: `[V, Ds]` and `[U, Dt]` ("vd") or their transposes ("dv").
      temperature, student_vocab_size, teacher_vocab_size: see `losses.universal_logit`.
      student_soft_cap, teacher_soft_cap: bounds of the raw logits; default no bound.
      head_layout: of both heads.

    Returns:
      `[...]`, float32, no unit, in [0, 2].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.ones((1, 1), np.float32)
      >>> student = np.log(np.array([[0.25], [0.75]], np.float32))
      >>> teacher = np.log(np.array([[0.5], [0.25], [0.25]], np.float32))
      >>> print(from_hidden.universal_logit(hidden, student, hidden, teacher).round(4))
      [0.5]
    """

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return cross_tokenizer.universal_logit(student, teacher, temperature=temperature)

    student = Model("student_", student_hidden, student_head, student_vocab_size, student_soft_cap)
    teacher = Model("teacher_", teacher_hidden, teacher_head, teacher_vocab_size, teacher_soft_cap)
    models = student, teacher._replace(frozen=True)
    return over_tokens(loss, models, head_layout=head_layout)
