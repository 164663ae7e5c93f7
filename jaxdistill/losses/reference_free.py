"""Preference objectives that need no reference model: ORPO, SimPO, CPO and REDI.

Log-probabilities of whole answers in (`sequence_log_prob`: sums over the answer's tokens) with the
answers' lengths, one value a pair out. Each answer is averaged by itself first, so every pair
weighs the same whatever its length. Objectives with a reference: preference.py.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxdistill.losses import checks
from jaxdistill.losses.pairs import (
    ArrayLike,
    check_label_smoothing,
    check_pair,
    mean_log_prob,
    smoothed_log_sigmoid,
)

# Float32 cannot tell a probability closer to 1 from 1, whose odds are infinite.
_HIGHEST_LOG_PROB = -1e-6


def orpo(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    chosen_nll: ArrayLike | None = None,
) -> jax.Array:
    """Odds-ratio preference optimisation: likelihood of the chosen answer, and better odds for it.

        a = log_prob / length (of each answer);  log odds(a) = a - log(1 - exp(a))
        chosen_nll - beta log s(log odds(a_chosen) - log odds(a_rejected)),  chosen_nll = -a_chosen

    At a = 0 (an empty answer, or one the policy is sure of to float32) the odds are infinite, and
    the loss of TRL and of Tunix with them. Here a is at most -1e-6 inside the odds, and such an
    answer gets no gradient from them: the loss is finite, whichever answer is empty.

    Args:
      chosen_log_prob, rejected_log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      chosen_length, rejected_length: `[B]`, tokens of the answers; an empty one counts as one.
      beta: scalar of at least 0 (lambda in the paper).
      chosen_nll: `[B]`, nats per token, in place of -a_chosen: the authors' code and TRL take the
        prompt's tokens into the likelihood, and TRL averages over all tokens of a microbatch.

    Returns:
      `[B]`, float32, nats per token.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2403.07691.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import orpo
      >>> chosen, rejected = np.array([-2.0, -2.0]), np.array([-2.0, 0.0])
      >>> length = np.array([2, 2])
      >>> print(orpo(chosen, rejected, length, np.array([2, 0])).round(3))  # 1 + 0.1 log 2, finite
      [1.069 2.436]
    """
    checks.check_between("beta", beta, 0.0, math.inf)
    chosen, rejected = _averages(chosen_log_prob, rejected_log_prob, chosen_length, rejected_length)
    nll = -chosen
    if chosen_nll is not None:
        nll = checks.as_tokens("chosen_nll", chosen_nll, chosen.shape)
    margin = _log_odds(chosen) - _log_odds(rejected)
    return nll - jnp.asarray(beta, jnp.float32) * log_sigmoid(margin)


def simpo(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 0.5,
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    """Simple preference optimisation: per token, the chosen answer is likelier by a margin.

        h = beta (chosen_log_prob / chosen_length - rejected_log_prob / rejected_length) - gamma
        -(1 - e) log s(h) - e log s(-h),  e = label_smoothing

    gamma is the margin itself, as in TRL's `simpo_gamma`; papers often give gamma / beta. TRL's
    CPOTrainer adds the likelihood of `cpo` to it unless cpo_alpha is set to 0.

    Args:
      chosen_log_prob, rejected_log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      chosen_length, rejected_length: `[B]`, tokens of the answers; an empty one counts as one (TRL
        divides 0 by 0).
      beta: scalar above 0.
      gamma: scalar of at least 0.
      label_smoothing: scalar in [0, 0.5), the share of wrongly ordered pairs.

    Returns:
      `[B]`, float32.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2405.14734.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import simpo
      >>> length = np.array([2])
      >>> print(simpo(np.array([-2.0]), np.array([-2.5]), length, length).round(4))  # 2 / 4 = gamma
      [0.6931]
    """
    checks.check_positive("beta", beta)
    checks.check_between("gamma", gamma, 0.0, math.inf)
    check_label_smoothing(label_smoothing)
    chosen, rejected = _averages(chosen_log_prob, rejected_log_prob, chosen_length, rejected_length)
    margin = jnp.asarray(beta, jnp.float32) * (chosen - rejected) - jnp.asarray(gamma, jnp.float32)
    return smoothed_log_sigmoid(margin, label_smoothing)


def cpo(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    chosen_length: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    nll_weight: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    """Contrastive preference optimisation: DPO with a uniform reference, and likelihood.

        h = beta (chosen_log_prob - rejected_log_prob)
        -(1 - e) log s(h) - e log s(-h) - nll_weight chosen_log_prob / chosen_length

    The margin is on sums, the likelihood on each answer's average. TRL averages the likelihood over
    the tokens of a microbatch, so long answers weigh more and the split into microbatches shows:
    for that, set nll_weight to 0 and add `token_mean(cross_entropy)` of the chosen answers.

    Args:
      chosen_log_prob, rejected_log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      chosen_length: `[B]`, tokens of the chosen answers; an empty one counts as one token.
      beta: scalar above 0.
      nll_weight: scalar of at least 0 (cpo_alpha in TRL).
      label_smoothing: scalar e in [0, 0.5), the share of wrongly ordered pairs.

    Returns:
      `[B]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2401.08417.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import cpo
      >>> print(cpo(np.array([-4.0]), np.array([-4.0]), np.array([2])).round(4))  # log 2 + 4 / 2
      [2.6931]
    """
    checks.check_positive("beta", beta)
    checks.check_between("nll_weight", nll_weight, 0.0, math.inf)
    check_label_smoothing(label_smoothing)
    chosen, rejected = check_pair("", chosen_log_prob, rejected_log_prob)
    margin = jnp.asarray(beta, jnp.float32) * (chosen - rejected)
    likelihood = jnp.asarray(nll_weight, jnp.float32) * mean_log_prob(
        "chosen_length", chosen, chosen_length
    )
    return smoothed_log_sigmoid(margin, label_smoothing) - likelihood


def redi(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    alpha: ArrayLike = 0.8,
) -> jax.Array:
    """Reinforcement distillation: raise correct traces, lower incorrect ones a little less.

        -chosen_log_prob / chosen_length + alpha rejected_log_prob / rejected_length

    alpha 0 is the sequence mean of supervised fine-tuning, alpha 1 the symmetric objective (the
    limit of 2 / beta times SimPO's gradient for beta to 0). It has no bound below: with alpha near
    1 and a normal learning rate both likelihoods collapse.

    Args:
      chosen_log_prob, rejected_log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      chosen_length, rejected_length: `[B]`, tokens of the answers; an empty one counts as one.
      alpha: scalar in [0, 1].

    Returns:
      `[B]`, float32, nats per token.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2505.24850.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import redi
      >>> length = np.array([2])
      >>> print(redi(np.array([-2.0]), np.array([-4.0]), length, length).round(3))  # 1 - 0.8 * 2
      [-0.6]
    """
    checks.check_between("alpha", alpha, 0.0, 1.0)
    chosen, rejected = _averages(chosen_log_prob, rejected_log_prob, chosen_length, rejected_length)
    return jnp.asarray(alpha, jnp.float32) * rejected - chosen


def _averages(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    chosen, rejected = check_pair("", chosen_log_prob, rejected_log_prob)
    return (
        mean_log_prob("chosen_length", chosen, chosen_length),
        mean_log_prob("rejected_length", rejected, rejected_length),
    )


def _log_odds(log_prob: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of p = exp(log_prob), no gradient where p is 1 to float32."""
    log_prob = jnp.minimum(log_prob, _HIGHEST_LOG_PROB)
    return log_prob - jnp.log(-jnp.expm1(log_prob))
