"""TAID: a teacher that starts as the student itself and moves towards the true one."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks


def taid_target(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    share: jax.typing.ArrayLike,
    *,
    vocab_size: int | None = None,
) -> jax.Array:
    """Logits between the student's and the teacher's, for a divergence to take as its teacher.

        stop_gradient((1 - share) student_logits + share teacher_logits)

    The loss is `forward_kl(student_logits, taid_target(...))`, with a temperature if wished; the
    share rises to 1 in training, in the paper from 0.4. The authors' code takes the cross-entropy
    instead of the divergence: the gradient is the same, but the value that its share is steered by
    contains the entropy of the target. A column that is -inf on a side with a share above 0 is
    -inf; a side with share 0 does not count, be it -inf. No gradient flows into the result.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., V]`.
      share: scalar in [0, 1], the teacher's; it may be traced.
      vocab_size: columns from here on are padding and are cut off; the two paddings may differ.
        Default all count.

    Returns:
      `[..., vocab_size]`, float32, logits.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2501.16937.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import forward_kl, taid_target
      >>> student, teacher = np.array([0.0, 2.0]), np.array([4.0, -np.inf])
      >>> print(taid_target(student, teacher, 0.25))
      [  1. -inf]
      >>> print(forward_kl(student, taid_target(student, teacher, 0.0)))
      0.0
    """
    checks.check_between("share", share, 0.0, 1.0)
    student = checks.as_logits("student_logits", student_logits, vocab_size)
    teacher = checks.as_logits("teacher_logits", teacher_logits, vocab_size)
    checks.check_same_shape("teacher_logits", teacher, "student_logits", student)
    share = jnp.asarray(share, jnp.float32)
    return lax.stop_gradient(_part(1 - share, student) + _part(share, teacher))


def _part(weight: jax.Array, logits: jax.Array) -> jax.Array:
    """weight * logits, and 0 where the weight is, also of -inf."""
    return jnp.where(weight == 0, 0.0, weight * logits)
