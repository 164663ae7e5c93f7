"""TAID's target from hidden states: one head whose logits lie between two models'."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.kernels import arguments
from jaxdistill.losses import checks


class TaidTarget(NamedTuple):
    """What `taid_target` returns, to be taken as the teacher: `[..., Ds + Dt]` and its head."""

    hidden: jax.Array
    head: jax.Array


def taid_target(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    share: jax.typing.ArrayLike,
    *,
    vocab_size: int | None = None,
    head_layout: str = "vd",
) -> TaidTarget:
    """Hidden states and a head with the logits of `losses.taid_target`.

        ((1 - share) student_hidden, share teacher_hidden) and both heads side by side

    The product with the joint head is the sum of both: nothing else needs to know of TAID. Logits
    with a soft cap are no such product and have no such head. No gradient flows into the result.

    Args:
      student_hidden, student_head, teacher_hidden, teacher_head: as for `from_hidden.forward_kl`.
      share: scalar in [0, 1], the teacher's; it may be traced.
      vocab_size, head_layout: as for `from_hidden.forward_kl`.

    Returns:
      TaidTarget(hidden, head): hidden in float32, the head without padding, in the type of both
      heads or else in float32.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2501.16937.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2), np.float32), np.eye(2, dtype=np.float32)
      >>> target = from_hidden.taid_target(hidden, head, 3 * hidden, head, 0.25)
      >>> print(target.hidden @ target.head.T)
      [[1.5 1.5]]
    """
    checks.check_between("share", share, 0.0, 1.0)
    student = jnp.asarray(student_hidden), jnp.asarray(student_head)
    teacher = jnp.asarray(teacher_hidden), jnp.asarray(teacher_head)
    columns = arguments.check_two_heads(student, teacher, head_layout, vocab_size)
    axis = arguments.VOCABULARY_AXIS[head_layout]
    share = jnp.asarray(share, jnp.float32)
    heads = [lax.slice_in_dim(head, 0, columns, axis=axis) for _, head in (student, teacher)]
    if heads[0].dtype != heads[1].dtype:
        heads = [head.astype(jnp.float32) for head in heads]
    # Scaled in float32: a share rounded to bfloat16 would be that of another step.
    scaled = (1 - share) * student[0].astype(jnp.float32), share * teacher[0].astype(jnp.float32)
    hidden = jnp.concatenate(scaled, axis=-1)
    return TaidTarget(*lax.stop_gradient((hidden, jnp.concatenate(heads, axis=1 - axis))))
