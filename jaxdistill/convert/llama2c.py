"""Read llama2.c checkpoints (`stories260K.bin`) and their tokenizers (`tok512.bin`).

A checkpoint is seven int32 (width, mlp width, layers, heads, kv heads, vocabulary, context),
then float32 tables in a fixed order, each stacked over the layers. A negative vocabulary
size says that an untied head follows. Rotary pairs are neighbours; ours are half a head apart.
"""

import math
import os
import pathlib
import struct
from typing import Any

import numpy as np

from jaxdistill.convert.mapping import LazyTensor, assemble, make_config, numpy_dtype, slots
from jaxdistill.data.tokenizers import FastTokenizer, scored_bpe
from jaxdistill.models.config import DecoderConfig

_HEADER = struct.Struct("<7i")
_NEWER_MAGIC = 0x616B3432  # "ak42", the versioned exports that came after this format

# Path in our tree -> name, in the order of the file. The two rotary tables are recomputed.
_ORDER = {
    "embed/embedding": "tok_embeddings",
    "layers/attention_norm/scale": "layers.{layer}.attention_norm",
    "layers/attention/query/kernel": "layers.{layer}.wq",
    "layers/attention/key/kernel": "layers.{layer}.wk",
    "layers/attention/value/kernel": "layers.{layer}.wv",
    "layers/attention/output/kernel": "layers.{layer}.wo",
    "layers/mlp_norm/scale": "layers.{layer}.ffn_norm",
    "layers/mlp/gate/kernel": "layers.{layer}.w1",
    "layers/mlp/down/kernel": "layers.{layer}.w2",
    "layers/mlp/up/kernel": "layers.{layer}.w3",
    "final_norm/scale": "norm",
    "rotary": "freq_cos and freq_sin",
    "head/kernel": "output",
}


def load(
    path: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Load a llama2.c checkpoint.

    Args:
      path: the `.bin` file.
      dtype: "float32", "bfloat16" or "float16", the type of the parameters returned.

    Returns:
      The configuration and the parameters as host (numpy) arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a llama2.c checkpoint, truncated, or longer than its header says.
    """
    path = pathlib.Path(path)
    numpy_dtype(dtype)
    config = _read_config(path, dtype)
    offsets, end = _offsets(config)
    size = path.stat().st_size
    if size != end:
        problem = "is truncated" if size < end else "has bytes after its last tensor"
        raise ValueError(
            f"{path}: the llama2.c file {problem}: its header asks for {end:,} bytes and it has "
            f"{size:,}; fetch it again"
        )
    data = np.memmap(path, mode="r", dtype="<f4", offset=_HEADER.size)
    tensors = {
        name: LazyTensor(shape, _reader(data, start, shape))
        for name, (start, shape) in offsets.items()
    }
    names = {leaf: name for leaf, name in _ORDER.items() if leaf in slots(config)}
    params = assemble(config, names, tensors, dtype=dtype, source=str(path), interleaved=True)
    return config, params


def _read_config(path: pathlib.Path, dtype: str) -> DecoderConfig:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(
            f"{path}: a llama2.c file starts with {_HEADER.size} bytes of header but this one "
            f"has {len(header)} bytes in all; fetch it again"
        )
    width, mlp_width, layers, heads, kv_heads, vocabulary, length = _HEADER.unpack(header)
    if width == _NEWER_MAGIC:
        raise ValueError(
            f"{path}: this is a versioned llama2.c export (magic 'ak42'); export it again with "
            "version 0, the only one read here"
        )
    sizes = (width, mlp_width, layers, heads, kv_heads, abs(vocabulary), length)
    if min(sizes) < 1 or max(sizes) > 1 << 24 or width % heads or heads % kv_heads:
        raise ValueError(
            f"{path}: a llama2.c header holds seven plausible sizes (width, mlp width, layers, "
            f"heads, kv heads, vocabulary, context) but this file starts with {list(sizes)}; it "
            "is another kind of file"
        )
    return make_config(
        path,
        vocab_size=abs(vocabulary),
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        max_length=length,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        tie_embeddings=vocabulary > 0,
        param_dtype=dtype,
    )


def _offsets(config: DecoderConfig) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Where each tensor starts (in floats after the header), its shape, and the file's size."""
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    position = 0
    shapes = slots(config)
    for path, name in _ORDER.items():
        if path == "rotary":
            position += config.max_length * config.head_dim
        elif path in shapes:
            shape = shapes[path].file_shape
            for layer in range(config.num_layers if path.startswith("layers/") else 1):
                found[name.format(layer=layer)] = (position, shape)
                position += math.prod(shape)
    return found, _HEADER.size + 4 * position


def _reader(data: np.ndarray, start: int, shape: tuple[int, ...]):
    return lambda: data[start : start + math.prod(shape)].reshape(shape)


def load_tokenizer(path: str | os.PathLike[str]) -> FastTokenizer:
    """Load a llama2.c tokenizer: int32 longest token, then (float32 score, int32 length, bytes).

    Ids 0, 1 and 2 are unknown, bos and eos, ids 3 to 258 the bytes. The text gets a leading space,
    and of all neighbours that join to a token the pair with the best score joins, again and again.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a llama2.c tokenizer, or truncated.
    """
    path = pathlib.Path(path)
    scores, tokens = _read_vocabulary(path)
    # llama2.c stores line breaks around these two only for a nicer print.
    tokens[1:3] = "<s>", "</s>"
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if tokens[3:259] != byte_tokens:
        raise ValueError(
            f"{path}: a llama2.c tokenizer has the 256 byte tokens at ids 3 to 258 but this file "
            f"has {tokens[3:4]} there; it is another kind of file"
        )
    return scored_bpe(
        tokens, scores, control=tokens[:3], space=" ", bos_id=1, eos_id=2, unknown=tokens[0]
    )


def _read_vocabulary(path: pathlib.Path) -> tuple[list[float], list[str]]:
    data = path.read_bytes()
    entry = struct.Struct("<fi")
    scores: list[float] = []
    tokens: list[str] = []
    position = 4
    while position < len(data):
        body = position + entry.size
        score, length = entry.unpack_from(data, position) if body <= len(data) else (0.0, -1)
        if length < 0 or body + length > len(data):
            raise ValueError(
                f"{path}: the llama2.c tokenizer is truncated or corrupt in token {len(tokens)}, "
                f"at byte {position:,} of {len(data):,}; fetch it again"
            )
        scores.append(score)
        tokens.append(data[body : body + length].decode("utf-8", errors="replace"))
        position = body + length
    return scores, tokens
