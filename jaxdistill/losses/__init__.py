"""Losses as pure functions on arrays: unreduced float32 values in nats, then one reduction.

    from jaxdistill import losses
    labels, mask = losses.shift(tokens, loss_mask, segment_ids)
    loss = losses.token_mean(losses.cross_entropy(logits, labels), mask).mean()

Numpy or jax arrays go in, jax arrays come out. `losses.from_hidden` has the forms for training,
which take hidden states and a head and never hold the logits.
"""

from jaxdistill.losses import from_hidden
from jaxdistill.losses.advantages import (
    Gae,
    filter_groups,
    gae,
    group_advantages,
    overlong_penalty,
    reinforce_plus_plus_advantages,
    token_rewards,
    whiten,
)
from jaxdistill.losses.cross_entropy import cross_entropy, soft_cross_entropy, top_k_accuracy
from jaxdistill.losses.curio import curio_sft, temperature_for_entropy
from jaxdistill.losses.diffusion import gaussian_log_prob, pso_hinge, pso_offline, pso_online
from jaxdistill.losses.divergence import forward_kl, reverse_kl
from jaxdistill.losses.hybrids import hpt, luffy, policy_shaping, srft
from jaxdistill.losses.masked_thought import linear_ramp, mask_thought
from jaxdistill.losses.mixtures import chord, iw_sft, uft
from jaxdistill.losses.policy import policy_gradient, policy_surrogate
from jaxdistill.losses.policy_distillation import (
    distillation_advantages,
    on_policy_distillation,
    opsd,
    pi_distill,
)
from jaxdistill.losses.policy_objectives import cispo, dapo, dr_grpo, grpo, gspo, rloo
from jaxdistill.losses.policy_terms import entropy_bonus, importance_weights, kl_estimate
from jaxdistill.losses.ppo import ppo_policy, ppo_value, reinforce_plus_plus
from jaxdistill.losses.preference import dpo, kto, rpo
from jaxdistill.losses.reduce import (
    Shifted,
    Weighted,
    entropy,
    log_probs,
    sequence_log_prob,
    sequence_mean,
    sequence_sum,
    shift,
    token_mean,
)
from jaxdistill.losses.reference_free import cpo, orpo, redi, simpo
from jaxdistill.losses.reward import bradley_terry, divergence_mask, token_bradley_terry
from jaxdistill.losses.sft import asft, dft, key_token_weights, one_token_rollout, unlikelihood

__all__ = [
    "Gae",
    "Shifted",
    "Weighted",
    "asft",
    "bradley_terry",
    "chord",
    "cispo",
    "cpo",
    "cross_entropy",
    "curio_sft",
    "dapo",
    "dft",
    "distillation_advantages",
    "divergence_mask",
    "dpo",
    "dr_grpo",
    "entropy",
    "entropy_bonus",
    "filter_groups",
    "forward_kl",
    "from_hidden",
    "gae",
    "gaussian_log_prob",
    "group_advantages",
    "grpo",
    "gspo",
    "hpt",
    "importance_weights",
    "iw_sft",
    "key_token_weights",
    "kl_estimate",
    "kto",
    "linear_ramp",
    "log_probs",
    "luffy",
    "mask_thought",
    "on_policy_distillation",
    "one_token_rollout",
    "opsd",
    "orpo",
    "overlong_penalty",
    "pi_distill",
    "policy_gradient",
    "policy_shaping",
    "policy_surrogate",
    "ppo_policy",
    "ppo_value",
    "pso_hinge",
    "pso_offline",
    "pso_online",
    "redi",
    "reinforce_plus_plus",
    "reinforce_plus_plus_advantages",
    "reverse_kl",
    "rloo",
    "rpo",
    "sequence_log_prob",
    "sequence_mean",
    "sequence_sum",
    "shift",
    "simpo",
    "soft_cross_entropy",
    "srft",
    "temperature_for_entropy",
    "token_bradley_terry",
    "token_mean",
    "token_rewards",
    "top_k_accuracy",
    "uft",
    "unlikelihood",
    "whiten",
]
