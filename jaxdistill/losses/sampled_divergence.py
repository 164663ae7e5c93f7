"""Forward KL divergence from random draws of the teacher: sparse as its top k, without a bias."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import log_softmax, times_temperature_squared
from jaxdistill.losses.sampling import draw_at
from jaxdistill.losses.sparse_divergence import values_at


class TeacherSamples(NamedTuple):
    """What `sample_teacher` returns: `ids` int32, `weights` and `log_probs` float32, `[..., N]`."""

    ids: jax.Array
    weights: jax.Array
    log_probs: jax.Array


def sample_teacher(
    teacher_logits: jax.typing.ArrayLike,
    num_samples: int,
    key: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    proposal_power: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> TeacherSamples:
    """Random tokens of each position of the teacher, for `sampled_forward_kl`.

        id_1 .. id_N ~ P' independently,  w_i = P[id_i] / (N P'[id_i])
        P = softmax(teacher_logits / temperature), P' = P^proposal_power / sum_v P_v^proposal_power

    On average sum_i w_i f(id_i) is sum_v P_v f(v), for every f. Weights divided by their own sum,
    as the paper has them, are biased by about 1 / N where the power is not 1. No gradient flows
    into the result. Inside shard_map pass a key that differs by device, or all draw the same
    numbers.

    Args:
      teacher_logits: `[..., V]`; -inf is a column of probability 0.
      num_samples: N, at least 1; the paper's 50 are about 12 different ids.
      key: of jax.random.
      temperature: scalar above 0; the one the student will be compared at.
      proposal_power: scalar above 0; 1 draws from the teacher itself, with weights 1 / N, less
        meets the rare tokens more often.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      TeacherSamples(ids, weights, log_probs), each `[..., N]`; log_probs are log P[ids] in nats.
      An id drawn twice stands there twice.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2503.16870.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from jaxdistill.losses import sample_teacher
      >>> teacher = np.array([0.0, -np.inf, -np.inf])
      >>> ids, weights, log_probs = sample_teacher(teacher, 4, jax.random.key(0))
      >>> print(ids, weights, log_probs)
      [0 0 0 0] [0.25 0.25 0.25 0.25] [0. 0. 0. 0.]
    """
    checks.check_positive("proposal_power", proposal_power)
    checks.check_between("num_samples", num_samples, 1, float("inf"))
    log_p = lax.stop_gradient(
        log_softmax("teacher_logits", teacher_logits, temperature, vocab_size)
    )
    uniform = jax.random.uniform(key, (*log_p.shape[:-1], num_samples))
    return records_at(uniform, log_p, proposal_power)


def records_at(
    uniform: jax.Array, log_p: jax.Array, proposal_power: jax.typing.ArrayLike
) -> TeacherSamples:
    """The records that uniform numbers `[..., N]` stand for, of a teacher `[..., V]`."""
    power = lax.stop_gradient(jnp.asarray(proposal_power, jnp.float32))
    log_proposal = jax.nn.log_softmax(power * log_p)
    ids = draw_at(uniform, log_proposal)
    log_probs = values_at(log_p, ids)
    ratio = jnp.exp(log_probs - values_at(log_proposal, ids))
    # Rounding may draw a token of probability 0: it counts for nothing.
    weights = jnp.where(log_probs > -jnp.inf, ratio / uniform.shape[-1], 0.0)
    return TeacherSamples(ids, weights, log_probs)


def sampled_forward_kl(
    student_logits: jax.typing.ArrayLike,
    ids: jax.typing.ArrayLike,
    weights: jax.typing.ArrayLike | None = None,
    teacher_log_probs: jax.typing.ArrayLike | None = None,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Forward KL divergence from tokens drawn from the teacher, as `sample_teacher` draws them.

        sum_i w_i (log P[id_i] - log Q[id_i])        (* temperature^2)
        without teacher_log_probs: -sum_i w_i log Q[id_i]
        Q = softmax(student_logits / temperature)

    Over the draws its gradient averages to that of `forward_kl`, and so does its value with
    teacher_log_probs; without them the average is the cross-entropy, which exceeds it by the
    teacher's entropy. One value may be below 0. No gradient flows into the records or the
    temperature. Records of equal ids may be joined, with the sum of their weights.

    Args:
      student_logits: `[..., V]`.
      ids: `[..., N]` integers in [0, vocab_size): outside jit others raise, inside jit they give
        NaN, which a mask removes.
      weights: `[..., N]`; 0 marks a place that is not used. Default 1 / N, for ids drawn from the
        teacher itself.
      teacher_log_probs: `[..., N]`, log P[id_i] at the same temperature. Default none.
      temperature: scalar above 0, of the student's logits.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2503.16870.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from jaxdistill.losses import sample_teacher, sampled_forward_kl
      >>> teacher = np.log(np.array([0.5, 0.5, 1e-30, 1e-30]))
      >>> records = sample_teacher(teacher, 8, jax.random.key(0))
      >>> print(sampled_forward_kl(np.zeros(4), *records).round(4))  # log(4) - log(2)
      0.6931
    """
    log_q = values_at(log_softmax("student_logits", student_logits, temperature, vocab_size), ids)
    loss = of_log_probs(log_q, weights, teacher_log_probs)
    return times_temperature_squared(loss, temperature, scale_by_temperature_squared)


def of_log_probs(
    log_q: jax.Array,
    weights: jax.typing.ArrayLike | None,
    teacher_log_probs: jax.typing.ArrayLike | None,
) -> jax.Array:
    """`sampled_forward_kl` of the student's log-probabilities at the ids, `[..., N]`."""
    if weights is None:
        weights = jnp.full(log_q.shape, 1 / log_q.shape[-1], jnp.float32)
    weights = lax.stop_gradient(checks.as_tokens("weights", weights, log_q.shape))
    score = -log_q
    if teacher_log_probs is not None:
        log_p = checks.as_tokens("teacher_log_probs", teacher_log_probs, log_q.shape)
        score += lax.stop_gradient(log_p)
    return jnp.sum(weights * jnp.where(weights != 0, score, 0.0), axis=-1)
