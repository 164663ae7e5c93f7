"""Programs of the kernels at the shapes of models, for `benchmarks.kernels`: lowered, not run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import SingleDeviceSharding
from jaxdistill.kernels import (
    attention,
    linear_cross_entropy,
    linear_divergence,
    linear_divergence_top_k,
)
from jaxdistill.kernels.attention import pallas_tpu
from jaxdistill.kernels.attention.problem import Options, Places

TOP_K = 64
SHARES = {"jensen_shannon": 0.5}


class Head(NamedTuple):
    tokens: int
    vocab: int
    width: int
    teacher_width: int


class Heads(NamedTuple):
    """Rows, query heads, key heads, width of a head, length, and arguments of `attention`."""

    rows: int
    query: int
    key: int
    width: int
    length: int
    options: dict[str, Any]


HEADS = {
    "SmolLM2-135M of itself": Head(4096, 49_152, 576, 576),
    "Qwen3-1.7B of 8B": Head(8192, 151_936, 2048, 4096),
    "Llama-3-8B of 70B": Head(8192, 128_256, 4096, 8192),
}
ATTENTION = {
    "SmolLM2-135M": Heads(2, 9, 3, 64, 2048, {}),
    "Llama-3-8B": Heads(2, 32, 8, 128, 8192, {}),
    "Gemma-2-2B": Heads(2, 8, 4, 256, 8192, {"window": 4096, "soft_cap": 50.0}),
}


def _arrays(devices: list[jax.Device] | None, *shapes: tuple) -> list[jax.ShapeDtypeStruct]:
    """Of (shape, type) each, on the first device."""
    place = SingleDeviceSharding(devices[0]) if devices else None
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]


# ---- Value and gradients, as a training step takes them -----------------------------------------


def head_loss(
    operation: str, implementation: str, chunks: tuple[int | None, int | None]
) -> Callable[..., jax.Array]:
    """(hidden, head, ...) -> the mean over tokens."""
    options: dict[str, Any] = {
        "implementation": implementation,
        "chunk_tokens": chunks[0],
        "chunk_vocab": chunks[1],
    }

    def loss(hidden: jax.Array, head: jax.Array, *rest: jax.Array) -> jax.Array:
        if operation == "cross_entropy":
            return -linear_cross_entropy(hidden, head, *rest, **options).log_prob.mean()
        if operation == "top_k":
            return linear_divergence_top_k(hidden, head, *rest, **options).mean()
        kind = {"kind": operation, "share": SHARES.get(operation)}
        return linear_divergence(hidden, head, *rest, **kind, **options).mean()

    return loss


def lower_head(
    devices: list[jax.Device] | None,
    operation: str,
    head: list[int],
    implementation: str,
    dtype: str = "bfloat16",
    chunks: tuple[int | None, int | None] = (None, None),
) -> jax.stages.Lowered:
    """Value and gradients of the student; `chunks` are tokens and columns of every block."""
    tokens, vocab, width, teacher_width = head
    rest: dict[str, tuple] = {
        "cross_entropy": (((tokens,), "int32"),),
        "top_k": (((tokens, TOP_K), "int32"), ((tokens, TOP_K), "float32")),
    }
    teacher = ((tokens, teacher_width), dtype), ((vocab, teacher_width), dtype)
    arrays = _arrays(
        devices,
        ((tokens, width), dtype),
        ((vocab, width), dtype),
        *rest.get(operation, teacher),
    )
    loss = head_loss(operation, implementation, chunks)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays)


def lower_attention(
    devices: list[jax.Device] | None, heads: list, implementation: str, dtype: str = "bfloat16"
) -> jax.stages.Lowered:
    """Value and gradients; "splash" and "flash" are jax's own TPU kernels at their defaults."""
    rows, query, key, width, length, options = heads

    def total(*operands: jax.Array) -> jax.Array:
        if implementation == "splash":
            output = _splash(heads, *operands)
        elif implementation == "flash":
            output = _flash(heads, *operands)
        else:
            output = attention(*operands, implementation=implementation, **options)
        return jnp.sum(jnp.square(output.astype(jnp.float32)))

    shapes = (rows, length, query, width), *[(rows, length, key, width)] * 2
    arrays = _arrays(devices, *((shape, dtype) for shape in shapes))
    return jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(*arrays)


