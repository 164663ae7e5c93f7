"""Advantages: what a policy gradient multiplies, made from rewards and nothing in training.

They are constants of the loss (every result here is detached), computed once a rollout batch and
before it is split: the statistics of a group or a batch, taken in a microbatch, are other numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.policy_arguments import check_not_negative, check_option, needs


class Gae(NamedTuple):
    """What `gae` returns: `advantages` and `returns`, float32 `[..., T]`, 0 where the mask is 0."""

    advantages: jax.Array
    returns: jax.Array


def group_advantages(
    rewards: jax.typing.ArrayLike,
    *,
    scale: str = "std",
    baseline: str = "mean",
    epsilon: float = 1e-4,
) -> jax.Array:
    """Rewards of completions against their group, the completions of one prompt.

        A_i = (r_i - b_i) / s
        b_i = mean of the group, or of its other G - 1 members for "leave_one_out"
        s = std of the group + epsilon ("std"), 1 ("none"), std of all rewards + epsilon ("batch")

    Both standard deviations are unbiased. A group of equal rewards gives exactly 0. std is GRPO's
    and DAPO's; none is Dr. GRPO's, without the bias by difficulty; none with leave_one_out is
    RLOO's, G / (G - 1) times Dr. GRPO's. Stop-gradient: the result is a constant.

    Args:
      rewards: `[..., G]`, one group a row; give all groups of the rollout batch at once.
      scale: "std", "none" or "batch".
      baseline: "mean" or "leave_one_out".
      epsilon: at least 0; 1e-4 is TRL's, 1e-6 verl's.

    Returns:
      `[..., G]`, float32, in rewards ("none") or their standard deviations.

    Raises:
      ValueError: groups of fewer than 2, an unknown name, or a negative epsilon.

    Source: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import group_advantages
      >>> print(group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), scale="none"))
      [[ 0.5 -0.5 -0.5  0.5]]
    """
    rewards = jnp.asarray(rewards).astype(jnp.float32)
    check_option("scale", scale, ("std", "none", "batch"))
    check_option("baseline", baseline, ("mean", "leave_one_out"))
    check_not_negative("epsilon", epsilon)
    if rewards.ndim < 1 or rewards.shape[-1] < 2:
        raise ValueError(
            "rewards must have shape [..., G] with groups of at least 2, "
            f"but the shape is {rewards.shape}: a lone completion has nothing to compare with"
        )
    size = rewards.shape[-1]
    total = rewards.sum(-1, keepdims=True)
    others = (total - rewards) / (size - 1)
    centred = rewards - (others if baseline == "leave_one_out" else total / size)
    # The rounded mean of equal rewards may miss them by one unit, and 1 / epsilon is large.
    centred = jnp.where(_uneven(rewards)[..., None], centred, 0.0)
    if scale == "std":
        centred /= rewards.std(-1, ddof=1, keepdims=True) + epsilon
    elif scale == "batch":
        centred /= rewards.std(ddof=1) + epsilon
    return lax.stop_gradient(centred)


def filter_groups(rewards: jax.typing.ArrayLike) -> jax.Array:
    """Which groups teach anything: DAPO's dynamic sampling keeps those of unequal rewards.

        keep = max_i r_i > min_i r_i

    Args:
      rewards: `[..., G]`, one group a row.

    Returns:
      `[...]`, boolean.

    Raises:
      ValueError: rewards without an axis.

    Source: DAPO, arXiv 2503.14476.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import filter_groups
      >>> print(filter_groups(np.array([[1.0, 0.0], [1.0, 1.0]])))
      [ True False]
    """
    rewards = jnp.asarray(rewards)
    if rewards.ndim < 1:
        raise ValueError("rewards must have shape [..., G], but it is a scalar")
    return _uneven(rewards)


def _uneven(rewards: jax.Array) -> jax.Array:
    return rewards.max(-1) > rewards.min(-1)


def whiten(
    values: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, epsilon: float = 1e-8
) -> jax.Array:
    """Values of mean 0 and variance 1 over all the positions that the mask keeps.

        (x - mean) / sqrt(variance + epsilon)

    Both statistics are over the whole array, the variance unbiased. Stop-gradient: a constant.

    Args:
      values: `[...]`, usually the advantages `[B, T]` of the whole rollout batch.
      mask: `[...]` of the same shape, boolean or 0/1. Elsewhere the value may be NaN.
      epsilon: above 0.

    Returns:
      `[...]`, float32, in standard deviations; 0 where the mask is 0.

    Raises:
      ValueError: shapes differ, or epsilon is not above 0.

    Source: PPO as in arXiv 1909.08593.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import whiten
      >>> print(whiten(np.array([1.0, 3.0, 9.0]), np.array([1, 1, 0])).round(4))
      [-0.7071  0.7071  0.    ]
    """
    checks.check_positive("epsilon", epsilon)
    values = jnp.asarray(values).astype(jnp.float32)
    keep = checks.as_tokens("mask", mask, values.shape) != 0
    count = keep.sum(dtype=jnp.float32)
    mean = jnp.where(keep, values, 0.0).sum() / jnp.maximum(count, 1.0)
    centred = jnp.where(keep, values - mean, 0.0)
    variance = jnp.square(centred).sum() / jnp.maximum(count - 1.0, 1.0)
    return lax.stop_gradient(centred / jnp.sqrt(variance + epsilon))


def token_rewards(
    rewards: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    kl: jax.typing.ArrayLike | None = None,
    kl_weight: float = 0.0,
) -> jax.Array:
    """One reward a sequence put on its tokens: all of it on the last, less the KL on each.

        r_t = [t is the last kept token] r - kl_weight kl_t

    Stop-gradient: the result is a constant, so the KL works through the policy gradient; k1 is the
    estimator that is right there.

    Args:
      rewards: `[...]`, one a sequence.
      mask: `[..., T]`, boolean or 0/1: the tokens the policy generated, one sequence a row.
      kl: `[..., T]`, such as `kl_estimate(old_log_prob, reference_log_prob, kind="k1")`.
      kl_weight: at least 0.

    Returns:
      `[..., T]`, float32, in rewards; 0 where the mask is 0. An empty row loses its reward.

    Raises:
      ValueError: shapes do not fit, or a kl_weight that is negative or has no kl.

    Source: PPO as in arXiv 1909.08593.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import token_rewards
      >>> print(token_rewards(np.array([2.0]), np.array([[1, 1, 0]])))
      [[0. 2. 0.]]
    """
    check_not_negative("kl_weight", kl_weight)
    keep = jnp.asarray(mask).astype(jnp.float32) != 0
    rewards = checks.as_tokens("rewards", rewards, keep.shape[:-1])
    kept_from_here = jnp.cumsum(keep[..., ::-1], axis=-1)[..., ::-1]
    spread = jnp.where(keep & (kept_from_here == 1), rewards[..., None], 0.0)
    if needs(kl, "kl", "kl_weight", kl_weight):
        spread -= kl_weight * jnp.where(keep, checks.as_tokens("kl", kl, keep.shape), 0.0)
    return lax.stop_gradient(spread)


def gae(
    rewards: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> Gae:
    """Generalised advantage estimation along each sequence.

        delta_t = r_t + discount V_next - V_t
        A_t = delta_t + discount trace A_next;    returns_t = A_t + V_t

    "next" is the next kept token: tool and observation tokens in between are skipped. After the
    last one V and A are 0. With values of 0 and trace 1, A is the discounted return to go.
    Stop-gradient: both results are constants.

    Args:
      rewards: `[..., T]`, on the tokens that earn them (`token_rewards`).
      values: `[..., T]`, the critic's estimate before each token.
      mask: `[..., T]`, boolean or 0/1: the tokens the policy generated, one sequence a row.
        Rewards and values elsewhere are ignored.
      discount: gamma, in [0, 1].
      trace: lambda, in [0, 1]; 0 is the one-step error, 1 the whole return.

    Returns:
      Gae(advantages, returns), in rewards, not whitened.

    Raises:
      ValueError: shapes differ, or discount or trace lies outside [0, 1].

    Source: arXiv 1506.02438.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import gae
      >>> rewards, values, mask = np.array([[0.0, 1.0]]), np.full((1, 2), 0.5), np.ones((1, 2))
      >>> print(gae(rewards, values, mask, trace=0.5).advantages)  # 0 + 0.5 * 0.5, 1 - 0.5
      [[0.25 0.5 ]]
    """
    checks.check_between("discount", discount, 0.0, 1.0)
    checks.check_between("trace", trace, 0.0, 1.0)
    rewards = jnp.asarray(rewards).astype(jnp.float32)
    values = checks.as_tokens("values", values, rewards.shape)
    keep = checks.as_tokens("mask", mask, rewards.shape) != 0

    next_value = _next_kept(values, keep)
    delta = rewards + discount * next_value - values
    decay = jnp.where(keep, jnp.asarray(discount * trace, jnp.float32), 1.0)
    advantages = jnp.where(keep, _backward(decay, jnp.where(keep, delta, 0.0)), 0.0)
    returns = jnp.where(keep, advantages + values, 0.0)
    return Gae(lax.stop_gradient(advantages), lax.stop_gradient(returns))


def _backward(factor: jax.Array, term: jax.Array) -> jax.Array:
    """y_t = term_t + factor_t y_{t+1} along the last axis, with 0 after the end."""

    def after(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    return lax.associative_scan(after, (factor, term), reverse=True, axis=term.ndim - 1)[1]


def _next_kept(values: jax.Array, keep: jax.Array) -> jax.Array:
    """The value at the next position that is kept, 0 after the last."""
    from_here = _backward(jnp.where(keep, 0.0, 1.0), jnp.where(keep, values, 0.0))
    return jnp.concatenate([from_here[..., 1:], jnp.zeros_like(from_here[..., :1])], axis=-1)


def reinforce_plus_plus_advantages(
    rewards: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    kl: jax.typing.ArrayLike | None = None,
    kl_weight: float = 0.0,
    discount: float = 1.0,
) -> jax.Array:
    """REINFORCE++'s advantages: returns to go, whitened over the batch; no critic and no group.

        A = whiten(R),  R_t = sum_{s >= t} discount^(s - t) r_s,  r = token_rewards(rewards, kl)

    For its "-baseline" form give `group_advantages(rewards, scale="none")`, flattened, as rewards.
    Stop-gradient: the result is a constant.

    Args:
      rewards: `[B]`, one a sequence.
      mask: `[B, T]`, boolean or 0/1: the tokens the policy generated, one sequence a row.
      kl: `[B, T]`, such as `kl_estimate(old_log_prob, reference_log_prob, kind="k1")`.
      kl_weight: at least 0.
      discount: in [0, 1].

    Returns:
      `[B, T]`, float32, in standard deviations; 0 where the mask is 0.

    Raises:
      ValueError: as `token_rewards` and `gae`.

    Source: arXiv 2501.03262.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import reinforce_plus_plus_advantages
      >>> print(reinforce_plus_plus_advantages(np.array([1.0, -1.0]), np.ones((2, 1))).round(4))
      [[ 0.7071]
       [-0.7071]]
    """
    earned = token_rewards(rewards, mask, kl=kl, kl_weight=kl_weight)
    returns = gae(earned, jnp.zeros_like(earned), mask, discount=discount, trace=1.0)
    return whiten(returns.advantages, mask)


def overlong_penalty(
    lengths: jax.typing.ArrayLike, *, max_length: int, buffer: int, factor: float = 1.0
) -> jax.Array:
    """DAPO's soft punishment of long completions, to be added to their rewards.

        -factor clip((length - (max_length - buffer)) / buffer, 0, 1)

    Nothing up to max_length - buffer, the whole factor from max_length on.

    Args:
      lengths: `[...]`, in generated tokens.
      max_length: where the penalty is whole, in tokens.
      buffer: over how many tokens it grows, in [1, max_length].
      factor: at least 0.

    Returns:
      `[...]`, float32, in rewards, in [-factor, 0].

    Raises:
      ValueError: buffer or factor out of range.

    Source: DAPO, arXiv 2503.14476, equation 13.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import overlong_penalty
      >>> print(overlong_penalty(np.array([9, 15, 25]), max_length=20, buffer=10))
      [-0.  -0.5 -1. ]
    """
    checks.check_between("buffer", buffer, 1, max_length)
    check_not_negative("factor", factor)
    lengths = jnp.asarray(lengths).astype(jnp.float32)
    return lax.stop_gradient(
        -factor * jnp.clip((lengths - (max_length - buffer)) / buffer, 0.0, 1.0)
    )
