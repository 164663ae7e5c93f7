"""Hugging Face Llama folders: config.json, safetensors and tokenizer files, in and out.

Weights pass through one tensor at a time. Pickled weights (.bin, .pt) are refused: opening one
runs whatever program its author put in it.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from flax.traverse_util import flatten_dict

from jaxdistill.convert.huggingface_config import read_config, write_config
from jaxdistill.convert.mapping import (
    LazyTensor,
    assemble,
    check_params,
    numpy_dtype,
    placements,
    slots,
)
from jaxdistill.data.tokenizers import Tokenizer, check_vocabulary
from jaxdistill.data.tokenizers.files import read_json, write_json
from jaxdistill.models.config import DecoderConfig

_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/attention/query/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/attention/query/bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/attention/key/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/attention/key/bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/attention/value/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/attention/value/bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/attention/output/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/attention/output/bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "layers/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/mlp/gate/bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "layers/mlp/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/mlp/up/bias": "model.layers.{layer}.mlp.up_proj.bias",
    "layers/mlp/down/kernel": "model.layers.{layer}.mlp.down_proj.weight",
    "layers/mlp/down/bias": "model.layers.{layer}.mlp.down_proj.bias",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def load(
    directory: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Load a Llama model from a folder with config.json and safetensors (one file or shards).

    Args:
      directory: the folder.
      dtype: "float32", "bfloat16" or "float16", the type of the parameters returned.

    Returns:
      The configuration and the parameters as host (numpy) arrays.

    Raises:
      FileNotFoundError: no config.json, no weights, or a shard is missing.
      ValueError: another model type, pickled weights, a truncated or corrupt file, a tensor that
        is missing, unknown, misshapen or not floating point.
    """
    directory = pathlib.Path(directory)
    numpy_dtype(dtype)
    config_file = directory / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{config_file}: a Hugging Face model folder has this file")
    config = read_config(read_json(config_file), config_file, dtype)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, LazyTensor] = {}
        for file in _weight_files(directory):
            tensors |= _open(file, stack)
        names = {path: _NAMES[path] for path in slots(config)}
        known = set(names.values())
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not _is_derived(name, tied="lm_head.weight" not in known)
        }
        return config, assemble(config, names, tensors, dtype=dtype, source=str(directory))


def _is_derived(name: str, *, tied: bool) -> bool:
    """Whether a tensor repeats what the rest says: old rotary tables, the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / _WEIGHTS).exists():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).exists():
        shards = sorted(set(read_json(directory / _INDEX).get("weight_map", {}).values()))
        if outside := [shard for shard in shards if pathlib.PurePath(shard).name != shard]:
            raise ValueError(f"{directory / _INDEX}: shard {outside[0]!r} is not in this folder")
        for shard in shards:
            if not (directory / shard).exists():
                raise FileNotFoundError(
                    f"{directory / shard}: the index lists this shard of {len(shards)} but it is "
                    "not there; fetch it"
                )
        return [directory / shard for shard in shards]
    pickles = [p.name for p in sorted(directory.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        raise ValueError(
            f"{directory}: the only weights here are pickled ({pickles[0]}), and opening a pickle "
            "runs the program inside it; save the model as safetensors first"
        )
    raise FileNotFoundError(f"{directory}: expected {_WEIGHTS} or {_INDEX} and found neither")


def _open(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
    try:
        file = stack.enter_context(safetensors.safe_open(path, framework="np"))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: this safetensors file is truncated or corrupt ({error}); fetch it again"
        ) from error
    found = {}
    for name in file.keys():  # noqa: SIM118 - the file is not a mapping
        view = file.get_slice(name)
        if view.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{path}: tensor {name!r} is stored as {view.get_dtype()}, but only "
                f"{', '.join(_FLOATS)} are read; use the unquantised model"
            )
        found[name] = LazyTensor(tuple(view.get_shape()), _reader(file, name))
    return found


def _reader(file: Any, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.get_tensor(name)


def export(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
) -> None:
    """Write a model as a folder that `transformers` loads: same logits, same tokens.

    Rows of a padded vocabulary are left out. Everything is written beside its place first and
    moved there at the end, config.json last; a run that dies leaves no half-written file.

    Args:
      directory: the folder, made if need be; files of the same names in it are replaced.
      config: the model.
      params: its parameters, numpy or jax arrays.
      tokenizer: written along with the model where given.
      dtype: "float32", "bfloat16" or "float16", the type of the weights in the file.

    Raises:
      ValueError: transformers' Llama cannot express the model, the parameters are not those of
        the configuration, or the tokenizer is not the model's; nothing is written.
    """
    numpy_dtype(dtype)
    leaves = flatten_dict(params, sep="/")
    check_params(config, leaves)
    ids = ("bos", "eos", "pad")
    token_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ids}
    values = write_config(config, dtype, token_ids)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as temporary:
        staged = pathlib.Path(temporary)
        _write_weights(staged / _WEIGHTS, config, leaves, dtype)
        if tokenizer is not None:
            tokenizer.save(staged)
        write_json(staged / "generation_config.json", token_ids)
        write_json(staged / "config.json", values)
        for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, directory / file.name)


def _write_weights(
    path: pathlib.Path, config: DecoderConfig, leaves: Mapping[str, Any], dtype: str
) -> None:
    """Write model.safetensors: uint64 header length, JSON header, then the tensors in a row."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    unpadded = dataclasses.replace(config, padded_vocab_size=None)
    for name, _, _, slot in placements(unpadded, _NAMES):
        size = math.prod(slot.file_shape) * numpy_dtype(dtype).itemsize
        header[name] = {
            "dtype": _STORED_AS[dtype],
            "shape": list(slot.file_shape),
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The data starts at a multiple of 8 bytes; the format allows spaces after the header.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in _tensors(config, leaves):
            file.write(values.astype(numpy_dtype(dtype)).tobytes())


def _tensors(config: DecoderConfig, leaves: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yield the values in the file's order and layout, one stacked leaf on the host at a time."""
    host_path, host = "", np.empty(0)
    for _, path, layer, slot in placements(config, _NAMES):
        if path != host_path:
            host_path, host = path, np.asarray(leaves[path])
        values = slot.to_file(host if layer is None else host[layer])
        # Only the vocabulary is ever padded, and it is the leading axis of its tables.
        is_table = path in ("embed/embedding", "head/kernel")
        yield values[: config.vocab_size] if is_table else values
