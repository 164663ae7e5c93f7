"""Any loss of logits from hidden states: a tile of tokens at a time, forward and backward.

For what no head kernel computes. A tile holds the whole vocabulary of a few tokens, about 64 MiB in
float32, so the head is read once a tile; the kernels, whose tiles are wide in tokens, read it less
often.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments, tiles
from jaxdistill.kernels.dispatch import ImplementationError


class Model(NamedTuple):
    """Hidden states `[..., D]` and their head; `name` begins the names of both in messages.

    No gradient flows into a frozen one, whose head is then never copied.
    """

    name: str
    hidden: Any
    head: Any
    vocab_size: int | None = None
    soft_cap: float | None = None
    frozen: bool = False


def over_tokens(
    function: Callable[..., Any],
    models: Sequence[Model],
    per_token: Mapping[str, Any] | None = None,
    *,
    head_layout: str = "vd",
) -> Any:
    """function(logits of each model `[C, V]`, *per_token `[C, ...]`) for tiles of C tokens.

    Args:
      function: returns arrays `[C, ...]`, the values of its tokens.
      models: with hidden states of one leading shape `[...]`.
      per_token: arrays `[..., *rest]` that are cut alike, by the names they have in messages.
      head_layout: of all heads, "vd" or "dv".

    Returns:
      The arrays `[..., ...]` of all tokens. Gradients flow into hidden states, heads and what is
      given per token; those of a head are summed in float32.

    Raises:
      ValueError: an array of the wrong shape, type or range.
    """
    models = [_arrays(model) for model in models]
    heads, vocab_sizes = zip(*(_head(model, head_layout) for model in models), strict=True)
    shape = models[0].hidden.shape[:-1]
    arrays = {name: jnp.asarray(x) for name, x in (per_token or {}).items()}
    for name, x in [*((f"{m.name}hidden", m.hidden) for m in models), *arrays.items()]:
        if x.shape[: len(shape)] != shape:
            raise ValueError(
                f"{name} must have leading shape {shape} as {models[0].name}hidden has, "
                f"but its shape is {x.shape}"
            )
    number = math.prod(shape)
    tokens = max(tiles.TILE_BYTES // (4 * max(vocab_sizes)), 1)
    tiling = tiles.plan(number, max(vocab_sizes), min(tokens, max(number, 1)), None)
    tokenwise = (*(model.hidden for model in models), *arrays.values())
    varying = tiles.vary_alike(*tokenwise, *heads)
    heads = varying[len(tokenwise) :]

    @jax.checkpoint
    def take_tile(tile: tuple[jax.Array, ...]) -> Any:
        states, rest = tile[: len(models)], tile[len(models) :]
        logits = [
            _logits(model, hidden, head, head_layout)
            for model, hidden, head in zip(models, states, heads, strict=True)
        ]
        return function(*logits, *rest)

    chunks = tuple(tiles.chunk(x, len(shape), tiling) for x in varying[: len(tokenwise)])
    return jax.tree.map(lambda x: tiles.unchunk(x, shape), lax.map(take_tile, chunks))


def over_labels(
    function: Callable[..., jax.Array],
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    per_token: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """`over_tokens` of one model and labels, which are checked here: no tile sees their values."""
    if implementation != "auto":
        raise ImplementationError(
            f"implementation must be 'auto' for a loss over tiles, but it is {implementation!r}"
        )
    model = _arrays(Model("", hidden, head, vocab_size, soft_cap))
    columns = arguments.check_head("", model.hidden, model.head, head_layout, vocab_size)
    arguments.check_labels("labels", per_token["labels"], model.hidden.shape[:-1], columns)
    return over_tokens(function, (model,), per_token, head_layout=head_layout)


def _arrays(model: Model) -> Model:
    arrays = jnp.asarray(model.hidden), jnp.asarray(model.head)
    hidden, head = lax.stop_gradient(arrays) if model.frozen else arrays
    return model._replace(hidden=hidden, head=head)


def _head(model: Model, head_layout: str) -> tuple[jax.Array, int]:
    """The columns that count and their number; in float32, so that their gradients sum in it."""
    size = (model.hidden, model.head, head_layout, model.vocab_size)
    vocab_size = arguments.check_head(model.name, *size)
    if model.soft_cap is not None:
        arguments.check_positive(f"{model.name}soft_cap", model.soft_cap)
    axis = arguments.VOCABULARY_AXIS[head_layout]
    head = lax.slice_in_dim(model.head, 0, vocab_size, axis=axis)
    return head if model.frozen else head.astype(jnp.float32), vocab_size


def _logits(model: Model, hidden: jax.Array, head: jax.Array, head_layout: str) -> jax.Array:
    """Logits `[C, V]`; products are taken in the type of hidden and head where they have one."""
    block = head.astype(model.head.dtype)
    hidden = tiles.in_product_type(hidden, block)
    block = block.astype(hidden.dtype)
    raw = tiles.project(hidden, block, arguments.VOCABULARY_AXIS[head_layout])
    return tiles.scaled(raw, jnp.float32(1.0), model.soft_cap)[0]
