"""Read Llama-family GGUF files: weights, configuration and the tokenizer inside.

GGUF keeps rotary pairs as neighbours (2i, 2i+1); ours are half a head apart, so the query and key
projections are permuted on the way in. Quantised tensors become floating point one at a time.
"""

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdistill.convert.gguf_header import Header, TensorInfo, read_header
from jaxdistill.convert.mapping import LazyTensor, assemble, make_config, numpy_dtype, slots
from jaxdistill.data.tokenizers import FastTokenizer, byte_level_bpe, scored_bpe
from jaxdistill.models.config import DecoderConfig, RopeScaling
from jaxdistill.models.rope import frequencies

# ggml's numbers of the tensor types that are read (and tested) here.
_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    8: "Q8_0",
    12: "Q4_K",
    14: "Q6_K",
}

_NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{layer}.attn_norm.weight",
    "layers/attention/query/kernel": "blk.{layer}.attn_q.weight",
    "layers/attention/query/bias": "blk.{layer}.attn_q.bias",
    "layers/attention/key/kernel": "blk.{layer}.attn_k.weight",
    "layers/attention/key/bias": "blk.{layer}.attn_k.bias",
    "layers/attention/value/kernel": "blk.{layer}.attn_v.weight",
    "layers/attention/value/bias": "blk.{layer}.attn_v.bias",
    "layers/attention/output/kernel": "blk.{layer}.attn_output.weight",
    "layers/attention/output/bias": "blk.{layer}.attn_output.bias",
    "layers/mlp_norm/scale": "blk.{layer}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{layer}.ffn_gate.weight",
    "layers/mlp/gate/bias": "blk.{layer}.ffn_gate.bias",
    "layers/mlp/up/kernel": "blk.{layer}.ffn_up.weight",
    "layers/mlp/up/bias": "blk.{layer}.ffn_up.bias",
    "layers/mlp/down/kernel": "blk.{layer}.ffn_down.weight",
    "layers/mlp/down/bias": "blk.{layer}.ffn_down.bias",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
# Llama 3's stretched rotary frequencies; they become a RopeScaling, not a parameter.
_ROPE_FACTORS = "rope_freqs.weight"

_UNKNOWN_TOKEN, _CONTROL_TOKEN, _USER_DEFINED_TOKEN = 2, 3, 4


