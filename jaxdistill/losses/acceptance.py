"""Total variation: how often speculative decoding rejects what a draft model, the student, says.

A token v drafted from Q is accepted with probability min(1, P_v / Q_v), so on the whole with
sum_v min(P_v, Q_v) = 1 - total_variation. P is the target's (the teacher's) and Q the drafter's
softmax(logits / temperature), both at the temperature one decodes with.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import student_and_teacher
from jaxdistill.losses.divergence import of_mixture
from jaxdistill.losses.sampling import draw_at

AxisName = str | tuple[str, ...]

MIN_DEVIATION = 1e-6


def total_variation(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Total variation distance: the probability that a drafted token is rejected.

        sum_v |P_v - Q_v| / 2 = 1 - sum_v min(P_v, Q_v)

    Where Q gives almost nothing to what P wants the gradient vanishes: start from a student that
    `forward_kl` has trained. No gradient flows into the teacher or the temperature.

    Args:
      student_logits, teacher_logits, vocab_size: as for `forward_kl`.
      temperature: scalar above 0, for both sides.

    Returns:
      `[...]`, float32, in [0, 1].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2403.00858.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import total_variation
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(np.asarray(total_variation(np.zeros((1, 2)), teacher)).round(4))
      [0.4]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    return of_mixture("total_variation", log_q, log_p, 0.0)


def log_acceptance(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """How unlikely a drafted token is to be accepted, with a gradient however unlikely it is.

        -log sum_v min(P_v, Q_v)

    No gradient flows into the teacher or the temperature.

    Args:
      student_logits, teacher_logits, temperature, vocab_size: as for `total_variation`.

    Returns:
      `[...]`, float32, nats; inf where logits of -inf leave no token to both.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: follows from arXiv 2403.00858; as an objective known as an LK loss.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import log_acceptance
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(log_acceptance(np.zeros((1, 2)), teacher).round(4))  # -log 0.6
      [0.5108]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    return -jax.nn.logsumexp(jnp.minimum(log_p, log_q), axis=-1)


def tvd_plus_plus(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None = None,
    *,
    key: jax.Array | None = None,
    num_samples: int = 16,
    statistics: str = "student",
    axis_name: AxisName | None = None,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """TVD++: total variation as a policy gradient, its reward normalised over the batch.

        exact:   -sum_v Q_v A_v
        sampled: -(1/K) sum_k A_{a_k} log Q_{a_k},  a_1 .. a_K ~ Q independently
        A = (r - mean) / max(deviation, 1e-6),  r_v = 1 if P_v > Q_v, else 0

    The reward says which tokens are certain to be accepted. The advantages A, and what is sampled,
    are constants. The exact form's gradient is that of `total_variation` over the deviation: the
    mean cancels, and helps the sampled form alone. Pass a new key at every step.

    Args:
      student_logits, teacher_logits, temperature, vocab_size: as for `total_variation`.
      mask: `[...]`, boolean: the positions whose rewards have their mean and deviation taken.
        Default all.
      key: of jax.random, for the sampled form; without it the exact form.
      num_samples: K, at least 1; without a key of no effect.
      statistics: "student" has the rewards weigh what the student gives them (of the sampled form:
        those of the samples), "vocabulary" all alike. Which one the paper means is unconfirmed.
      axis_name: mesh axes over which the batch is split, inside shard_map, for the statistics of
        all devices; by default each device has its own.

    Returns:
      `[...]`, float32; the exact form -A on average, the sampled one in nats. Not a divergence:
      only its gradient says anything.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2403.00858.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import tvd_plus_plus
      >>> teacher = np.log(np.array([[0.9, 0.1], [0.5, 0.5]]))
      >>> print(np.asarray(tvd_plus_plus(np.zeros((2, 2)), teacher)).round(4))
      [-0.5774  0.5774]
    """
    check_rewards(num_samples, statistics)
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    keep = jnp.ones(log_q.shape[:-1], bool) if mask is None else mask
    keep = checks.as_tokens("mask", keep, log_q.shape[:-1]) != 0
    if key is None:
        return normalised_exact(*certain_tokens(log_q, log_p, statistics), keep, axis_name)
    uniform = jax.random.uniform(key, (*log_q.shape[:-1], num_samples))
    samples = sampled_rewards(log_q, log_p, uniform, statistics)
    return normalised_sampled(*samples, keep, axis_name)


def check_rewards(num_samples: int, statistics: str) -> None:
    """Raise ValueError for options of `tvd_plus_plus` that do not exist."""
    checks.check_between("num_samples", num_samples, 1, float("inf"))
    checks.check_option("statistics", statistics, ("student", "vocabulary"))


def certain_tokens(
    log_q: jax.Array, log_p: jax.Array, statistics: str
) -> tuple[jax.Array, jax.Array]:
    """sum_v Q_v r_v and the mean reward, which is a constant, at each position."""
    reward = log_p > lax.stop_gradient(log_q)
    mass = jnp.sum(jnp.where(reward, jnp.exp(log_q), 0.0), axis=-1)
    if statistics == "student":
        return mass, lax.stop_gradient(mass)
    return mass, jnp.mean(reward.astype(jnp.float32), axis=-1)


def sampled_rewards(
    log_q: jax.Array, log_p: jax.Array, uniform: jax.Array, statistics: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log Q and reward of the samples, `[..., K]`, and the mean reward of each position."""
    still = lax.stop_gradient(log_q)
    reward = (log_p > still).astype(jnp.float32)
    drawn = draw_at(uniform, still)
    scores, rewards = (jnp.take_along_axis(x, drawn, axis=-1) for x in (log_q, reward))
    return scores, rewards, jnp.mean(rewards if statistics == "student" else reward, axis=-1)


def normalised_exact(
    mass: jax.Array, reward: jax.Array, keep: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    """-sum_v Q_v A_v: as Q sums to 1, the mean is subtracted from the sum."""
    mean, deviation = _moments(reward, keep, axis_name)
    return (mean - mass) / deviation


def normalised_sampled(
    scores: jax.Array,
    rewards: jax.Array,
    reward: jax.Array,
    keep: jax.Array,
    axis_name: AxisName | None,
) -> jax.Array:
    """-(1/K) sum_k A_k log Q_k."""
    mean, deviation = _moments(reward, keep, axis_name)
    return jnp.mean((mean - rewards) / deviation * scores, axis=-1)


def _moments(
    reward: jax.Array, keep: jax.Array, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
    """Mean of rewards that are 0 or 1, over all kept positions, and their deviation."""
    sums = jnp.sum(jnp.where(keep, reward, 0.0)), jnp.sum(keep.astype(jnp.float32))
    total, count = sums if axis_name is None else lax.psum(sums, axis_name)
    mean = total / jnp.maximum(count, 1.0)
    return mean, jnp.maximum(jnp.sqrt(jnp.maximum(mean * (1.0 - mean), 0.0)), MIN_DEVIATION)
