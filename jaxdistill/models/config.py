"""What a decoder is: sizes and switches, checked once; hashable, so jit takes it as static."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

RopeKind = Literal["linear", "dynamic", "llama3", "yarn"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]
FLOAT_TYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the one trained on.

    The formula of each kind is in `jaxdistill.models.rope.frequencies`. The names in brackets are
    those of a Hugging Face config.json.

    Args:
        kind: "linear", "dynamic" (NTK by length), "llama3" or "yarn" [rope_type].
        factor: by how much the context is stretched, >= 1.
        original_max_length: the context trained on, in tokens [original_max_position_embeddings];
            every kind but "linear" needs it.
        low_frequency_factor, high_frequency_factor: llama3's band between stretched and kept
            wavelengths, in turns over the original context.
        beta_fast, beta_slow: yarn's band, in turns over the original context.
        attention_factor: yarn's multiplier of cos and sin; None means 0.1 ln(factor) + 1.

    Raises:
        ValueError: an unknown kind or a parameter out of range.
    """

    kind: RopeKind
    factor: float
    original_max_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_choice("rope scaling kind", self.kind, get_args(RopeKind))
        if self.factor < 1:
            raise ValueError(f"rope scaling factor must be at least 1, not {self.factor}")
        if self.kind != "linear" and (self.original_max_length or 0) < 1:
            raise ValueError(
                f"rope scaling {self.kind!r} needs original_max_length >= 1 (the context trained "
                f"on), not {self.original_max_length}"
            )
        if self.kind == "llama3" and not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor must be below high_frequency_factor, but "
                f"{self.low_frequency_factor} >= {self.high_frequency_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"yarn needs 0 < beta_slow < beta_fast, "
                f"not beta_slow={self.beta_slow}, beta_fast={self.beta_fast}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama-style decoder: every size in elements, every length in tokens.

    Args:
        vocab_size: number of tokens that exist.
        width: size of the residual stream.
        num_layers, num_heads, num_kv_heads, head_dim: num_heads is a multiple of num_kv_heads.
        mlp_width: inner size of the SwiGLU block.
        max_length: the longest sequence the model accepts.
        rope_theta, rope_scaling: base of the rotary frequencies, and how they are stretched.
        norm_epsilon: added to the mean square in RMSNorm.
        tie_embeddings: the head is the embedding; params then have no "head".
        padded_vocab_size: rows of embedding and head (None: vocab_size); the extra are never used.
        query_key_norm: RMSNorm over head_dim on queries and keys, before the rotation.
        attention_bias, attention_output_bias, mlp_bias: biases of query/key/value, output, and MLP.
        attention_soft_cap, logit_soft_cap: c in c tanh(x / c), on scores and on logits.
        sliding_window: a token sees itself and the sliding_window - 1 tokens before it.
        dtype, param_dtype: type of activations, and of the parameters that `init` makes.
        remat: what the backward pass keeps of each layer: "none" (everything is kept), "full"
            (only the layer's input), "dots" (matrix products), "dots_no_batch" (those without
            batch dimensions: projections but not attention scores).
        scan_layers: run the layers by jax.lax.scan (compiled once) or unrolled.

    Raises:
        ValueError: a size, switch or combination that makes no decoder.

    >>> config = DecoderConfig(vocab_size=512, width=64, num_layers=5, num_heads=8, num_kv_heads=4,
    ...                        head_dim=8, mlp_width=172, max_length=512)
    >>> DecoderConfig.from_dict(config.to_dict()) == config
    True
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    padded_vocab_size: int | None = None
    query_key_norm: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    sliding_window: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in _POSITIVE:
            if (number := getattr(self, name)) is not None and number <= 0:
                raise ValueError(f"{name} must be positive, not {number}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"but {self.num_heads} is not one of {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.embedding_rows < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size must be at least vocab_size ({self.vocab_size}), "
                f"not {self.padded_vocab_size}"
            )
        _check_choice("dtype", self.dtype, FLOAT_TYPES)
        _check_choice("param_dtype", self.param_dtype, FLOAT_TYPES)
        _check_choice("remat", self.remat, get_args(Remat))

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding and of the head: the padded vocabulary."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Build from `to_dict`'s output; an unknown key is a ValueError with the nearest name."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"DecoderConfig has no field {name!r}{_nearest(name, known)}")
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):
            scaling = RopeScaling(**scaling)
        return cls(**{**values, "rope_scaling": scaling})


_SIZES = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_width",
    "max_length",
)
_POSITIVE = (
    "rope_theta",
    "norm_epsilon",
    "attention_soft_cap",
    "logit_soft_cap",
    "sliding_window",
)


def _check_choice(what: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(
            f"{what} must be one of {', '.join(choices)}, not {given!r}{_nearest(given, choices)}"
        )


def _nearest(name: str, choices: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
