"""A decoder as pure functions of nested-dict parameters; the layers are stacked and scanned.

L layers, width D, H heads, G key-value heads, head size K, MLP width F, V vocabulary rows:

    {"embed": {"embedding": [V, D]},
     "layers": {"attention_norm": {"scale": [L, D]},
                "attention": {"query": {"kernel": [L, D, H, K]}, "key": {"kernel": [L, D, G, K]},
                              "value": {"kernel": [L, D, G, K]},
                              "output": {"kernel": [L, H, K, D]},
                              "query_norm": {"scale": [L, K]}, "key_norm": {"scale": [L, K]}},
                "mlp_norm": {"scale": [L, D]},
                "mlp": {"gate": {"kernel": [L, D, F]}, "up": {"kernel": [L, D, F]},
                        "down": {"kernel": [L, F, D]}}},
     "final_norm": {"scale": [D]},
     "head": {"kernel": [V, D]}}

query_norm and key_norm are there with `query_key_norm`, head unless the embeddings are tied, and
a "bias" beside each "kernel" that the config gives one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.models.config import DecoderConfig
from jaxdistill.models.layers import Cache, Context, DecoderLayer, Ends, rms_norm, soft_cap
from jaxdistill.models.rope import rotation

Params = dict[str, Any]

REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class DecoderOutput(NamedTuple):
    """What `apply` returns.

    hidden: [B, T, D] after the final norm.
    cache: the written cache, or None if none was given.
    taps: None, or [L+1, B, T, D]: taps[l] is the input of layer l, taps[L] the output of the last
        layer before the final norm.
    """

    hidden: jax.Array
    cache: Cache | None
    taps: jax.Array | None


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters of type `config.param_dtype`; layer l depends on (key, l) alone.

    >>> params = init(DecoderConfig(vocab_size=8, width=4, num_layers=3, num_heads=2,
    ...     num_kv_heads=1, head_dim=2, mlp_width=8, max_length=16), jax.random.key(0))
    >>> params["layers"]["attention"]["query"]["kernel"].shape
    (3, 4, 2, 2)
    """
    ends_key, layers_key = jax.random.split(key)

    def layer(number: jax.Array) -> Params:
        rngs = nnx.Rngs(params=jax.random.fold_in(layers_key, number))
        return _values(DecoderLayer(config, rngs=rngs))

    ends = _values(Ends(config, rngs=nnx.Rngs(params=ends_key)))
    return {**ends, "layers": jax.vmap(layer)(jnp.arange(config.num_layers))}


