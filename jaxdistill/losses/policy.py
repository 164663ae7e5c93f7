"""The policy gradient on log-probabilities, with its ratio, clip and aggregation by name.

log_prob is log pi(token) under the policy in training, the argument that carries the gradient.
old_log_prob is the same under the snapshot that sampled. Divide all logits by the temperature of
the sampling. `policy_objectives` holds the published objectives, which are calls of
`policy_gradient`; `advantages` makes the advantages.
"""

from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import policy_arguments as arguments
from jaxdistill.losses.policy_terms import (
    bounded_ratio,
    entropy_bonus,
    kl_estimate,
    sequence_totals,
)
from jaxdistill.losses.reduce import Weighted

RATIOS = ("token", "sequence", "sequence_product")


class PolicyTerms(TypedDict, total=False):
    """The optional arguments that every published objective hands on to `policy_gradient`."""

    weight: jax.typing.ArrayLike | None
    reference_log_prob: jax.typing.ArrayLike | None
    kl_weight: jax.typing.ArrayLike
    kl: str
    kl_gradient: str | None
    entropy: jax.typing.ArrayLike | None
    entropy_weight: jax.typing.ArrayLike
    segment_ids: jax.typing.ArrayLike | None


def policy_surrogate(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    ratio: str = "token",
    clip: str = "symmetric",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_bound: float = 3.0,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The loss of each token whose gradient is the policy gradient, not yet aggregated.

        rho = exp(d_t), d = log_prob - old_log_prob    ratio "token"
              exp(mean_t d_t) of its sequence          ratio "sequence" (GSPO)
              exp(sum_t d_t) of its sequence           ratio "sequence_product" (RLOO)

        -rho A                                                      clip "none"
        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)       clip "symmetric", "asymmetric"
        the same, but at most -dual_bound A where A < 0             clip "dual"
        -stop_gradient(clip(rho, 1 - clip_low, 1 + clip_high)) A log_prob    clip "cispo"

    A clipped token has no gradient, except under "cispo". No gradient flows into old_log_prob and
    the advantage. A log-ratio ends at -20 and 20.

    Args:
      log_prob: `[..., T]`, under the policy in training.
      old_log_prob: `[..., T]`, under the policy that sampled. None stands for log_prob itself, for
        one update a rollout batch: the ratio is 1 and the gradient REINFORCE's.
      advantage: `[...]`, one a sequence, or `[..., T]`.
      mask: `[..., T]`, boolean or weights: where the policy generated the token. What stands
        elsewhere in the other arguments is ignored, be it NaN.
      ratio, clip: names from above.
      clip_low: in [0, 1]; 1 is no lower bound.
      clip_high: at least 0; default clip_low, as "symmetric" must have it.
      dual_bound: at least 1 + clip_high, for "dual". TRL's `delta` is this bound.
      segment_ids: `[..., T]` integers where sequences are packed into rows; the advantage is then
        `[..., T]`. Default a row is a sequence.

    Returns:
      `[..., T]`, float32, in advantages (nats times advantages for "cispo"); 0 off the mask.

    Raises:
      ValueError: an argument of the wrong shape, an unknown name, or an option out of range.

    Source: PPO arXiv 1707.06347, dual clip 1912.09729, GSPO 2507.18071, CISPO 2506.13585.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import policy_surrogate
      >>> log_prob, old_log_prob = np.log([[0.5, 0.9]]), np.log([[0.5, 0.5]])
      >>> print(policy_surrogate(log_prob, old_log_prob, np.array([1.0]), np.ones((1, 2))))
      [[-1.  -1.2]]
    """
    low, high = arguments.clip_range(clip, clip_low, clip_high, dual_bound)
    log_prob, keep = arguments.policy_tokens(log_prob, mask)
    old = arguments.old_or_same(old_log_prob, log_prob, keep)
    advantage = arguments.per_token("advantage", advantage, keep, segment_ids)
    rho = bounded_ratio(_log_ratio(log_prob - old, keep, ratio, segment_ids))
    clipped = jnp.clip(rho, 1.0 - low, 1.0 + high)
    if clip == "none":
        loss = -rho * advantage
    elif clip == "cispo":
        loss = -lax.stop_gradient(clipped) * advantage * log_prob
    else:
        loss = -jnp.minimum(rho * advantage, clipped * advantage)
        if clip == "dual":
            loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual_bound * advantage), loss)
    return jnp.where(keep, loss, 0.0)


def policy_gradient(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    ratio: str = "token",
    clip: str = "symmetric",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_bound: float = 3.0,
    aggregation: str = "token",
    divisor: float | None = None,
    weight: jax.typing.ArrayLike | None = None,
    reference_log_prob: jax.typing.ArrayLike | None = None,
    kl_weight: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    kl_gradient: str | None = None,
    entropy: jax.typing.ArrayLike | None = None,
    entropy_weight: jax.typing.ArrayLike = 0.0,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> Weighted:
    """Policy gradient with a named ratio, clip and aggregation; `grpo` and its kin are calls of it.

        loss_t = weight_t policy_surrogate_t + kl_weight KL_t - entropy_weight H_t

        aggregation "token":     its mean over all tokens (token_mean)
        aggregation "sequence":  the mean over sequences of its token means (sequence_mean)
        aggregation "constant":  the mean over sequences of its token sums / divisor (sequence_sum)

    The KL and the entropy are aggregated as the surrogate is. TRL averages its entropy bonus over
    tokens whatever its loss type; the two agree for aggregation "token". Gradients flow through
    log_prob and entropy only.

    Args:
      log_prob, old_log_prob, advantage, mask, ratio, clip, clip_low, clip_high, dual_bound,
        segment_ids: as for `policy_surrogate`. A mask of weights weighs the tokens.
      aggregation: a name from above.
      divisor: above 0, needed for "constant": the longest completion allowed, in tokens.
      weight: `[..., T]`, such as `importance_weights`; of the surrogate alone. A constant.
      reference_log_prob: `[..., T]`, needed unless kl_weight is 0.
      kl_weight: at least 0.
      kl, kl_gradient: `kind` and `gradient` of `kl_estimate`. k3 with its own gradient is GRPO's
        choice, kl_gradient="k2" the gradient of the KL that is meant.
      entropy: `[..., T]`, of the policy in training, needed unless entropy_weight is 0.
      entropy_weight: at least 0.

    Returns:
      Weighted, in tokens for "token" and else in sequences.

    Raises:
      ValueError: an argument of the wrong shape or missing, an unknown name, an option out of
        range.

    Source: aggregations, arXiv 2402.03300 (sequence), 2503.14476 (token), 2503.20783 (constant).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import policy_gradient
      >>> log_prob, mask = np.log([[0.5, 0.9], [0.5, 0.5]]), np.array([[1, 1], [1, 0]])
      >>> advantage = np.array([1.0, -2.0])
      >>> print(policy_gradient(log_prob, None, advantage, mask).mean())  # (-1 - 1 + 2) / 3
      0.0
      >>> loss = policy_gradient(log_prob, None, advantage, mask, aggregation="sequence")
      >>> print(loss.mean())  # (-1 + 2) / 2
      0.5
    """
    arguments.check_aggregation(aggregation, divisor)
    arguments.check_not_negative("kl_weight", kl_weight)
    loss = policy_surrogate(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        ratio=ratio,
        clip=clip,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_bound=dual_bound,
        segment_ids=segment_ids,
    )
    log_prob, keep = arguments.policy_tokens(log_prob, mask)
    if weight is not None:
        loss *= lax.stop_gradient(arguments.kept("weight", weight, keep))
    if arguments.needs(reference_log_prob, "reference_log_prob", "kl_weight", kl_weight):
        reference = arguments.kept("reference_log_prob", reference_log_prob, keep)
        loss += kl_weight * kl_estimate(log_prob, reference, kind=kl, gradient=kl_gradient)
    if arguments.needs(entropy, "entropy", "entropy_weight", entropy_weight):
        loss += entropy_bonus(arguments.kept("entropy", entropy, keep), weight=entropy_weight)
    return arguments.aggregate(loss, mask, aggregation, divisor, segment_ids)


def _log_ratio(
    difference: jax.Array, keep: jax.Array, ratio: str, segment_ids: jax.typing.ArrayLike | None
) -> jax.Array:
    """The log-ratio of this name at each token; `difference` is 0 off the mask."""
    arguments.check_option("ratio", ratio, RATIOS)
    if ratio == "token":
        return difference
    total = sequence_totals(difference, segment_ids)
    if ratio == "sequence_product":
        return total
    return total / jnp.maximum(sequence_totals(keep.astype(jnp.float32), segment_ids), 1.0)
