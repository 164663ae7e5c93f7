"""Where every tensor of a foreign file lands in our parameter tree, and in which shape.

A format only says what its tensors are called and whether its rotary pairs are interleaved;
shapes, transposes, stacking over layers and the checks are here, once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxdistill.models.config import DecoderConfig

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class LazyTensor(NamedTuple):
    """A tensor still in its file: the shape is known, the numbers are read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Slot(NamedTuple):
    """One leaf of the parameter tree, seen for a single layer.

    `shape` is ours and `file_shape` is what Llama-style files hold; a transposed leaf is
    [out, in] there and [in, out] here. `rotary_heads` counts the heads whose rotary pairs have
    to be moved when the file interleaves them, and is 0 for a leaf that RoPE never touches.
    """

    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    transposed: bool = False
    rotary_heads: int = 0

    def from_file(self, values: np.ndarray, *, interleaved: bool = False) -> np.ndarray:
        """Turn the file's layout into ours."""
        if interleaved and self.rotary_heads:
            values = deinterleave(values, self.rotary_heads)
        return (values.T if self.transposed else values).reshape(self.shape)

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Turn our layout into the file's (half-split rotary pairs, as Hugging Face)."""
        if not self.transposed:
            return values.reshape(self.file_shape)
        return values.reshape(self.file_shape[::-1]).T


def deinterleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Move rotary pairs from neighbours (2i, 2i+1) to half a head apart (i, i + head_dim/2).

    Args:
      values: [heads * head_dim, ...], a query or key projection or bias.
      heads: how many heads the leading axis holds.

    Returns:
      The same rows in the half-split order of Hugging Face.

    >>> deinterleave(np.array([0, 1, 2, 3, 10, 11, 12, 13]), heads=2).tolist()
    [0, 2, 1, 3, 10, 12, 11, 13]
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def make_config(source: object, **fields: Any) -> DecoderConfig:
    """A DecoderConfig whose errors name the file that its fields came from."""
    try:
        return DecoderConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: the file describes no usable model: {error}") from error


def slots(config: DecoderConfig) -> dict[str, Slot]:
    """Every leaf of the decoder by path; those below "layers/" are given for one layer."""
    vocabulary = (config.embedding_rows, config.width)
    found = {
        "embed/embedding": Slot(vocabulary, vocabulary),
        "final_norm/scale": _vector(config.width),
    }
    if not config.tie_embeddings:
        found["head/kernel"] = Slot(vocabulary, vocabulary)
    layer = {
        "attention_norm/scale": _vector(config.width),
        **_attention_slots(config),
        "mlp_norm/scale": _vector(config.width),
        **_mlp_slots(config),
    }
    return found | {f"layers/{path}": slot for path, slot in layer.items()}


def _attention_slots(config: DecoderConfig) -> dict[str, Slot]:
    found = {}
    width, head_dim = (config.width,), config.head_dim
    for name, heads, rotary in (
        ("query", config.num_heads, True),
        ("key", config.num_kv_heads, True),
        ("value", config.num_kv_heads, False),
    ):
        rotary_heads = heads if rotary else 0
        found[f"attention/{name}/kernel"] = _projection(width, (heads, head_dim), rotary_heads)
        if config.attention_bias:
            found[f"attention/{name}/bias"] = _vector(heads, head_dim, rotary_heads=rotary_heads)
    found["attention/output/kernel"] = _projection((config.num_heads, head_dim), width)
    if config.attention_output_bias:
        found["attention/output/bias"] = _vector(config.width)
    if config.query_key_norm:
        found["attention/query_norm/scale"] = _vector(head_dim, rotary_heads=1)
        found["attention/key_norm/scale"] = _vector(head_dim, rotary_heads=1)
    return found


def _mlp_slots(config: DecoderConfig) -> dict[str, Slot]:
    found = {}
    width, hidden = (config.width,), (config.mlp_width,)
    for name, inputs, outputs in (
        ("gate", width, hidden),
        ("up", width, hidden),
        ("down", hidden, width),
    ):
        found[f"mlp/{name}/kernel"] = _projection(inputs, outputs)
        if config.mlp_bias:
            found[f"mlp/{name}/bias"] = _vector(*outputs)
    return found


