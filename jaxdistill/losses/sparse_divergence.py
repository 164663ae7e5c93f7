"""Forward KL divergence when only the teacher's k largest probabilities at each position are known.

`sampled_forward_kl` takes random draws from the teacher instead, and has no bias.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.kernels.linear_divergence import top_k
from jaxdistill.kernels.linear_divergence.records import check_ids, check_log_probs
from jaxdistill.losses import checks
from jaxdistill.losses.distribution import log_softmax, times_temperature_squared


class TeacherTopK(NamedTuple):
    """What `top_k_teacher` returns: `ids` int32 and `log_probs` float32, both `[..., K]`."""

    ids: jax.Array
    log_probs: jax.Array


def top_k_teacher(
    teacher_logits: jax.typing.ArrayLike,
    k: int,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> TeacherTopK:
    """The k most likely tokens of each position with their log-probabilities, largest first.

        (ids_k, log P[ids_k]),  P = softmax(teacher_logits / temperature)

    The log-probabilities are those among the whole vocabulary and do not sum to 1. No gradient
    flows into them.

    Args:
      teacher_logits: `[..., V]`; -inf is a column of probability 0, and gives -inf.
      k: at least 1 and at most vocab_size.
      temperature: scalar above 0; the one the student will be compared at.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      TeacherTopK(ids, log_probs), each `[..., K]`, in nats; 6 bytes an entry when stored in
      int32 and float16.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import top_k_teacher
      >>> ids, log_probs = top_k_teacher(np.log(np.array([0.2, 0.5, 0.3])), 2)
      >>> print(ids, np.exp(log_probs).round(4))
      [1 2] [0.5 0.3]
    """
    log_p = lax.stop_gradient(
        log_softmax("teacher_logits", teacher_logits, temperature, vocab_size)
    )
    checks.check_between("k", k, 1, log_p.shape[-1])
    log_probs, ids = lax.top_k(log_p, k)
    return TeacherTopK(ids.astype(jnp.int32), log_probs)


def topk_forward_kl(
    student_logits: jax.typing.ArrayLike,
    ids: jax.typing.ArrayLike,
    teacher_log_probs: jax.typing.ArrayLike,
    *,
    tail: str = "bucket",
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Forward KL divergence from the k largest probabilities of the teacher: see `top_k_teacher`.

        "bucket":      sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)
        "ignore":      sum_k p_k log(p_k / q_k)
        "renormalise": sum_k p'_k log(p'_k / q_k),  p' = p / sum_k p_k
        p = exp(teacher_log_probs), q = softmax(student_logits / temperature)[ids]
        p_rest = 1 - sum_k p_k, q_rest = 1 - sum_k q_k        (* temperature^2)

    "bucket" is at most the divergence over the whole vocabulary, and 0 and stationary where Q = P.
    Right on the ids and in the mass of the rest, it leaves the shape of the rest untrained: there
    the student keeps its own proportions. With "ignore" and "renormalise" (DistillKit's default)
    the student is biased: at best it has q = p / sum_k p_k on the ids and 0 elsewhere, sure of
    itself beyond its teacher, and where Q = P the gradient is not 0. "ignore" differs from
    "renormalise" in that a position weighs sum_k p_k, and in sinking below 0.

    q_rest is summed over the other columns, not subtracted from 1, so value and gradient hold
    where the student's mass on the ids rounds to 1. In such a place TRL's bucket, clamped to 1e-7,
    gives no gradient, and that of DistillKit ("symmetric_uniform") is infinite or NaN.

    No gradient flows into the teacher or the temperature.

    Args:
      student_logits: `[..., V]`.
      ids: `[..., K]` integers in [0, vocab_size), no used one twice at a position: outside jit
        others raise, inside jit they give NaN, which a mask removes.
      teacher_log_probs: `[..., K]` log-probabilities among the whole vocabulary, at the same
        temperature; those of another one lack its normaliser. -inf marks a place that is not
        used, whatever its id.
      tail: "bucket", "ignore" or "renormalise".
      temperature: scalar above 0, of the student's logits.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats. Where K = vocab_size each tail gives `forward_kl`.

    Raises:
      ValueError: an argument of the wrong shape, type or range; log-probabilities that sum to more
        than 1, if they can be seen.

    Source: the biases, arXiv 2503.16870.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import topk_forward_kl
      >>> student, ids, log_p = np.zeros((1, 4)), np.array([[2]]), np.log(np.array([[0.4]]))
      >>> print(topk_forward_kl(student, ids, log_p).round(4))  # 0.4 log 1.6 + 0.6 log 0.8
      [0.0541]
      >>> print(topk_forward_kl(student, ids, log_p, tail="renormalise").round(4))  # log 4
      [1.3863]
    """
    checks.check_option("tail", tail, top_k.TAILS)
    log_q = log_softmax("student_logits", student_logits, temperature, vocab_size)
    log_q_k = values_at(log_q, ids)
    log_p_k = checks.as_tokens("teacher_log_probs", teacher_log_probs, log_q_k.shape)
    check_log_probs(ids, teacher_log_probs)
    ids = jnp.asarray(ids, jnp.int32)
    log_q_rest = _log_rest(log_q, ids, log_p_k > -jnp.inf) if tail == "bucket" else None
    loss = top_k.of_log_probs(
        log_q_k, log_q_rest, ids, log_p_k, kind="forward_kl", share=None, tail=tail
    )
    return times_temperature_squared(loss, temperature, scale_by_temperature_squared)


def values_at(values: jax.Array, ids: jax.typing.ArrayLike) -> jax.Array:
    """values[..., ids] -> `[..., K]`, with `label_value`'s treatment of an id out of range."""
    check_ids(ids, values.shape[:-1], values.shape[-1])
    ids = jnp.asarray(ids, jnp.int32)
    index = jnp.clip(ids, 0, values.shape[-1] - 1)
    return jnp.where(index == ids, jnp.take_along_axis(values, index, axis=-1), jnp.nan)


def _log_rest(log_q: jax.Array, ids: jax.Array, used: jax.Array) -> jax.Array:
    """log of the sum of Q over all columns but the used ids, -inf where no other has mass."""
    index = jnp.where(used, ids, log_q.shape[-1])  # out of range, and dropped
    rest = jnp.put_along_axis(log_q, index, -jnp.inf, axis=-1, inplace=False, mode="drop")
    exists = jnp.any(rest > -jnp.inf, axis=-1)
    # Where all is -inf the derivative of logsumexp is 0 / 0.
    log_sum = jax.nn.logsumexp(jnp.where(exists[..., None], rest, 0.0), axis=-1)
    return jnp.where(exists, log_sum, -jnp.inf)