def load(
    path: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Load a GGUF file of the llama architecture (F32, F16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K).

    Tensors are dequantised one at a time, so the host needs the result and about three times the
    largest tensor.

    Args:
      path: the file.
      dtype: "float32", "bfloat16" or "float16", the type of the parameters returned.

    Returns:
      The configuration and the parameters as host (numpy) arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the `gguf` package is missing.
      ValueError: not GGUF, truncated, corrupt, another architecture, a tensor missing, unknown,
        misshapen or of a type not listed above.
    """
    path = pathlib.Path(path)
    numpy_dtype(dtype)
    dequantize = _import_dequantize()
    header = read_header(path)
    data = np.memmap(path, mode="r", dtype=np.uint8)
    tensors = {
        name: LazyTensor(info.shape, _reader(path, data, name, info, dequantize))
        for name, info in header.tensors.items()
    }
    config = _read_config(path, header, tensors.pop(_ROPE_FACTORS, None), dtype)
    names = {leaf: _NAMES[leaf] for leaf in slots(config)}
    params = assemble(config, names, tensors, dtype=dtype, source=str(path), interleaved=True)
    return config, params


def load_tokenizer(path: str | os.PathLike[str]) -> FastTokenizer:
    """Load the tokenizer inside a GGUF file: byte-level BPE ("gpt2") or SentencePiece ("llama").

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not GGUF, truncated, corrupt, or without a tokenizer of these two kinds.
    """
    path = pathlib.Path(path)
    metadata = read_header(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            return byte_level_bpe(
                merges=metadata["tokenizer.ggml.merges"],
                pre_tokenizer=metadata.get("tokenizer.ggml.pre", "default"),
                **_common_tokenizer_fields(metadata, add_bos=False),
            )
        if kind == "llama":
            spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
            fields = _common_tokenizer_fields(metadata, add_bos=True)
            unknown = fields["tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
            scores = metadata["tokenizer.ggml.scores"]
            return scored_bpe(scores=scores, unknown=unknown, space_prefix=spaced, **fields)
    except KeyError as error:
        raise ValueError(f"{path}: the tokenizer in this GGUF file has no {error}") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: the tokenizer in this GGUF file is unusable: {error}") from error
    raise ValueError(
        f"{path}: the GGUF tokenizer should be 'gpt2' or 'llama' but this file has {kind!r}; use "
        "the model's tokenizer.json"
    )


def _common_tokenizer_fields(metadata: dict[str, Any], *, add_bos: bool) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(kinds)} token types")
    of_kind: dict[int, list[str]] = {}
    for token, kind in zip(tokens, kinds, strict=True):
        of_kind.setdefault(kind, []).append(token)
    return {
        "tokens": tokens,
        "control": of_kind.get(_UNKNOWN_TOKEN, []) + of_kind.get(_CONTROL_TOKEN, []),
        "user_defined": of_kind.get(_USER_DEFINED_TOKEN, []),
        "bos_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "add_bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _import_dequantize() -> Callable[[np.ndarray, int], np.ndarray]:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError(
            "reading GGUF weights needs the gguf package; run pip install 'jaxdistill[gguf]'"
        ) from error
    return lambda values, ggml_type: dequantize(values, GGMLQuantizationType(ggml_type))


def _reader(
    path: pathlib.Path,
    data: np.ndarray,
    name: str,
    info: TensorInfo,
    dequantize: Callable[[np.ndarray, int], np.ndarray],
) -> Callable[[], np.ndarray]:
    """Check that a tensor can be read, and return the function that reads it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if info.ggml_type not in _TYPES:
        raise ValueError(
            f"{path}: tensor {name!r} has ggml type {info.ggml_type}, which is not read here; "
            f"quantise the model to one of {', '.join(_TYPES.values())}"
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.ggml_type)]
    if not info.shape or info.shape[-1] % block:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {list(info.shape)} cannot be cut into blocks of "
            f"{block} as {_TYPES[info.ggml_type]} asks; the file is corrupt, fetch it again"
        )
    end = info.offset + math.prod(info.shape) // block * block_bytes
    if end > len(data):
        raise ValueError(
            f"{path}: the GGUF file is truncated: tensor {name!r} ends at byte {end:,} and the "
            f"file has {len(data):,}; fetch it again"
        )
    rows = (*info.shape[:-1], info.shape[-1] // block * block_bytes)
    return lambda: dequantize(_typed(data[info.offset : end].reshape(rows), info), info.ggml_type)


def _typed(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Plain floats are seen as such; quantised blocks stay bytes."""
    plain = {"F32": "<f4", "F16": "<f2"}.get(_TYPES[info.ggml_type])
    return raw if plain is None else raw.view(np.dtype(plain))


def _read_config(
    path: pathlib.Path, header: Header, rope_factors: LazyTensor | None, dtype: str
) -> DecoderConfig:
    _check_architecture(path, header.metadata)
    fields = _Fields(path, header.metadata)
    width, heads = fields["embedding_length"], fields["attention.head_count"]
    head_dim = fields.get("attention.key_length", width // heads)
    theta = fields.get("rope.freq_base", 10000.0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{path}: llama.{key} is {fields[key]} but heads have {head_dim} channels; values "
                "of another size and partly rotated heads are not supported"
            )
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else fields["vocab_size"]
    biased = {name for name in header.tensors if name.endswith(".bias")}
    return make_config(
        path,
        vocab_size=rows,
        width=width,
        num_layers=fields["block_count"],
        num_heads=heads,
        num_kv_heads=fields.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=fields["feed_forward_length"],
        max_length=fields["context_length"],
        rope_theta=theta,
        rope_scaling=_read_scaling(path, fields, head_dim, theta, rope_factors),
        norm_epsilon=fields["attention.layer_norm_rms_epsilon"],
        tie_embeddings="output.weight" not in header.tensors,
        attention_bias="blk.0.attn_q.bias" in biased,
        attention_output_bias="blk.0.attn_output.bias" in biased,
        mlp_bias="blk.0.ffn_gate.bias" in biased,
        param_dtype=dtype,
    )


def _check_architecture(path: pathlib.Path, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: the architecture should be 'llama' but this GGUF file says {architecture!r}"
        )
    if metadata.get("llama.expert_count"):
        raise ValueError(f"{path}: this is a mixture of experts, which is not supported")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path}: this is one of {metadata['split.count']} parts of a model; merge them first "
            "with llama.cpp's gguf-split"
        )


class _Fields:
    """The llama.* metadata: numbers only, single-precision floats as they were written down."""

    def __init__(self, path: pathlib.Path, metadata: dict[str, Any]) -> None:
        self._path, self._metadata = path, metadata

    def __getitem__(self, key: str) -> Any:
        value = self.get(key, None)
        if value is None:
            raise ValueError(
                f"{self._path}: the GGUF metadata has no llama.{key}; convert the model again"
            )
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{self._path}: llama.{key} should be positive but is {value!r}")
        return value

    def get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"llama.{key}", default)
        if isinstance(value, list):
            raise ValueError(
                f"{self._path}: llama.{key} differs by layer ({value[:3]}...), which is not "
                "supported"
            )
        # 1e-5 is stored in single precision; its shortest decimal form is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_scaling(
    path: pathlib.Path,
    fields: _Fields,
    head_dim: int,
    theta: float,
    rope_factors: LazyTensor | None,
) -> RopeScaling | None:
    if rope_factors is not None:
        return _llama3_scaling(path, rope_factors.read(), head_dim, theta)
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", fields["rope.scaling.factor"])
    if kind == "yarn" and fields.get("rope.scaling.attn_factor", 1.0) == 1.0:
        original = fields["rope.scaling.original_context_length"]
        return RopeScaling("yarn", fields["rope.scaling.factor"], original_max_length=original)
    raise ValueError(
        f"{path}: llama.rope.scaling.type {kind!r} with these settings is not supported; 'none', "
        "'linear', plain 'yarn' and Llama 3's are"
    )


def _llama3_scaling(
    path: pathlib.Path, factors: np.ndarray, head_dim: int, theta: float
) -> RopeScaling:
    """Recognise the published Llama 3 settings in the stretch of each frequency.

    GGUF holds only the result f_i / f'_i, so the settings are guessed and the guess is proved.
    """
    guess = RopeScaling("llama3", round(float(factors.max()), 4), original_max_length=8192)
    plain, _ = frequencies(head_dim, theta, length=1)
    stretched, _ = frequencies(head_dim, theta, guess, length=1)
    if factors.shape != plain.shape or not np.allclose(factors, plain / stretched, rtol=1e-4):
        raise ValueError(
            f"{path}: the rotary frequencies in {_ROPE_FACTORS!r} are not those of Llama 3 "
            "(original context 8192, band 1 to 4); load the model's safetensors instead"
        )
    return guess
