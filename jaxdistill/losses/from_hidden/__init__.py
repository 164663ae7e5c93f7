"""The losses as functions of hidden states and a head: equal to the logits forms, never the logits.

Train with these: memory grows with a tile of about 64 MiB, not with [tokens, vocabulary].
"""

from jaxdistill.losses.from_hidden.acceptance import log_acceptance, tvd_plus_plus
from jaxdistill.losses.from_hidden.cross_entropy import cross_entropy, entropy, log_probs
from jaxdistill.losses.from_hidden.cross_tokenizer import universal_logit
from jaxdistill.losses.from_hidden.curio import curio_sft
from jaxdistill.losses.from_hidden.divergence import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from jaxdistill.losses.from_hidden.policy import (
    chord,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    hpt,
    iw_sft,
    luffy,
    on_policy_distillation,
    opsd,
    pi_distill,
    policy_gradient,
    ppo_policy,
    reinforce_plus_plus,
    rloo,
    srft,
    uft,
)
from jaxdistill.losses.from_hidden.preference import (
    cpo,
    dpo,
    kto,
    orpo,
    redi,
    rpo,
    sequence_log_prob,
    simpo,
)
from jaxdistill.losses.from_hidden.sft import asft, dft, one_token_rollout, unlikelihood
from jaxdistill.losses.from_hidden.sparse_divergence import (
    first,
    sample_teacher,
    sampled_forward_kl,
    top_k_teacher,
    topk_forward_kl,
)
from jaxdistill.losses.from_hidden.taid import taid_target

__all__ = [
    "adaptive_kl",
    "asft",
    "chord",
    "cispo",
    "cpo",
    "cross_entropy",
    "curio_sft",
    "dapo",
    "dft",
    "dpo",
    "dr_grpo",
    "entropy",
    "first",
    "forward_kl",
    "grpo",
    "gspo",
    "hpt",
    "iw_sft",
    "jensen_shannon",
    "kto",
    "log_acceptance",
    "log_probs",
    "luffy",
    "on_policy_distillation",
    "one_token_rollout",
    "opsd",
    "orpo",
    "pi_distill",
    "policy_gradient",
    "ppo_policy",
    "redi",
    "reinforce_plus_plus",
    "reverse_kl",
    "rloo",
    "rpo",
    "sample_teacher",
    "sampled_forward_kl",
    "sequence_log_prob",
    "simpo",
    "skew_forward_kl",
    "skew_reverse_kl",
    "srft",
    "symmetric_kl",
    "taid_target",
    "top_k_teacher",
    "topk_forward_kl",
    "total_variation",
    "tvd_plus_plus",
    "uft",
    "universal_logit",
    "unlikelihood",
]
