"""The critic-free policy objectives: `policy_gradient` with the names and numbers of each paper.

Each one takes what `policy_gradient` takes, and beside its own options the terms all share:
weight, reference_log_prob, kl_weight, kl, kl_gradient, entropy, entropy_weight and segment_ids.
Which advantages go with it is said in each docstring; they are made once a rollout batch.
"""

from typing import Unpack

import jax

from jaxdistill.losses.policy import PolicyTerms, policy_gradient
from jaxdistill.losses.reduce import Weighted


def grpo(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """GRPO: token ratios, one clip for both sides, the mean of each completion's token mean.

        mean_b mean_t [-min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_weight k3_t]

    Advantages: `group_advantages(rewards)`. The paper has kl_weight 0.04; TRL and verl leave it 0
    and aggregate as `dapo`. The mean over sequences prefers short right answers and long wrong
    ones: see `dr_grpo`.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low, clip_high: the clip; clip_high is by default clip_low.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2402.03300; TRL loss_type="grpo".

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import group_advantages, grpo
      >>> advantage = group_advantages(np.array([[1.0, 0.0]]), scale="none")[0]
      >>> log_prob, mask = np.log([[0.5, 0.5], [0.9, 0.9]]), np.array([[1, 1], [1, 0]])
      >>> print(grpo(log_prob, None, advantage, mask).mean())  # -(0.5 - 0.5) / 2
      0.0
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        clip="symmetric" if clip_high is None else "asymmetric",
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation="sequence",
        **terms,
    )


def dr_grpo(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    divisor: float,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """Dr. GRPO: GRPO whose token sums are divided by a constant, so length earns nothing.

        mean_b sum_t [-min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)] / divisor

    Advantages: `group_advantages(rewards, scale="none")`, without the bias by difficulty.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      divisor: the longest completion allowed, in tokens; never the padded length of a batch,
        which changes from one to the next.
      clip_low, clip_high: the clip; clip_high is by default clip_low.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2503.20783; TRL loss_type="dr_grpo".

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dr_grpo
      >>> log_prob, mask = np.log([[0.5, 0.5], [0.9, 0.9]]), np.array([[1, 1], [1, 0]])
      >>> print(dr_grpo(log_prob, None, np.array([0.5, -0.5]), mask, divisor=2).mean())
      -0.125
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        clip="symmetric" if clip_high is None else "asymmetric",
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation="constant",
        divisor=divisor,
        **terms,
    )


def dapo(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """DAPO: GRPO with a higher upper clip and one mean over all tokens of the batch.

        sum_bt -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) / number of tokens

    Advantages: `group_advantages(rewards + overlong_penalty(lengths))` of the groups that
    `filter_groups` keeps. The paper has no KL. The mean is over the tokens of all microbatches
    and devices, because Weighted is divided last; a mean of microbatch means is another loss.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low, clip_high: the clip.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in tokens.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2503.14476; TRL loss_type="dapo".

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dapo
      >>> log_prob, old_log_prob = np.log([[0.9]]), np.log([[0.5]])
      >>> print(dapo(log_prob, old_log_prob, np.array([1.0]), np.ones((1, 1))).mean().round(4))
      -1.28
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        clip="asymmetric",
        clip_low=clip_low,
        clip_high=clip_high,
        **terms,
    )


def gspo(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """GSPO: the length-normalised ratio of whole sequences, so a clip takes all of one or nothing.

        mean_b -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),  s = exp(mean_t d_t)

    Advantages: `group_advantages(rewards)`.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low, clip_high: the clip, of ratios that hardly leave 1.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2507.18071; TRL importance_sampling_level="sequence", loss_type="grpo".

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import gspo
      >>> log_prob, old_log_prob = np.log([[0.8, 0.5]]), np.log([[0.5, 0.5]])
      >>> loss = gspo(log_prob, old_log_prob, np.array([-1.0]), np.ones((1, 2)))
      >>> print(loss.mean().round(4))  # sqrt(1.6 * 1)
      1.2649
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        ratio="sequence",
        clip="asymmetric",
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation="sequence",
        **terms,
    )


def cispo(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """CISPO: the ratio, clipped, is a constant weight of the log-likelihood; no token is silenced.

        sum_bt -stop_gradient(clip(rho_t, 1 - clip_low, 1 + clip_high)) A log_prob_t / tokens

    Advantages: `group_advantages(rewards)`. The defaults, no lower bound and at most 5, are what
    TRL advises; TRL's epsilon_high is the bound itself, 1 + clip_high.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low, clip_high: the clip.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in tokens.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2506.13585; TRL loss_type="cispo".

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import cispo
      >>> log_prob, old_log_prob = np.log([[0.9]]), np.log([[0.1]])
      >>> loss = cispo(log_prob, old_log_prob, np.array([1.0]), np.ones((1, 1)))
      >>> print(loss.mean().round(4))  # 9 is clipped: -5 log 0.9
      0.5268
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        clip="cispo",
        clip_low=clip_low,
        clip_high=clip_high,
        **terms,
    )


def rloo(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float = 0.2,
    **terms: Unpack[PolicyTerms],
) -> Weighted:
    """RLOO: REINFORCE on whole sequences, whose ratio is the product of their tokens'.

        mean_b -min(rho A, clip(rho, 1 - clip_low, 1 + clip_low) A),  rho = exp(sum_t d_t)

    Advantages: `group_advantages(rewards, scale="none", baseline="leave_one_out")`. TRL takes its
    KL off the rewards: rewards - 0.05 sum_t k1_t.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      clip_low: the clip, on both sides.
      terms: the optional arguments that all objectives share.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2402.14740; TRL's RLOOTrainer.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import rloo
      >>> log_prob, old_log_prob = np.log([[0.5, 0.5]]), np.log([[0.5, 0.4]])
      >>> print(rloo(log_prob, old_log_prob, np.array([-1.0]), np.ones((1, 2))).mean().round(4))
      1.25
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        ratio="sequence_product",
        clip_low=clip_low,
        aggregation="sequence",
        **terms,
    )
