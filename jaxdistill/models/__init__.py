"""Model families and their surgery: pure functions of nested-dict parameters."""

from jaxdistill.models import decoder, surgery
from jaxdistill.models.config import DecoderConfig, RopeScaling

__all__ = ["DecoderConfig", "RopeScaling", "decoder", "surgery"]
