"""FIRST: the teacher's k largest probabilities, recalibrated, against the student's of those k."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdistill.kernels.linear_divergence.records import check_distinct, check_sums, stands_twice
from jaxdistill.losses import checks
from jaxdistill.losses.distribution import expectation
from jaxdistill.losses.sparse_divergence import topk_forward_kl, values_at


def recalibrate_top_k(
    probabilities: jax.typing.ArrayLike,
    *,
    method: str = "temperature",
    temperature: jax.typing.ArrayLike = 1.0,
    delta: jax.typing.ArrayLike = 0.1,
) -> jax.Array:
    """Make a teacher that is too sure of itself trustworthy, from its k largest probabilities.

        "temperature":     softmax(p / temperature)
        "label_smoothing": p' / sum_k p'_k,  p'_k = p_k + delta / (K - 1),
        but p'_k = max(p_k - delta, 0) for the largest

    The temperature acts on the probabilities, not on logits: at 1 no entry exceeds another by more
    than a factor e. Choose it between 0.05 and 1 by the teacher's calibration error on held-out
    data. No gradient flows into the result.

    Args:
      probabilities: `[..., K]`, at least 0; where they sum to less than 1 the rest is forgotten.
      method: "temperature", which the paper chose, or "label_smoothing".
      temperature: scalar above 0; the smaller, the sharper. Of no effect on the other method.
      delta: scalar in [0, 1], what the largest loses. Of no effect on the other method.

    Returns:
      `[..., K]`, float32, probabilities with sum 1.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2408.12168.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import recalibrate_top_k
      >>> p = np.array([0.9, 0.05, 0.0])
      >>> print(np.asarray(recalibrate_top_k(p, temperature=0.3)).round(4))
      [0.902  0.0531 0.0449]
      >>> smooth = recalibrate_top_k(p, method="label_smoothing", delta=0.1)
      >>> print(np.asarray(smooth).round(4))  # 0.8, 0.1 and 0.05 over their sum
      [0.8421 0.1053 0.0526]
    """
    checks.check_option("method", method, ("temperature", "label_smoothing"))
    checks.check_positive("temperature", temperature)
    checks.check_between("delta", delta, 0.0, 1.0)
    p = lax.stop_gradient(checks.as_logits("probabilities", probabilities, None))
    check_probabilities("probabilities", probabilities)
    if method == "temperature":
        return jax.nn.softmax(p / lax.stop_gradient(jnp.asarray(temperature, jnp.float32)))
    k = p.shape[-1]
    if k < 2:
        raise ValueError(f"probabilities must have at least 2 entries to smooth, but they have {k}")
    moved = lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    place = lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1)
    largest = place == jnp.argmax(p, axis=-1, keepdims=True)
    smooth = jnp.where(largest, jnp.maximum(p - moved, 0.0), p + moved / (k - 1))
    return smooth / jnp.sum(smooth, axis=-1, keepdims=True)


def first(
    student_logits: jax.typing.ArrayLike,
    ids: jax.typing.ArrayLike,
    teacher_probabilities: jax.typing.ArrayLike,
    *,
    other_bucket: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """FIRST's divergence of the student from the teacher's k largest probabilities.

        sum_k p'_k log(p'_k / q'_k),  p' = p / sum_k p_k,  q' = softmax(student_logits[ids])
        with other_bucket: sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)
        q = softmax(student_logits)[ids], p_rest = 1 - sum_k p_k, q_rest = 1 - sum_k q_k

    Without the bucket both sides are renormalised over the k, so logits outside the ids get no
    gradient and the student's mass there is free: log it. Tunix's top-k distillation renormalises
    both sides too, at a temperature, as TRL's server distillation does without its tail. With it,
    this is `topk_forward_kl`; the authors' code hands its bucket and the k to kl_div without a
    logarithm, which is no divergence and does not rest where Q = P. Without it the authors' code
    adds 1e-6 to each of the k. `recalibrate_top_k` makes numbers with sum 1, which leave the bucket
    empty: multiply them by the mass of the teacher's k.

    No gradient flows into the teacher. The paper sums over tokens and averages over sequences.

    Args:
      student_logits: `[..., V]`.
      ids: `[..., K]` integers in [0, vocab_size), none twice at a position: outside jit others
        raise, inside jit they give NaN, which a mask removes.
      teacher_probabilities: `[..., K]`, at least 0 and with a sum of at most 1.
      other_bucket: whether all other tokens are one more entry on both sides, where nothing is
        renormalised.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats; 0 where the student agrees.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2408.12168.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import first
      >>> ids, p = np.array([[2, 0]]), np.array([[0.6, 0.2]])
      >>> print(first(np.zeros((1, 4)), ids, p).round(4))  # log 2 - entropy of (3/4, 1/4)
      [0.1308]
      >>> print(first(np.zeros((1, 4)), ids, p, other_bucket=True).round(4))
      [0.2974]
    """
    logits = values_at(checks.as_logits("student_logits", student_logits, vocab_size), ids)
    p = checks.as_tokens("teacher_probabilities", teacher_probabilities, logits.shape)
    check_probabilities("teacher_probabilities", teacher_probabilities)
    check_distinct(ids, np.ones(logits.shape, bool))
    if other_bucket:
        return topk_forward_kl(student_logits, ids, jnp.log(p), vocab_size=vocab_size)
    return of_scores(logits, jnp.asarray(ids), p)


def of_scores(scores: jax.Array, ids: jax.Array, p: jax.Array) -> jax.Array:
    """The divergence without the bucket, of logits or log-probabilities at the ids `[..., K]`."""
    mass = jnp.sum(p, axis=-1, keepdims=True)
    log_p = lax.stop_gradient(jnp.log(p / jnp.where(mass > 0, mass, 1.0)))
    loss = expectation(log_p, log_p - jax.nn.log_softmax(scores))
    return jnp.where(stands_twice(ids, jnp.ones(ids.shape, bool)), jnp.nan, loss)


def check_probabilities(name: str, probabilities: jax.typing.ArrayLike) -> None:
    """Raise ValueError if concrete numbers are below 0 or their sum is above 1."""
    if not checks.is_concrete(probabilities):
        return
    with jax.ensure_compile_time_eval():  # they may be constants of a traced function
        numbers = jax.device_get(jnp.asarray(probabilities).astype(jnp.float32))
    if (numbers < 0).any():
        raise ValueError(
            f"{name} must be at least 0, but {numbers[numbers < 0][0]} is among them: "
            "take exp of log-probabilities"
        )
    check_sums(name, numbers)
