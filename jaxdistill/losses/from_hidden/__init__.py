"""The losses as functions of hidden states and a head: equal to the logits forms, never the logits.

Train with these: memory grows with a tile of about 64 MiB, not with [tokens, vocabulary].
"""

from jaxdistill.losses.from_hidden.cross_entropy import cross_entropy, log_probs
from jaxdistill.losses.from_hidden.curio import curio_sft
from jaxdistill.losses.from_hidden.divergence import forward_kl, reverse_kl
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

__all__ = [
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
    "forward_kl",
    "grpo",
    "gspo",
    "hpt",
    "iw_sft",
    "kto",
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
    "sequence_log_prob",
    "simpo",
    "srft",
    "uft",
    "unlikelihood",
]
