"""The parts of a decoder layer as flax.nnx modules; `decoder` stacks and runs them.

Each nnx.Param carries its logical axis names as metadata (`axis_names`), which
`decoder.logical_axes` collects for `parallel` to turn into shardings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.kernels import attention, attention_decode
from jaxdistill.models.config import DecoderConfig
from jaxdistill.models.rope import rotate


class Cache(NamedTuple):
    """Keys and values of every layer, each [L, B, G, S, K]; slot p holds position p of its row.

    A head's slots lie together, as the attention kernel reads them, so it is given no copy.
    """

    key: jax.Array
    value: jax.Array


class Context(NamedTuple):
    """What every layer is told about the tokens it sees."""

    cos: jax.Array  # [B, T, 1, K/2]
    sin: jax.Array
    slots: jax.Array  # int [B, T], where in the keys each token stands
    segment_ids: jax.Array | None  # int [B, T]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis; float32 inside, type of x kept."""
    exact = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
    normed = exact * jax.lax.rsqrt(mean_square + epsilon)
    return (normed * _broadcast(scale, normed)).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """c tanh(x / c): x unchanged near 0, never beyond +-c; the identity for None.

    >>> float(soft_cap(jnp.array(1000.0), 30.0))
    30.0
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale, which starts at one."""

    def __init__(self, config: DecoderConfig, axis: Mapping[str, int]):
        (size,) = axis.values()
        self.scale = nnx.Param(jnp.ones(size, config.param_dtype), axis_names=tuple(axis))
        self.epsilon = config.norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)


class Projection(nnx.Module):
    """x @ kernel (+ bias), contracting the `inputs` axes into the `outputs` axes.

    Kernels start truncated-normal with variance gain^2 / (number of inputs), biases at zero.
    """

    def __init__(
        self,
        config: DecoderConfig,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        gain: float = 1.0,
    ):
        shape = (*inputs.values(), *outputs.values())
        deviation = gain / math.sqrt(math.prod(inputs.values()))
        self.kernel = nnx.Param(
            _normal(rngs, shape, deviation, config), axis_names=(*inputs, *outputs)
        )
        zeros = jnp.zeros(tuple(outputs.values()), config.param_dtype)
        self.bias = nnx.Param(zeros, axis_names=tuple(outputs)) if bias else None
        self.contracted = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.contracted)
        return y if self.bias is None else y + _broadcast(self.bias[...], y)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions and, when decoding, a cache."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width = {"width": config.width}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        bias = config.attention_bias
        self.query = Projection(config, width, heads, bias=bias, rngs=rngs)
        self.key = Projection(config, width, kv_heads, bias=bias, rngs=rngs)
        self.value = Projection(config, width, kv_heads, bias=bias, rngs=rngs)
        self.output = Projection(
            config,
            heads,
            width,
            bias=config.attention_output_bias,
            rngs=rngs,
            gain=_residual_gain(config),
        )
        if config.query_key_norm:
            self.query_norm = RMSNorm(config, {"head_dim": config.head_dim})
            self.key_norm = RMSNorm(config, {"head_dim": config.head_dim})
        self.config = config

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, context.cos, context.sin)
        key = rotate(key, context.cos, context.sin)
        options = {
            "window": self.config.sliding_window,
            "soft_cap": self.config.attention_soft_cap,
        }
        if cache is None:
            # A token's slot is its index, which the kernel need not be told.
            mixed = attention(query, key, value, segment_ids=context.segment_ids, **options)
            return self.output(mixed), None
        cache = _write(cache, layer, context.slots, key, value)
        key, value = (x[layer].swapaxes(1, 2) for x in cache)  # back to [B, S, G, K]
        if query.shape[1] == 1:
            lengths = context.slots[:, 0] + 1
            mixed = attention_decode(query[:, 0], key, value, lengths, **options)[:, None]
        else:
            mixed = attention(query, key, value, positions=context.slots, **options)
        return self.output(mixed), cache


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: arXiv 2002.05202."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width, inner, bias = {"width": config.width}, {"mlp": config.mlp_width}, config.mlp_bias
        self.gate = Projection(config, width, inner, bias=bias, rngs=rngs)
        self.up = Projection(config, width, inner, bias=bias, rngs=rngs)
        self.down = Projection(
            config, inner, width, bias=bias, rngs=rngs, gain=_residual_gain(config)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """One pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width = {"width": config.width}
        self.attention_norm = RMSNorm(config, width)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config, width)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        mixed, cache = self.attention(self.attention_norm(x), context, cache, layer)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Ends(nnx.Module):
    """What stands before and after the layers: embedding, final norm, untied head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.embed = Table(config, "embedding", rngs=rngs)
        self.final_norm = RMSNorm(config, {"width": config.width})
        if not config.tie_embeddings:
            self.head = Table(config, "kernel", rngs=rngs)


class Table(nnx.Module):
    """One row of the residual stream's width for each token of the padded vocabulary."""

    def __init__(self, config: DecoderConfig, name: str, *, rngs: nnx.Rngs):
        # Small rows keep the first logits near zero: the loss starts at ln(vocab_size).
        rows = _normal(rngs, (config.embedding_rows, config.width), 0.02, config)
        setattr(self, name, nnx.Param(rows, axis_names=("vocab", "width")))


def _normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float, config: DecoderConfig
) -> jax.Array:
    """Normal values cut at two deviations, drawn in float32 and then rounded."""
    values = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    # 0.8796 is the deviation that the cut leaves of a unit normal.
    return (values * (deviation / 0.8796)).astype(config.param_dtype)


def _residual_gain(config: DecoderConfig) -> float:
    """Two additions a layer: this keeps the stream's variance at start free of the depth."""
    return (2 * config.num_layers) ** -0.5


def _broadcast(row: jax.Array, like: jax.Array) -> jax.Array:
    """Spell out the type and the leading axes, which strict promotion does not add by itself."""
    return jnp.broadcast_to(row.astype(like.dtype), like.shape)


def _write(
    cache: Cache, layer: jax.Array, slots: jax.Array, key: jax.Array, value: jax.Array
) -> Cache:
    """Put [B, T, G, K] keys and values into the layer's slots; slots past the end are dropped.

    One index a head too: of whole [G, K] windows XLA would lay the cache out anew to write them.
    """
    rows = jnp.arange(slots.shape[0])[:, None, None]
    groups = jnp.arange(key.shape[2])[None, :, None]

    def written(cache: jax.Array, new: jax.Array) -> jax.Array:
        place = cache.at[layer, rows, groups, slots[:, None, :]]
        return place.set(new.swapaxes(1, 2).astype(cache.dtype), mode="drop")

    return Cache(written(cache.key, key), written(cache.value, value))