def _projection(inputs: tuple[int, ...], outputs: tuple[int, ...], rotary_heads: int = 0) -> Slot:
    file_shape = (math.prod(outputs), math.prod(inputs))
    return Slot(inputs + outputs, file_shape, transposed=True, rotary_heads=rotary_heads)


def _vector(*shape: int, rotary_heads: int = 0) -> Slot:
    return Slot(shape, (math.prod(shape),), rotary_heads=rotary_heads)


def placements(
    config: DecoderConfig, names: Mapping[str, str]
) -> Iterator[tuple[str, str, int | None, Slot]]:
    """Yield (file name, path, layer or None, slot) for every tensor the model needs.

    Args:
      config: the model.
      names: path -> file name; below "layers/" the name holds "{layer}".
    """
    for path, slot in slots(config).items():
        if not path.startswith("layers/"):
            yield names[path], path, None, slot
            continue
        for layer in range(config.num_layers):
            yield names[path].format(layer=layer), path, layer, slot


def assemble(
    config: DecoderConfig,
    names: Mapping[str, str],
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: str,
    source: str,
    interleaved: bool = False,
) -> dict[str, Any]:
    """Read the tensors of a file, one at a time, into a parameter tree of host arrays.

    Args:
      config: the model the file says it holds.
      names: path in our tree -> name in the file ("{layer}" where there is one per layer).
      tensors: everything the file holds.
      dtype: "float32", "bfloat16" or "float16".
      source: what to call the file in an error.
      interleaved: whether its rotary pairs are neighbours, as in GGUF llama and llama2.c.

    Returns:
      The nested parameter dict, numpy leaves, layers stacked on the leading axis.

    Raises:
      ValueError: a tensor is missing, unknown or has another shape; an unknown dtype.
    """
    check_tensors(config, names, tensors, source)
    leaves: dict[str, np.ndarray] = {}
    for name, path, layer, slot in placements(config, names):
        values = slot.from_file(tensors[name].read(), interleaved=interleaved)
        if layer is None:
            # A copy, so that no leaf keeps a whole memory-mapped file alive.
            leaves[path] = np.array(values, numpy_dtype(dtype), order="C")
            continue
        if path not in leaves:
            leaves[path] = np.empty((config.num_layers, *slot.shape), numpy_dtype(dtype))
        leaves[path][layer] = values
    return unflatten_dict(leaves, sep="/")


def check_tensors(
    config: DecoderConfig,
    names: Mapping[str, str],
    tensors: Mapping[str, LazyTensor],
    source: str,
) -> None:
    """Refuse a file whose tensors are not exactly those of the model it says it holds."""
    if config.num_layers > len(tensors):
        raise ValueError(
            f"{source}: the configuration asks for {config.num_layers} layers but the file has "
            f"{len(tensors)} tensors in all; the file is incomplete or corrupt"
        )
    expected = {name: slot.file_shape for name, _, _, slot in placements(config, names)}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing, the first is "
            f"{missing[0]!r}; the file is incomplete or describes another model"
        )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(
            f"{source}: {len(unknown)} tensors have no place in a Llama-style decoder, the first "
            f"is {unknown[0]!r}; convert a model of that family, without adapters"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source}: tensor {name!r} should have shape {list(shape)} by the file's own "
                f"configuration but has {list(tensors[name].shape)}"
            )


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name; an unknown name is a ValueError that lists the known ones."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def check_params(config: DecoderConfig, leaves: Mapping[str, Any]) -> None:
    """Refuse flattened parameters that are not those of a configuration.

    Raises:
      ValueError: a leaf is missing, unknown or has another shape.
    """
    expected = {
        path: ((config.num_layers,) if path.startswith("layers/") else ()) + slot.shape
        for path, slot in slots(config).items()
    }
    if different := sorted(expected.keys() ^ leaves.keys()):
        state = "missing from" if different[0] in expected else "not expected in"
        raise ValueError(
            f"the parameters are not those of this configuration: {different[0]!r} is {state} them"
        )
    for path, shape in expected.items():
        if tuple(leaves[path].shape) != shape:
            raise ValueError(
                f"parameter {path!r} should have shape {list(shape)} by the configuration but has "
                f"{list(leaves[path].shape)}"
            )
