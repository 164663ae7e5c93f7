"""What the kernels of the fused heads do with a tile: build the logits, and the gradients' sums."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import blocks, head_grid
from jaxdistill.kernels.blocks import HEAD_GRADIENT, HIDDEN_GRADIENT, Sweep, Tile
from jaxdistill.kernels.head_grid import Layout, Operands, Place
from jaxdistill.kernels.tiles import dot, lane_max, lane_sum


def statistics(
    kernel: Callable[..., None],
    sweep: Sweep,
    layout: Layout,
    operands: Operands,
    per_token: Sequence[jax.Array],
    *,
    running: Sequence[int],
    output: int,
) -> jax.Array:
    """Columns [N, output] of `kernel(place, operands, per_token, output, raw, running)`.

    `raw` are the raw logits of each model, `running` sums [tokens, *] of these widths; both stay in
    VMEM.
    """

    def body(place: Place, operands: Operands, per_token: Any, output: Any, scratch: Any) -> None:
        raw, sums = scratch[: len(operands.models)], scratch[len(operands.models) :]
        kernel(place, operands, per_token, output, raw, sums)

    def scratch(tile: Tile) -> list[Any]:
        sums = [pltpu.VMEM((tile.tokens, width), jnp.float32) for width in running]
        return [*_raw(tile, operands), *sums]

    return head_grid.call(body, sweep, layout, operands, per_token, output=output, scratch=scratch)


def gradients(
    logits_gradient: Callable[..., jax.Array],
    layout: Layout,
    operands: Operands,
    per_token: Sequence[jax.Array],
) -> Operands:
    """The gradients of the first model, each by a kernel of its own.

    `logits_gradient(place, operands, per_token, raw)` is that of its raw logits [tokens, vocab],
    float32, and 0 in columns that do not count.
    """
    hidden, head = operands.models[0]
    product_type = hidden.dtype if hidden.dtype == head.dtype else jnp.dtype(jnp.float32)
    width = hidden.shape[1]

    def of(sweep: Sweep, like: jax.Array) -> jax.Array:
        def scratch(tile: Tile) -> list[Any]:
            block = tile.tokens, width // tile.parts
            if sweep is HEAD_GRADIENT:
                block = layout.head_block(tile, width // tile.parts)
            of_logits = pltpu.VMEM((tile.tokens, tile.vocab), product_type)
            total = pltpu.VMEM((tile.parts, *block), jnp.float32)
            return [*_raw(tile, operands), of_logits, total]

        kernel = functools.partial(_gradient, logits_gradient)
        return head_grid.call(
            kernel, sweep, layout, operands, per_token, output=like.dtype, scratch=scratch
        )

    nothing = operands.without_gradient()
    first = head_grid.Model(of(HIDDEN_GRADIENT, hidden), of(HEAD_GRADIENT, head))
    return nothing._replace(models=(first, *nothing.models[1:]))


def _raw(tile: Tile, operands: Operands) -> list[Any]:
    return [pltpu.VMEM((tile.tokens, tile.vocab), jnp.float32)] * len(operands.models)


def add_logits(place: Place, operands: Operands, raw: Sequence[Any]) -> None:
    """Add this part of the width to every model's raw logits; columns past the end may be NaN."""

    def part(model: head_grid.Model, axis: int) -> jax.Array:
        block = model.head[...].astype(model.hidden.dtype)
        return dot(model.hidden[...], block, (1, 1 - axis))

    every = list(zip(raw, operands.models, place.layout.vocab_axes, strict=True))

    @pl.when(place.step == 0)
    def _() -> None:
        for logits, model, axis in every:
            logits[...] = part(model, axis)

    if place.tile.parts > 1:

        @pl.when((place.step > 0) & (place.step < place.tile.parts))
        def _() -> None:
            for logits, model, axis in every:
                logits[...] += part(model, axis)


class Absorbed(NamedTuple):
    centred: jax.Array  # logits - m of their lane
    shift: jax.Array  # m before - m


def absorb(maximum: Any, total: Any, logits: jax.Array) -> Absorbed:
    """Take a tile into the running maximum m and the total sum exp(x - m) of each lane."""
    before = maximum[...]
    new = jnp.maximum(before, lane_max(logits))
    centred, shift = logits - _spread(new, logits.shape[1]), before - new
    maximum[...] = new
    total[...] = total[...] * jnp.exp(shift) + lane_sum(jnp.exp(centred))
    return Absorbed(centred, shift)


def _spread(lanes: jax.Array, columns: int) -> jax.Array:
    """[tokens, LANES] -> [tokens, columns]: what each column's lane holds."""
    return jnp.concatenate([lanes] * (columns // blocks.LANES), axis=1)


def _gradient(
    logits_gradient: Callable[..., jax.Array],
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    output: Any,
    scratch: Sequence[Any],
) -> None:
    """The gradient of the hidden states or of the head, summed in float32, rounded once."""
    *raw, of_logits, total = scratch

    @pl.when(place.first())
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    add_logits(place, operands, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        gradient = logits_gradient(place, operands, per_token, raw)
        of_logits[...] = gradient.astype(of_logits.dtype)

    @pl.when((place.step >= place.tile.parts) | (place.tile.parts == 1))
    def _() -> None:
        part = place.step % place.tile.parts
        if place.sweep is HIDDEN_GRADIENT:
            _add_to_hidden(place, operands, of_logits[...], total, part)
        else:
            _add_to_head(place, operands, of_logits[...], total, part)

        @pl.when(place.inner == place.last_inner)
        def _() -> None:
            output[...] = total[part].astype(output.dtype)


def _add_to_hidden(
    place: Place, operands: Operands, of_logits: jax.Array, total: Any, part: Any
) -> None:
    """total += G @ head. Columns that do not count may hold NaN, so the head loses them too."""
    axis, vocab = place.layout.vocab_axes[0], place.tile.vocab
    head = operands.models[0].head
    counting = place.limit(operands) - place.vocab_block * vocab

    def add(masked: bool) -> None:
        for here in _slices(total.shape[2]):
            columns = head[:, here] if axis == 0 else head[here, :]
            columns = columns.astype(of_logits.dtype)
            if masked:
                index = lax.broadcasted_iota(jnp.int32, columns.shape, axis)
                columns = jnp.where(index < counting, columns, jnp.zeros_like(columns))
            total[part, :, here] += dot(of_logits, columns, (1, axis))

    if place.layout.all_count and place.layout.vocab_size % vocab == 0:
        return add(False)
    pl.when(counting >= vocab)(functools.partial(add, False))
    pl.when((counting > 0) & (counting < vocab))(functools.partial(add, True))


def _add_to_head(
    place: Place, operands: Operands, of_logits: jax.Array, total: Any, part: Any
) -> None:
    """total += G.T @ hidden, which is zeros in columns that do not count."""
    hidden = operands.models[0].hidden
    for here in _slices(hidden.shape[1]):
        if place.layout.vocab_axes[0] == 0:
            total[part, :, here] += dot(of_logits, hidden[:, here], (0, 0))
        else:
            total[part, here, :] += dot(hidden[:, here], of_logits, (0, 0))


def _slices(width: int) -> Iterator[slice]:
    """The width in parts of WIDTH_PART and what is left."""
    step = blocks.WIDTH_PART
    return (slice(x, min(x + step, width)) for x in range(0, width, step))
