"""Attention and fused heads, each with a readable oracle and a lean XLA twin behind one function.

Imports jax alone. Installed as jaxdistill.kernels.
"""

from jaxdistill.kernels.attention.api import attention, attention_decode
from jaxdistill.kernels.attention.sharded import attention_ring, attention_sharded
from jaxdistill.kernels.dispatch import ImplementationError
from jaxdistill.kernels.generation import compiling_for
from jaxdistill.kernels.linear_cross_entropy.api import LinearCrossEntropy, linear_cross_entropy
from jaxdistill.kernels.linear_divergence.api import linear_divergence
from jaxdistill.kernels.linear_divergence.top_k import linear_divergence_top_k

__all__ = [
    "ImplementationError",
    "LinearCrossEntropy",
    "attention",
    "attention_decode",
    "attention_ring",
    "attention_sharded",
    "compiling_for",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_divergence_top_k",
]
