"""Reward models from comparisons: the Bradley-Terry loss, by answer and from the divergence on."""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxdistill.losses import checks
from jaxdistill.losses.pairs import ArrayLike, as_log_prob


def bradley_terry(chosen_reward: ArrayLike, rejected_reward: ArrayLike) -> jax.Array:
    """Bradley-Terry loss: the negative log-probability that the chosen answer wins.

        -log s(chosen_reward - rejected_reward),  s the logistic function

    Elementwise: a reward an answer gives the usual loss of reward models, rewards of tokens give
    values to be reduced with the mask of `divergence_mask`. Subtract a margin from the chosen
    reward to ask for more than winning.

    Args:
      chosen_reward, rejected_reward: `[...]`, logits of a value head.

    Returns:
      `[...]`, float32, nats; log 2 where both are equal.

    Raises:
      ValueError: shapes differ or a type is not floating.

    Source: Bradley and Terry 1952; reward models, arXiv 2203.02155.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import bradley_terry
      >>> print(bradley_terry(np.array([2.0, 0.0]), np.array([0.0, 0.0])).round(4))
      [0.1269 0.6931]
    """
    chosen = as_log_prob("chosen_reward", chosen_reward)
    rejected = as_log_prob("rejected_reward", rejected_reward, chosen.shape)
    return -log_sigmoid(chosen - rejected)


def token_bradley_terry(
    chosen_reward: ArrayLike,
    rejected_reward: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
) -> jax.Array:
    """Bradley-Terry loss of every token from the first difference of the two texts on, averaged.

        mean over t = d .. e-1 of -log s(chosen_reward_t - rejected_reward_t)
        d = first position where the texts differ, e = the longer length

    Where one text is shorter, the value head is read on its padding up to the longer length: run
    the model there, do not mask it. Equal texts are compared at their last token alone. The score
    of a text at inference is the reward at its last token.

    Args:
      chosen_reward, rejected_reward: `[B, T]`, the value head at every token, prompt included.
      chosen_tokens, rejected_tokens: `[B, T]` integers, prompt and answer, padded on the right.
      chosen_length, rejected_length: `[B]`, tokens that are not padding.

    Returns:
      `[B]`, float32, nats; 0 for a pair of two empty texts, which is padding.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: Zhongjing, arXiv 2308.03549 (its code; the paper does not say so).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import token_bradley_terry
      >>> chosen, rejected = np.array([[7, 8, 9]]), np.array([[7, 5, 0]])
      >>> rewards = np.array([[9.0, 2.0, 2.0]]), np.array([[0.0, 0.0, 0.0]])
      >>> print(token_bradley_terry(*rewards, chosen, rejected, [3], [2]).round(4))  # tokens 1, 2
      [0.1269]
    """
    chosen = as_log_prob("chosen_reward", chosen_reward)
    rejected = as_log_prob("rejected_reward", rejected_reward, chosen.shape)
    mask = divergence_mask(chosen_tokens, rejected_tokens, chosen_length, rejected_length)
    checks.check_same_shape("chosen_reward", chosen, "chosen_tokens", mask)
    # The margin is cut, not the loss of it: what is left out may be NaN and gets no gradient.
    margin = jnp.where(mask != 0, chosen, 0.0) - jnp.where(mask != 0, rejected, 0.0)
    return jnp.sum(-mask * log_sigmoid(margin), -1) / jnp.maximum(jnp.sum(mask, -1), 1.0)


def divergence_mask(
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
) -> jax.Array:
    """1 from the first position where two texts differ to the end of the longer one, else 0.

    A text also differs where it has ended and the other has not, whatever the padding token is.
    Equal texts keep their last position alone; two empty ones keep none.

    Args:
      chosen_tokens, rejected_tokens: `[B, T]` integers, padded on the right.
      chosen_length, rejected_length: `[B]`, tokens that are not padding.

    Returns:
      `[B, T]`, float32, a mask.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import divergence_mask
      >>> chosen, rejected = np.array([[7, 8, 9], [4, 4, 0]]), np.array([[7, 5, 0], [4, 4, 0]])
      >>> print(divergence_mask(chosen, rejected, [3, 2], [2, 2]))
      [[0. 1. 1.]
       [0. 1. 0.]]
    """
    chosen, rejected = jnp.asarray(chosen_tokens), jnp.asarray(rejected_tokens)
    for name, tokens in (("chosen_tokens", chosen), ("rejected_tokens", rejected)):
        if tokens.ndim < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers with shape [B, T], "
                f"but they are {tokens.dtype} with shape {tokens.shape}"
            )
    checks.check_same_shape("rejected_tokens", rejected, "chosen_tokens", chosen)
    chosen_end = checks.as_tokens("chosen_length", chosen_length, chosen.shape[:-1])[..., None]
    rejected_end = checks.as_tokens("rejected_length", rejected_length, chosen.shape[:-1])[
        ..., None
    ]
    position = jax.lax.broadcasted_iota(jnp.float32, chosen.shape, chosen.ndim - 1)
    in_chosen, in_rejected = position < chosen_end, position < rejected_end
    differs = (in_chosen | in_rejected) & ((chosen != rejected) | (in_chosen != in_rejected))
    diverged = jnp.cumsum(differs.astype(jnp.int32), axis=-1) > 0
    equal = ~jnp.any(differs, axis=-1, keepdims=True)
    last = equal & (position == chosen_end - 1.0)
    return (((in_chosen | in_rejected) & diverged) | last).astype(jnp.float32)
