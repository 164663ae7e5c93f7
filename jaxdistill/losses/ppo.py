"""Objectives with an advantage a token: PPO's two losses, and REINFORCE++, without the critic.

The optional arguments of `policy_gradient` can be given to both policy losses.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.policy import PolicyTerms, policy_gradient
from jaxdistill.losses.reduce import Weighted, token_mean


def reinforce_plus_plus(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 0.2,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """REINFORCE++: PPO's clipped loss on whitened returns, without a critic.

        sum_bt -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_low) A_t) / number of tokens

    Advantages: `reinforce_plus_plus_advantages(rewards, mask, kl=..)`, which has the KL inside.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low: the clip, on both sides.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in tokens.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2501.03262.

    Example:
      >>> import numpy as np
      >>> from jaxdistill import losses
      >>> log_prob, mask = np.log([[0.5, 0.5], [0.9, 0.9]]), np.array([[1, 1], [1, 0]])
      >>> advantage = losses.reinforce_plus_plus_advantages(np.array([1.0, 0.0]), mask)
      >>> loss = losses.reinforce_plus_plus(log_prob, None, advantage, mask)
      >>> print(np.abs(loss.mean()).round(4))  # whitened: the advantages add up to 0
      0.0
    """
    return policy_gradient(log_prob, old_log_prob, advantage, mask, clip_low=clip_low, **terms)


def ppo_policy(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 0.2,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """PPO's policy loss: token ratios, one clip for both sides, the mean over tokens.

        sum_bt -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_low) A_t) / number of tokens

    Advantages: `whiten(gae(token_rewards(rewards, mask, kl=..), values, mask).advantages, mask)`.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low: the clip, on both sides.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in tokens.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 1707.06347.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import ppo_policy
      >>> log_prob, old_log_prob = np.log([[0.9, 0.5]]), np.log([[0.5, 0.5]])
      >>> advantage = np.array([[1.0, 3.0]])
      >>> print(ppo_policy(log_prob, old_log_prob, advantage, np.ones((1, 2))).mean().round(4))
      -2.1
    """
    return policy_gradient(log_prob, old_log_prob, advantage, mask, clip_low=clip_low, **terms)


def ppo_value(
    value: jax.typing.ArrayLike,
    old_value: jax.typing.ArrayLike,
    returns: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip: float | None = 0.2,
) -> Weighted:
    """PPO's value loss: squared error, at least that of a value kept near its old one.

        1/2 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2), mean over tokens

    No gradient flows into old_value and returns.

    Args:
      value: `[...]`, the critic in training; the argument with the gradient.
      old_value: `[...]`, the critic that `gae` saw.
      returns: `[...]`, `gae(...).returns`.
      mask: `[...]`, boolean or weights.
      clip: above 0, in rewards, or None for the squared error alone. verl has 0.5.

    Returns:
      Weighted, in squared rewards and tokens. Multiply it by 0.1 beside the policy loss (TRL).

    Raises:
      ValueError: shapes differ, or clip is not above 0.

    Source: PPO as in arXiv 1909.08593.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import ppo_value
      >>> value, old_value, returns = np.array([1.0]), np.array([0.0]), np.array([1.0])
      >>> print(ppo_value(value, old_value, returns, np.ones(1)).mean().round(4))  # 0.8^2 / 2
      0.32
    """
    if clip is not None:
        checks.check_positive("clip", clip)
    value = jnp.asarray(value).astype(jnp.float32)
    keep = checks.as_tokens("mask", mask, value.shape) != 0
    old = lax.stop_gradient(checks.as_tokens("old_value", old_value, value.shape))
    target = lax.stop_gradient(checks.as_tokens("returns", returns, value.shape))
    value, old, target = (jnp.where(keep, x, 0.0) for x in (value, old, target))
    error = jnp.square(value - target)
    if clip is not None:
        near = old + jnp.clip(value - old, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - target))
    return token_mean(0.5 * error, mask)
