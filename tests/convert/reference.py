"""An independent Llama in float64 numpy, and random weights in the layout of foreign files.

Written from the formulas, with projections as files hold them ([out, in]) and rotary pairs either
neighbours ("interleaved": GGUF, llama2.c) or half a head apart (Hugging Face).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model small enough to run anywhere; no two sizes that could be confused are equal."""

    vocabulary: int = 40
    width: int = 24
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 8
    mlp: int = 56
    length: int = 32
    theta: float = 500.0
    epsilon: float = 1e-5
    tied: bool = False
    biases: bool = False


# So many layers that a tensor is nothing beside the model: a loader that holds all of it shows.
DEEP = Sizes(vocabulary=256, width=256, layers=24, heads=8, head_dim=32, mlp=256, tied=True)
DEEP_TENSOR_BYTES = 4 * 256 * 256


def random_weights(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face name, in [out, in] layout."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    def scale(size: int) -> np.ndarray:
        return generator.uniform(0.5, 1.5, size).astype(np.float32)

    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = {"model.embed_tokens.weight": draw(sizes.vocabulary, sizes.width)}
    for layer in range(sizes.layers):
        projections = {
            "self_attn.q_proj": (queries, sizes.width),
            "self_attn.k_proj": (keys, sizes.width),
            "self_attn.v_proj": (keys, sizes.width),
            "self_attn.o_proj": (sizes.width, queries),
            "mlp.gate_proj": (sizes.mlp, sizes.width),
            "mlp.up_proj": (sizes.mlp, sizes.width),
            "mlp.down_proj": (sizes.width, sizes.mlp),
        }
        for name, shape in projections.items():
            weights[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
            if sizes.biases:
                weights[f"model.layers.{layer}.{name}.bias"] = draw(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = scale(sizes.width)
    weights["model.norm.weight"] = scale(sizes.width)
    if not sizes.tied:
        weights["lm_head.weight"] = draw(sizes.vocabulary, sizes.width)
    return weights


def rotate(x: np.ndarray, theta: float, *, interleaved: bool) -> np.ndarray:
    """RoPE on [tokens, heads, head_dim], by row: (a, b) -> (a cos - b sin, a sin + b cos)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (
        first * np.cos(angle) - second * np.sin(angle),
        first * np.sin(angle) + second * np.cos(angle),
    )
    if interleaved:
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def logits(
    weights: dict[str, np.ndarray], sizes: Sizes, tokens: np.ndarray, *, interleaved: bool
) -> np.ndarray:
    """Logits [tokens, vocabulary] of the whole model for one sequence."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    hidden = w["model.embed_tokens.weight"][tokens]
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        normed = _norm(hidden, w[prefix + "input_layernorm.weight"], sizes.epsilon)
        hidden = hidden + _attention(w, prefix + "self_attn.", normed, sizes, interleaved)
        normed = _norm(hidden, w[prefix + "post_attention_layernorm.weight"], sizes.epsilon)
        gate = _linear(w, prefix + "mlp.gate_proj", normed)
        inner = gate / (1 + np.exp(-gate)) * _linear(w, prefix + "mlp.up_proj", normed)
        hidden = hidden + _linear(w, prefix + "mlp.down_proj", inner)
    hidden = _norm(hidden, w["model.norm.weight"], sizes.epsilon)
    return hidden @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)


def _attention(
    w: dict[str, np.ndarray], prefix: str, x: np.ndarray, sizes: Sizes, interleaved: bool
) -> np.ndarray:
    count = len(x)
    query, key, value = (
        _linear(w, prefix + name, x).reshape(count, -1, sizes.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    query = rotate(query, sizes.theta, interleaved=interleaved)
    key = rotate(key, sizes.theta, interleaved=interleaved)
    out = np.zeros_like(query)
    for head in range(sizes.heads):
        shared = head // (sizes.heads // sizes.kv_heads)
        scores = query[:, head] @ key[:, shared].T / np.sqrt(sizes.head_dim)
        scores[np.triu_indices(count, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, head] = weights @ value[:, shared]
    return _linear(w, prefix + "o_proj", out.reshape(count, -1))
