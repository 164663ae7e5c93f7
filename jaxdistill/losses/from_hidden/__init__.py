"""The losses as functions of hidden states and a head: equal to the logits forms, never the logits.

Train with these: memory grows with a tile of about 64 MiB, not with [tokens, vocabulary].
"""

from jaxdistill.losses.from_hidden.cross_entropy import cross_entropy, log_probs
from jaxdistill.losses.from_hidden.divergence import forward_kl, reverse_kl

__all__ = ["cross_entropy", "forward_kl", "log_probs", "reverse_kl"]
