"""Generation of text from models."""

from jaxdistill.rollout.sampler import Generation, generate

__all__ = ["Generation", "generate"]
