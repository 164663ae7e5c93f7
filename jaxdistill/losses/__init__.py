"""Losses as pure functions on arrays: unreduced float32 values in nats, then one reduction.

    from jaxdistill import losses
    labels, mask = losses.shift(tokens, loss_mask, segment_ids)
    loss = losses.token_mean(losses.cross_entropy(logits, labels), mask).mean()

Numpy or jax arrays go in, jax arrays come out. `losses.from_hidden` has the forms for training,
which take hidden states and a head and never hold the logits.
"""

from jaxdistill.losses import from_hidden
from jaxdistill.losses.cross_entropy import cross_entropy, soft_cross_entropy
from jaxdistill.losses.diffusion import gaussian_log_prob, pso_hinge, pso_offline, pso_online
from jaxdistill.losses.divergence import forward_kl, reverse_kl
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

__all__ = [
    "Shifted",
    "Weighted",
    "bradley_terry",
    "cpo",
    "cross_entropy",
    "divergence_mask",
    "dpo",
    "entropy",
    "forward_kl",
    "from_hidden",
    "gaussian_log_prob",
    "kto",
    "log_probs",
    "orpo",
    "pso_hinge",
    "pso_offline",
    "pso_online",
    "redi",
    "reverse_kl",
    "rpo",
    "sequence_log_prob",
    "sequence_mean",
    "sequence_sum",
    "shift",
    "simpo",
    "soft_cross_entropy",
    "token_bradley_terry",
    "token_mean",
]
