"""Losses as pure functions on arrays: unreduced float32 values in nats, then one reduction.

    from jaxdistill import losses
    labels, mask = losses.shift(tokens, loss_mask, segment_ids)
    loss = losses.token_mean(losses.cross_entropy(logits, labels), mask).mean()

Numpy or jax arrays go in, jax arrays come out. `losses.from_hidden` has the forms for training,
which take hidden states and a head and never hold the logits.
"""

from jaxdistill.losses import from_hidden
from jaxdistill.losses.acceptance import log_acceptance, total_variation, tvd_plus_plus
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
from jaxdistill.losses.attention_transfer import (
    attention_kl,
    attention_mse,
    attention_transfer,
    self_attention_relation,
)
from jaxdistill.losses.balance import localized_balance
from jaxdistill.losses.classifier_distillation import decoupled_kd, dist, standardize_logits
from jaxdistill.losses.contrastive import barlow_twins, nt_xent
from jaxdistill.losses.cross_entropy import cross_entropy, soft_cross_entropy, top_k_accuracy
from jaxdistill.losses.cross_tokenizer import universal_logit
from jaxdistill.losses.curio import curio_sft, temperature_for_entropy
from jaxdistill.losses.diffusion import gaussian_log_prob, pso_hinge, pso_offline, pso_online
from jaxdistill.losses.divergence import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
)
from jaxdistill.losses.ensembles import (
    dho,
    dho_probabilities,
    ensemble_probabilities,
    output_discrimination,
    reverse_gradient,
    unfused,
)
from jaxdistill.losses.features import (
    dmae_alignment,
    hidden_cosine,
    hidden_mse,
    masked_reconstruction,
)
from jaxdistill.losses.first import first, recalibrate_top_k
from jaxdistill.losses.hybrids import hpt, luffy, policy_shaping, srft
from jaxdistill.losses.joint_label import sla, sla_aggregate, sla_distillation, sla_single
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
from jaxdistill.losses.relational import linear_cka, relation_cosine, rkd_angle, rkd_distance
from jaxdistill.losses.reward import bradley_terry, divergence_mask, token_bradley_terry
from jaxdistill.losses.sampled_divergence import (
    TeacherSamples,
    sample_teacher,
    sampled_forward_kl,
)
from jaxdistill.losses.sft import asft, dft, key_token_weights, one_token_rollout, unlikelihood
from jaxdistill.losses.sparse_divergence import TeacherTopK, top_k_teacher, topk_forward_kl
from jaxdistill.losses.taid import taid_target

__all__ = [
    "Gae",
    "Shifted",
    "TeacherSamples",
    "TeacherTopK",
    "Weighted",
    "adaptive_kl",
    "asft",
    "attention_kl",
    "attention_mse",
    "attention_transfer",
    "barlow_twins",
    "bradley_terry",
    "chord",
    "cispo",
    "cpo",
    "cross_entropy",
    "curio_sft",
    "dapo",
    "decoupled_kd",
    "dft",
    "dho",
    "dho_probabilities",
    "dist",
    "distillation_advantages",
    "divergence_mask",
    "dmae_alignment",
    "dpo",
    "dr_grpo",
    "ensemble_probabilities",
    "entropy",
    "entropy_bonus",
    "filter_groups",
    "first",
    "forward_kl",
    "from_hidden",
    "gae",
    "gaussian_log_prob",
    "group_advantages",
    "grpo",
    "gspo",
    "hidden_cosine",
    "hidden_mse",
    "hpt",
    "importance_weights",
    "iw_sft",
    "jensen_shannon",
    "key_token_weights",
    "kl_estimate",
    "kto",
    "linear_cka",
    "linear_ramp",
    "localized_balance",
    "log_acceptance",
    "log_probs",
    "luffy",
    "mask_thought",
    "masked_reconstruction",
    "nt_xent",
    "on_policy_distillation",
    "one_token_rollout",
    "opsd",
    "orpo",
    "output_discrimination",
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
    "recalibrate_top_k",
    "redi",
    "reinforce_plus_plus",
    "reinforce_plus_plus_advantages",
    "relation_cosine",
    "reverse_gradient",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "rloo",
    "rpo",
    "sample_teacher",
    "sampled_forward_kl",
    "self_attention_relation",
    "sequence_log_prob",
    "sequence_mean",
    "sequence_sum",
    "shift",
    "simpo",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sla",
    "sla_aggregate",
    "sla_distillation",
    "sla_single",
    "soft_cross_entropy",
    "srft",
    "standardize_logits",
    "symmetric_kl",
    "taid_target",
    "temperature_for_entropy",
    "token_bradley_terry",
    "token_mean",
    "token_rewards",
    "top_k_accuracy",
    "top_k_teacher",
    "topk_forward_kl",
    "total_variation",
    "tvd_plus_plus",
    "uft",
    "unfused",
    "universal_logit",
    "unlikelihood",
    "whiten",
]
