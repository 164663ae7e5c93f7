"""Preference objectives against a frozen reference: DPO and its variants, DPO + NLL, KTO.

Log-probabilities of whole answers in (`sequence_log_prob`: sums over the answer's tokens), one
value a pair out. Everything is float32 and built on the log-sigmoid, so extreme margins give
finite values and gradients. Objectives without a reference: reference_free.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import log_sigmoid, sigmoid

from jaxdistill.losses import checks
from jaxdistill.losses.pairs import (
    ArrayLike,
    Pair,
    as_log_prob,
    check_label_smoothing,
    check_pair,
    mean_log_prob,
    smoothed_log_sigmoid,
)


class _Options(NamedTuple):
    beta: jax.Array
    label_smoothing: jax.Array
    discopop_temperature: jax.Array


def dpo(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    reference_chosen_log_prob: ArrayLike,
    reference_rejected_log_prob: ArrayLike,
    *,
    variant: str = "sigmoid",
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    discopop_temperature: ArrayLike = 0.05,
    chosen_length: ArrayLike | None = None,
    rejected_length: ArrayLike | None = None,
) -> jax.Array:
    """Direct preference optimisation: the chosen answer gains on the rejected one.

    With the implicit rewards w = beta (log pi - log pi_ref)(chosen), l the same of the rejected
    answer, h = w - l, e = label_smoothing and s the logistic function:

        sigmoid     -(1 - e) log s(h) - e log s(-h)                 2305.18290 (cDPO for e > 0)
        hinge       max(0, 1 - h)                                   2305.10425
        ipo         ((h - 1/2) / beta)^2                            2310.12036
        robust      (-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)    2403.00409
        exo         KL((s(h), s(-h)) || (1 - e, e)), e > 0          2402.00856
        nca         -log s(w) - log s(-w)/2 - log s(-l)/2           2402.05369
        bco         -log s(w) - log s(-l), no reward shift          2404.04656
        sppo        ((w - 1/2) / beta)^2 + ((l + 1/2) / beta)^2     2405.00675 (hard labels)
        apo_zero    s(-w) + s(l)                                    2408.06266
        apo_down    s(w) + s(-h)                                    2408.06266
        discopop    (1 - m) (-log s(h)) + m exp(-h), m = s(h / t)   2406.08414
        aot         sigmoid of quantiles, (chosen - rejected) of the policy against that of the
                    reference                                       2406.05882
        aot_unpaired  sigmoid of quantiles, w against l             2406.05882

    Both aot sort over the last axis: pair i meets the quantity that holds its rank in the other
    sample. They therefore look at the whole batch (inside shard_map: at the device's part), and
    padding pairs must be removed before, not masked after.

    The reference log-probabilities are constants: no gradient flows into them.

    Args:
      chosen_log_prob, rejected_log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      reference_chosen_log_prob, reference_rejected_log_prob: `[B]`, the same of the reference.
      variant: a name of the table.
      beta: scalar above 0.
      label_smoothing: scalar in [0, 0.5), the share of wrongly ordered pairs; only sigmoid, robust,
        aot, aot_unpaired and exo (which needs it above 0; its authors use 1e-3) know it.
      discopop_temperature: scalar t in (0, 1], of discopop alone.
      chosen_length, rejected_length: `[B]`, tokens of the answers. Given, log-ratios are averages
        over tokens; TRL's "ipo" and "sigmoid_norm" are ipo and sigmoid with lengths. An empty
        answer counts as one token.

    Returns:
      `[B]`, float32; sigmoid at pi = pi_ref is log 2.

    Raises:
      ValueError: an argument of the wrong shape or range, an unknown variant, one length without
        the other, or label smoothing in a variant that has none.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dpo
      >>> chosen, rejected = np.array([-3.0, -8.0]), np.array([-5.0, -4.0])
      >>> print(dpo(chosen, rejected, chosen, rejected).round(4))  # log 2 at the start
      [0.6931 0.6931]
      >>> print(dpo(chosen + 20, rejected, chosen, rejected).round(4))  # -log s(0.1 * 20)
      [0.1269 0.1269]
    """
    checks.check_option("variant", variant, tuple(VARIANTS))
    options = _check_options(variant, beta, label_smoothing, discopop_temperature)
    policy = check_pair("", chosen_log_prob, rejected_log_prob)
    reference = check_pair("reference_", reference_chosen_log_prob, reference_rejected_log_prob)
    checks.check_same_shape("reference_chosen_log_prob", reference[0], "chosen_log_prob", policy[0])
    policy, frozen = _per_token(
        policy, lax.stop_gradient(reference), chosen_length, rejected_length
    )
    chosen, rejected = policy[0] - frozen[0], policy[1] - frozen[1]
    if variant == "aot":
        chosen = policy[0] - policy[1]
        rejected = _with_ranks_of(chosen, frozen[0] - frozen[1])
    elif variant == "aot_unpaired":
        rejected = _with_ranks_of(chosen, rejected)
    return VARIANTS[variant](options.beta * chosen, options.beta * rejected, options)


def rpo(
    chosen_log_prob: ArrayLike,
    rejected_log_prob: ArrayLike,
    reference_chosen_log_prob: ArrayLike,
    reference_rejected_log_prob: ArrayLike,
    chosen_length: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    nll_weight: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    """DPO plus the chosen answer's negative log-likelihood per token: DPO that does not forget.

        dpo(...) - nll_weight * chosen_log_prob / chosen_length

    The objective of iterative reasoning preference optimisation and of SPECS' cold start. DPO is
    on sums, the likelihood on the average of each answer, so every pair weighs the same; TRL's
    "sft" term is the mean over the tokens of a microbatch instead, where long answers weigh more.

    The reference log-probabilities are constants: no gradient flows into them.

    Args:
      chosen_log_prob, rejected_log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      reference_chosen_log_prob, reference_rejected_log_prob: `[B]`, the same of the reference.
      chosen_length: `[B]`, tokens of the chosen answers; an empty one counts as one token.
      beta: scalar above 0.
      nll_weight: scalar of at least 0.
      label_smoothing: scalar in [0, 0.5), the share of wrongly ordered pairs.

    Returns:
      `[B]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2404.19733; SPECS, arXiv 2510.25801.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import rpo
      >>> chosen, rejected = np.array([-4.0]), np.array([-5.0])
      >>> print(rpo(chosen, rejected, chosen, rejected, np.array([2])).round(4))  # log 2 + 4 / 2
      [2.6931]
    """
    checks.check_between("nll_weight", nll_weight, 0.0, math.inf)
    preference = dpo(
        chosen_log_prob,
        rejected_log_prob,
        reference_chosen_log_prob,
        reference_rejected_log_prob,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    chosen = as_log_prob("chosen_log_prob", chosen_log_prob)
    average = mean_log_prob("chosen_length", chosen, chosen_length)
    return preference - jnp.asarray(nll_weight, jnp.float32) * average


def kto(
    log_prob: ArrayLike,
    reference_log_prob: ArrayLike,
    desirable: ArrayLike,
    reference_point: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation: single answers, each marked good or bad; no pairs.

        r = log_prob - reference_log_prob;  z = max(reference_point, 0)
        desirable_weight s(beta (z - r)) where desirable, undesirable_weight s(beta (r - z)) else

    z estimates KL(pi || pi_ref): the mean of log pi - log pi_ref over mismatched answers (the
    answer of another prompt) of the whole batch, `token_mean(log_ratio, mask)`, summed over
    microbatches and devices before `.mean()`. Zero gives the unpaired apo_zero of TRL.

    The reference log-probability and the reference point are constants: no gradient flows into
    them.

    Args:
      log_prob: `[B]`, log pi(answer | prompt), summed over the answer.
      reference_log_prob: `[B]`, the same of the reference.
      desirable: `[B]`, true or not 0 where the answer is good.
      reference_point: scalar, nats.
      beta: scalar above 0.
      desirable_weight, undesirable_weight: scalars of at least 0; the authors balance them so that
        the products with the counts differ by at most a third.

    Returns:
      `[B]`, float32, in [0, weight]; half the weight at pi = pi_ref.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2402.01306.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import kto
      >>> gains = np.array([10.0, 0.0])  # nats over the reference
      >>> print(kto(gains, np.zeros(2), np.array([True, False]), 0.0).round(4))
      [0.2689 0.5   ]
    """
    checks.check_positive("beta", beta)
    checks.check_between("desirable_weight", desirable_weight, 0.0, math.inf)
    checks.check_between("undesirable_weight", undesirable_weight, 0.0, math.inf)
    if jnp.ndim(reference_point) != 0:
        raise ValueError(
            f"reference_point must be a scalar, but its shape is {jnp.shape(reference_point)}"
        )
    log_prob = as_log_prob("log_prob", log_prob)
    reference = as_log_prob("reference_log_prob", reference_log_prob, log_prob.shape)
    good = checks.as_tokens("desirable", desirable, log_prob.shape) != 0
    point = lax.stop_gradient(jnp.maximum(jnp.asarray(reference_point, jnp.float32), 0.0))
    gain = log_prob - lax.stop_gradient(reference) - point
    weight = jnp.where(
        good,
        jnp.asarray(desirable_weight, jnp.float32),
        jnp.asarray(undesirable_weight, jnp.float32),
    )
    return weight * sigmoid(jnp.asarray(beta, jnp.float32) * jnp.where(good, -gain, gain))


def _per_token(
    policy: Pair,
    reference: Pair,
    chosen_length: ArrayLike | None,
    rejected_length: ArrayLike | None,
) -> tuple[Pair, Pair]:
    """Both pairs as they are, or divided by the lengths of the answers."""
    if chosen_length is None and rejected_length is None:
        return policy, reference
    if chosen_length is None or rejected_length is None:
        raise ValueError(
            "chosen_length and rejected_length must be given together, but one is None: give both "
            "for averages over tokens, or neither for sums"
        )

    def averages(pair: Pair) -> Pair:
        return (
            mean_log_prob("chosen_length", pair[0], chosen_length),
            mean_log_prob("rejected_length", pair[1], rejected_length),
        )

    return averages(policy), averages(reference)


def _check_options(
    variant: str, beta: ArrayLike, label_smoothing: ArrayLike, discopop_temperature: ArrayLike
) -> _Options:
    checks.check_positive("beta", beta)
    checks.check_between("discopop_temperature", discopop_temperature, 0.0, 1.0)
    checks.check_positive("discopop_temperature", discopop_temperature)
    check_label_smoothing(label_smoothing)
    if checks.is_concrete(label_smoothing):
        smooth = float(np.asarray(label_smoothing))
        if smooth > 0 and variant not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing must be 0 for variant {variant!r}, but it is {smooth}: "
                f"only {', '.join(_SMOOTHED)} know it"
            )
        if smooth == 0 and variant == "exo":
            raise ValueError(
                "label_smoothing must be above 0 for variant 'exo', but it is 0.0: a divergence "
                "from certainty is infinite, and the authors use 1e-3"
            )
    values = (beta, label_smoothing, discopop_temperature)
    return _Options(*(jnp.asarray(value, jnp.float32) for value in values))


def _with_ranks_of(values: jax.Array, sample: jax.Array) -> jax.Array:
    """`sample` rearranged so that position i holds the entry with the rank of values[i]."""
    ranks = jnp.argsort(jnp.argsort(lax.stop_gradient(values), axis=-1), axis=-1)
    return jnp.take_along_axis(jnp.sort(sample, axis=-1), ranks, axis=-1)


def _robust(chosen: jax.Array, rejected: jax.Array, options: _Options) -> jax.Array:
    wrong, margin = options.label_smoothing, chosen - rejected
    clean = -(1.0 - wrong) * log_sigmoid(margin) + wrong * log_sigmoid(-margin)
    return clean / (1.0 - 2.0 * wrong)


def _exo(chosen: jax.Array, rejected: jax.Array, options: _Options) -> jax.Array:
    wrong, margin = options.label_smoothing, chosen - rejected
    right_term = sigmoid(margin) * (log_sigmoid(margin) - jnp.log1p(-wrong))
    return right_term + sigmoid(-margin) * (log_sigmoid(-margin) - jnp.log(wrong))


def _discopop(chosen: jax.Array, rejected: jax.Array, options: _Options) -> jax.Array:
    # m exp(-h) as one exponential: the product of the two overflows to inf * 0 for h << 0.
    margin = chosen - rejected
    scaled = margin / options.discopop_temperature
    exponential = jnp.exp(log_sigmoid(scaled) - margin)
    return exponential - sigmoid(-scaled) * log_sigmoid(margin)


def _sigmoid(chosen: jax.Array, rejected: jax.Array, options: _Options) -> jax.Array:
    return smoothed_log_sigmoid(chosen - rejected, options.label_smoothing)


def _sppo(chosen: jax.Array, rejected: jax.Array, options: _Options) -> jax.Array:
    return (jnp.square(chosen - 0.5) + jnp.square(rejected + 0.5)) / jnp.square(options.beta)


# Each takes the implicit rewards of the chosen and of the rejected answer, and the options.
VARIANTS: dict[str, Callable[[jax.Array, jax.Array, _Options], jax.Array]] = {
    "sigmoid": _sigmoid,
    "hinge": lambda won, lost, _: jax.nn.relu(1.0 - (won - lost)),
    "ipo": lambda won, lost, options: jnp.square((won - lost - 0.5) / options.beta),
    "robust": _robust,
    "exo": _exo,
    "nca": lambda won, lost, _: -log_sigmoid(won) - (log_sigmoid(-won) + log_sigmoid(-lost)) / 2,
    "bco": lambda won, lost, _: -log_sigmoid(won) - log_sigmoid(-lost),
    "sppo": _sppo,
    "apo_zero": lambda won, lost, _: sigmoid(-won) + sigmoid(lost),
    "apo_down": lambda won, lost, _: sigmoid(won) + sigmoid(lost - won),
    "discopop": _discopop,
    "aot": _sigmoid,
    "aot_unpaired": _sigmoid,
}
_SMOOTHED = ("sigmoid", "robust", "exo", "aot", "aot_unpaired")
