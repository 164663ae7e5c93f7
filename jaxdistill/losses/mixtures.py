"""Objectives that add the mean loss of demonstrations to that of rollouts; and weighted SFT.

Each part has its own mean, which one sum over one weight does not give: see `_mixed`.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses import policy_arguments as arguments
from jaxdistill.losses.policy import PolicyTerms, policy_gradient
from jaxdistill.losses.policy_terms import importance_weights
from jaxdistill.losses.reduce import Weighted, token_mean


def chord(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    is_demo: jax.typing.ArrayLike,
    *,
    mu: jax.typing.ArrayLike,
    token_weight: str = "none",
    demo_fraction: jax.typing.ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
) -> Weighted:
    """CHORD: SFT on demonstrations beside GRPO on rollouts, their balance mu on a schedule.

        (1 - mu) mean over rollout tokens of the clipped surrogate
        + mu mean over demonstration tokens of -w_t log_prob_t
        w = 1 ("none"), stop_gradient(p (1 - p)) ("phi") or stop_gradient(p) ("probability")

    The two means are exact also over microbatches, if demo_fraction tells the demonstrations'
    share of all tokens of the step; taken from a microbatch it would be a mean of means.
    Advantages: `group_advantages(rewards)` of the rollouts.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      is_demo: `[...]`, one a sequence, boolean.
      mu: in [0, 1]; the paper warms it up to a peak and lets it decay, as
        `optax.warmup_cosine_decay_schedule` does; with "phi" it is constant. 1 is SFT.
      token_weight: a name from above.
      demo_fraction: in [0, 1]; default that of this call.
      clip_low, clip_high: the clip; clip_high is by default clip_low.

    Returns:
      Weighted, in tokens of both kinds.

    Raises:
      ValueError: an argument of the wrong shape, an unknown name, or an option out of range.

    Source: arXiv 2508.11408.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import chord
      >>> log_prob, is_demo = np.log([[0.5, 0.5], [0.1, 0.1]]), np.array([False, True])
      >>> mask = np.array([[1, 1], [1, 0]])
      >>> loss = chord(log_prob, None, np.array([1.0, 0.0]), mask, is_demo, mu=0.5)
      >>> print(loss.mean().round(4))  # (-1 + log 10) / 2
      0.6513
    """
    checks.check_between("mu", mu, 0.0, 1.0)
    arguments.check_option("token_weight", token_weight, ("none", "phi", "probability"))
    tokens, keep = arguments.policy_tokens(log_prob, mask)
    demo = arguments.per_token("is_demo", is_demo, keep) != 0
    weights = checks.as_tokens("mask", mask, keep.shape)
    reinforced = policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        jnp.where(demo, 0.0, weights),
        clip="symmetric" if clip_high is None else "asymmetric",
        clip_low=clip_low,
        clip_high=clip_high,
    )
    p = lax.stop_gradient(jnp.exp(jnp.minimum(tokens, 0.0)))
    scale = {"none": jnp.ones_like(p), "phi": p * (1.0 - p), "probability": p}[token_weight]
    imitated = token_mean(-scale * tokens, jnp.where(demo, weights, 0.0))
    return _mixed(reinforced, imitated, 1.0 - jnp.asarray(mu, jnp.float32), mu, demo_fraction)


def uft(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    hint_mask: jax.typing.ArrayLike,
    *,
    hint_weight: float = 1e-3,
    hint_fraction: jax.typing.ArrayLike | None = None,
    clip_low: float = 0.2,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """UFT: GRPO on what follows a hint, and a little SFT on the hint, a prefix of the solution.

        mean over generated tokens of the clipped surrogate (and kl_weight KL)
        + hint_weight mean over hint tokens of -log_prob_t

    Advantages: `group_advantages(rewards)`. Without a hint it is GRPO. The paper has kl_weight
    0.001 and hints that shorten over the training to nothing.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      hint_mask: `[..., T]`, boolean or weights: the tokens of the hint, where mask is 0.
      hint_weight: at least 0.
      hint_fraction: in [0, 1]: the hints' share of all tokens of both masks in the step; default
        that of this call. See demo_fraction of `chord`.
      clip_low: the clip, on both sides.
      terms: the optional arguments that all policy objectives share.

    Returns:
      Weighted, in tokens of both kinds.

    Raises:
      ValueError: an argument of the wrong shape, or an option out of range.

    Source: arXiv 2505.16984.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import uft
      >>> log_prob, mask, hint_mask = np.log([[0.1, 0.5]]), np.array([[0, 1]]), np.array([[1, 0]])
      >>> loss = uft(log_prob, None, np.array([1.0]), mask, hint_mask, hint_weight=0.1)
      >>> print(loss.mean().round(4))  # -1 + 0.1 log 10
      -0.7697
    """
    arguments.check_not_negative("hint_weight", hint_weight)
    reinforced = policy_gradient(
        log_prob, old_log_prob, advantage, mask, clip_low=clip_low, **terms
    )
    hint, _ = arguments.policy_tokens(log_prob, hint_mask)
    return _mixed(reinforced, token_mean(-hint, hint_mask), 1.0, hint_weight, hint_fraction)


def _mixed(
    first: Weighted,
    second: Weighted,
    first_weight: jax.typing.ArrayLike,
    second_weight: jax.typing.ArrayLike,
    second_fraction: jax.typing.ArrayLike | None,
) -> Weighted:
    """A Weighted whose mean is first_weight * first.mean() + second_weight * second.mean().

    Adding two Weighted gives one mean over both; to keep two, each sum is divided by its share of
    the common weight.
    """
    weight = first.weight + second.weight
    if second_fraction is None:
        share = Weighted(second.weight, weight).mean()
    else:
        checks.check_between("the second term's fraction", second_fraction, 0.0, 1.0)
        share = jnp.asarray(second_fraction, jnp.float32)
    first_part = Weighted(first.sum, 1.0 - share).mean()
    second_part = Weighted(second.sum, share).mean()
    return Weighted(jnp.asarray(first_weight * first_part + second_weight * second_part), weight)


def iw_sft(
    log_prob: jax.typing.ArrayLike,
    proposal_log_prob: jax.typing.ArrayLike,
    reference_log_prob: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    level: str = "sequence",
    cap: float = 2.0,
    floor: float = 0.0,
) -> jax.Array:
    """Importance-weighted SFT: demonstrations that the proposal likes more than the reference did.

        -w log_prob_t,  w = stop_gradient(clip(exp(sum_t d_t), floor, cap))
        d = proposal_log_prob - reference_log_prob

    SFT is a lower bound of RL on demonstrations that were filtered by a reward; the weight
    tightens it. The proposal is any policy near the trained one, often its lagged copy. Gradients
    flow through log_prob only.

    Args:
      log_prob, proposal_log_prob, reference_log_prob: `[..., T]`, of the demonstrations' tokens.
      mask: `[..., T]`, boolean or weights.
      level: "sequence" as above, or "token" for exp(d_t) at each.
      cap: above 0.
      floor: in [0, cap].

    Returns:
      `[..., T]`, float32, nats; 0 where the mask is 0.

    Raises:
      ValueError: shapes differ, an unknown name, or cap or floor out of range.

    Source: arXiv 2507.12856.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import iw_sft
      >>> log_prob, proposal, reference = np.log([[0.5]]), np.log([[0.6]]), np.log([[0.4]])
      >>> print(iw_sft(log_prob, proposal, reference, np.ones((1, 1))).round(4))  # 1.5 log 2
      [[1.0397]]
    """
    weight = importance_weights(
        proposal_log_prob, reference_log_prob, mask, level=level, cap=cap, floor=floor
    )
    tokens, _ = arguments.policy_tokens(log_prob, mask)
    return -weight * tokens
