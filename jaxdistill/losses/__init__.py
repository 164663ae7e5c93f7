"""Losses as pure functions on arrays: unreduced float32 values in nats, then one reduction.

    from jaxdistill import losses
    labels, mask = losses.shift(tokens, loss_mask, segment_ids)
    loss = losses.token_mean(losses.cross_entropy(logits, labels), mask).mean()

Numpy or jax arrays go in, jax arrays come out. `losses.from_hidden` has the forms for training,
which take hidden states and a head and never hold the logits.
"""

from jaxdistill.losses import from_hidden
from jaxdistill.losses.cross_entropy import cross_entropy, soft_cross_entropy
from jaxdistill.losses.divergence import forward_kl, reverse_kl
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

__all__ = [
    "Shifted",
    "Weighted",
    "cross_entropy",
    "entropy",
    "forward_kl",
    "from_hidden",
    "log_probs",
    "reverse_kl",
    "sequence_log_prob",
    "sequence_mean",
    "sequence_sum",
    "shift",
    "soft_cross_entropy",
    "token_mean",
]
