"""Fused heads, each with a readable oracle and a lean XLA twin behind one function.

Imports jax alone. Installed as jaxdistill.kernels.
"""

from jaxdistill.kernels.dispatch import ImplementationError
from jaxdistill.kernels.linear_cross_entropy.api import LinearCrossEntropy, linear_cross_entropy
from jaxdistill.kernels.linear_divergence.api import linear_divergence

__all__ = [
    "ImplementationError",
    "LinearCrossEntropy",
    "linear_cross_entropy",
    "linear_divergence",
]