def _splash(heads: list, *operands: jax.Array) -> jax.Array:
    _, query, _, width, length, options = heads
    mask = splash_attention_mask.CausalMask((length, length))
    if "window" in options:
        window = (options["window"] - 1, 0)
        mask = splash_attention_mask.LocalMask((length, length), window, 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * query),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=options.get("soft_cap"),
    )
    by_head = (x.swapaxes(1, 2) for x in operands)
    scaled, keys, values = by_head
    return jax.vmap(kernel)(scaled * width**-0.5, keys, values).swapaxes(1, 2)


def _flash(heads: list, *operands: jax.Array) -> jax.Array:
    _, query, key, width, _, options = heads
    if options:
        raise ValueError("jax's flash attention has no window and no soft cap")
    queries, *others = (x.swapaxes(1, 2) for x in operands)
    repeated = (jnp.repeat(x, query // key, axis=1) for x in others)
    output = flash_attention.flash_attention(queries, *repeated, causal=True, sm_scale=width**-0.5)
    return output.swapaxes(1, 2)


# ---- Kernels alone, for the estimate of cycles --------------------------------------------------


def lower_product(devices: list[jax.Device], size: int) -> jax.stages.Lowered:
    square = _arrays(devices, *[((size, size), jnp.bfloat16)] * 2)
    return jax.jit(lambda a, b: a @ b).lower(*square)


def lower_tile(
    devices: list[jax.Device], kernel: str, width: int, rows: int, keys: int, heads: int, ours: bool
) -> jax.stages.Lowered:
    """A causal attention kernel of which each head is one tile [rows, keys].

    There both are counted whole: of more tiles a head, the estimate leaves out what depends on the
    blocks' bounds.
    """
    query, key = (((heads, length, width), jnp.bfloat16) for length in (rows, keys))
    per_row = (heads, rows), jnp.float32
    shapes = [query, key, key] + ([] if kernel == "forward" else [query, per_row, per_row])
    function = (_our_tile if ours else _splash_tile)(kernel, width, rows, keys, heads)
    return jax.jit(function).lower(*_arrays(devices, *shapes))


def _our_tile(kernel: str, width: int, rows: int, keys: int, _: int) -> Callable:
    options = Options(True, None, None, width**-0.5, rows, keys, False)
    places = Places(None, None, None, None)

    def run(*arrays: jax.Array) -> Any:
        query, key, value = arrays[0][None, :, None], arrays[1][None], arrays[2][None]
        if kernel == "forward":
            return pallas_tpu.forward(options, query, key, value, places)
        to_output, log_sum_exp, delta = (x[None, :, None] for x in arrays[3:])
        operands = query, key, value, places
        gradients = pallas_tpu.backward(options, operands, log_sum_exp, delta, to_output)
        return gradients[0] if kernel == "query gradient" else gradients[1:]

    return run


def _splash_tile(kernel: str, _: int, rows: int, keys: int, heads: int) -> Callable:
    """Its backward kernels have no public name."""
    sizes = splash_attention_kernel.BlockSizes(
        **{f"block_{name}": rows for name in ("q", "q_dkv", "q_dq")},
        **{f"block_{name}": keys for name in ("kv", "kv_dkv", "kv_dq")},
        **{f"block_{name}": keys for name in ("kv_compute", "kv_dkv_compute")},
    )
    mask = splash_attention_mask.CausalMask((rows, keys))
    splash = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
    )
    if kernel == "forward":
        return splash
    options = {
        "bkv": keys,
        "is_mqa": False,
        "mask_value": splash_attention_kernel.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        "mask_function": splash.kwargs["mask_function"],
        "q_layout": sizes.q_layout,
        "k_layout": sizes.k_layout,
        "v_layout": sizes.v_layout,
        "interpret": False,
    }
    if kernel == "query gradient":
        function = splash_attention_kernel._splash_attention_bwd_dq
        options |= {"mask_info": splash.dq_mask_info, "bq": rows}
    else:
        function = splash_attention_kernel._splash_attention_bwd_dkv
        options |= {"mask_info": splash.dkv_mask_info, "bq": rows, "bkv_compute": keys}
        options |= {"use_fused_bwd_kernel": False}

    def run(*arrays: jax.Array) -> Any:
        query, key, value, to_output, log_sum_exp, delta = arrays
        given = query, key, value, None, None, log_sum_exp, to_output, delta
        found = functools.partial(function, **options)(*given)
        return found if kernel == "query gradient" else found[1:]

    return run