def abstract_params(config: DecoderConfig) -> Params:
    """The tree that `init` makes, with jax.ShapeDtypeStruct leaves and no computation."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def logical_axes(config: DecoderConfig) -> Params:
    """The tree of `init` with a tuple of axis names at each leaf, as many as the leaf has axes.

    Names: "layers", "vocab", "width", "heads", "kv_heads", "head_dim", "mlp".
    """

    def names(module: type, prefix: tuple[str, ...]) -> Params:
        _, state = _abstract(module, config)
        return nnx.to_pure_dict(state, lambda leaf: (*prefix, *leaf.get_metadata("axis_names")))

    return {**names(Ends, ()), "layers": names(DecoderLayer, ("layers",))}


def check_params(params: Params, config: DecoderConfig) -> None:
    """Raise a ValueError that names the parameters whose shapes are not those of the config."""
    given = _shapes(params)
    expected = _expected_shapes(config)
    wrong = [
        f"{path} is {given.get(path, 'missing')} and should be {expected.get(path, 'absent')}"
        for path in sorted(given.keys() | expected.keys())
        if given.get(path) != expected.get(path)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"parameters do not fit the config: {'; '.join(wrong[:3])}{more}")


def init_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots for `batch` rows, in the activations' type.

    Raises:
        ValueError: length exceeds config.max_length.
    """
    _check_length(length, config)
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def apply(
    params: Params,
    tokens: jax.Array,
    config: DecoderConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    taps: bool = False,
) -> DecoderOutput:
    """Run the decoder over tokens; `logits` or a loss on hidden states takes it from there.

    Without a cache a token attends causally, in array order, within its segment. With a cache a
    token at position p is written to slot p of its row and attends to slots <= p, so ragged
    prompts padded on the right need nothing else; the caller keeps positions below the length.

    Args:
        params: the tree described at the top of this file.
        tokens: int [B, T]. An id past the embedding turns its row into NaN, never into
            another token.
        positions: int [B, T] for the rotary embedding; default: counted from 0 in each segment,
            or from 0 if there are none, with a cache too.
        segment_ids: int [B, T], 0 for padding; not together with a cache.
        cache: from `init_cache` or an earlier call.
        taps: also return what enters and leaves every layer.

    Raises:
        ValueError: wrong rank, type or shape of an argument, parameters that are not the config's,
            or more tokens than config.max_length.
    """
    check_params(params, config)
    _check_call(params, tokens, config, positions, segment_ids, cache)
    positions = _positions(tokens, segment_ids) if positions is None else positions
    context = _context(tokens, config, positions, segment_ids, cache)
    embedding = params["embed"]["embedding"]
    hidden = jnp.take(embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
    hidden, cache, inputs = _run_layers(
        params["layers"], hidden.astype(config.dtype), config, context, cache, taps
    )
    if inputs is not None:
        inputs = jnp.concatenate([inputs, hidden[None]])
    normed = rms_norm(hidden, params["final_norm"]["scale"], config.norm_epsilon)
    return DecoderOutput(normed, cache, inputs)


def head(params: Params, config: DecoderConfig) -> jax.Array:
    """The output matrix [V, D], padded rows included: the embedding if the config ties them."""
    return params["embed"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]


def logits(params: Params, hidden: jax.Array, config: DecoderConfig) -> jax.Array:
    """Logits float32 [..., vocab_size] of hidden [..., D]: soft cap applied, padding sliced off.

    The product is taken in the type of hidden with float32 accumulation.
    """
    matrix = head(params, config)[: config.vocab_size].astype(hidden.dtype)
    raw = jnp.einsum("...d,vd->...v", hidden, matrix, preferred_element_type=jnp.float32)
    return soft_cap(raw, config.logit_soft_cap)


def _run_layers(
    layers: Params,
    hidden: jax.Array,
    config: DecoderConfig,
    context: Context,
    cache: Cache | None,
    taps: bool,
) -> tuple[jax.Array, Cache | None, jax.Array | None]:
    """All layers in order: (hidden, cache, inputs of the layers [L, B, T, D] or None)."""
    graph, _ = _abstract(DecoderLayer, config)

    def run_layer(carry, layer_params_and_number):
        hidden, cache = carry
        layer_params, number = layer_params_and_number
        output = nnx.merge(graph, layer_params)(hidden, context, cache, number)
        return output, hidden if taps else None

    if config.remat != "none":
        # Under scan, the loop itself already keeps XLA from undoing the recomputation.
        run_layer = jax.checkpoint(
            run_layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers
        )
    loop = jax.lax.scan if config.scan_layers else _unrolled
    numbers = jnp.arange(config.num_layers)
    (hidden, cache), inputs = loop(run_layer, (hidden, cache), (layers, numbers))
    return hidden, cache, inputs


def _unrolled(body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """jax.lax.scan as a Python loop: bigger program, freer compiler."""
    ys = []
    for number in range(len(jax.tree.leaves(xs)[0])):
        carry, y = body(carry, jax.tree.map(lambda leaf, number=number: leaf[number], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def _context(
    tokens: jax.Array,
    config: DecoderConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    cache: Cache | None,
) -> Context:
    length = tokens.shape[1] if cache is None else cache.key.shape[3]
    cos, sin = rotation(
        positions, config.head_dim, config.rope_theta, config.rope_scaling, length=length
    )
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return Context(cos, sin, order if cache is None else positions, segment_ids)


def _positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """0, 1, 2, ... along the row, starting again wherever the segment changes."""
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    if segment_ids is None:
        return order
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.where(jnp.pad(changes, ((0, 0), (1, 0))), order, 0)
    return order - jax.lax.cummax(starts, axis=1)


@functools.cache
def _abstract(module: type, config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's structure and its parameters as shapes, made without any computation."""
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(params=0))))


def _shapes(params: Params) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): list(jnp.shape(leaf))
        for path, leaf in leaves
    }


@functools.cache
def _expected_shapes(config: DecoderConfig) -> dict[str, list[int]]:
    return _shapes(abstract_params(config))


def _values(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _check_length(length: int, config: DecoderConfig) -> None:
    if length > config.max_length:
        raise ValueError(
            f"sequence of {length} tokens is longer than the model's context of {config.max_length}"
        )


def _check_call(
    params: Params,
    tokens: jax.Array,
    config: DecoderConfig,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
) -> None:
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be whole numbers of shape [batch, length], not {tokens.dtype} "
            f"of shape {list(jnp.shape(tokens))}"
        )
    _check_length(tokens.shape[1], config)
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and (
            array.shape != tokens.shape or not jnp.issubdtype(array.dtype, jnp.integer)
        ):
            raise ValueError(
                f"{name} must be whole numbers of the shape of tokens {list(tokens.shape)}, "
                f"not {array.dtype} of shape {list(array.shape)}"
            )
    if cache is None:
        return
    if segment_ids is not None:
        raise ValueError("segment_ids do not go with a cache: give each sequence its own row")
    _, rows, _, slots, _ = cache.key.shape
    if rows != tokens.shape[0] or slots < tokens.shape[1]:
        raise ValueError(
            f"a cache of {rows} rows and {slots} slots does not hold tokens of shape "
            f"{list(tokens.shape)}: make one with init_cache(config, batch, length)"
        )
