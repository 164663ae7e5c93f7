"""The grid all kernels of the fused heads run on: (outer, inner, part of the width).

Of the two outer axes one goes over blocks of tokens, the other over blocks of the vocabulary; what
a kernel sums over is the inner one. The innermost axis goes over parts of the width, see `blocks`:
it builds the logits, and a backward kernel then goes over the same parts once more, for the product
with the logits' gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import blocks, on_tpu, tiles
from jaxdistill.kernels.blocks import HEAD_GRADIENT, Sweep, Tile


class Model(NamedTuple):
    """Hidden states [N, D] and a head [V, D] or [D, V]; in a kernel the blocks of them in VMEM."""

    hidden: Any
    head: Any


class Operands(NamedTuple):
    """One model or two, of which the first gets gradients, and scalars [1, 1].

    Of the columns those from `limit` on do not count: how many do may differ among devices.
    """

    models: tuple[Model, ...]
    limit: Any
    scalars: tuple[Any, ...]

    def without_gradient(self) -> "Operands":
        """None for each array, as a backward pass returns it."""
        nothing = Model(None, None)
        return Operands((nothing,) * len(self.models), None, (None,) * len(self.scalars))


class Layout(NamedTuple):
    operation: str
    vocab_size: int  # columns that may count
    vocab_axes: tuple[int, ...]  # of each model's head
    chunks: tuple[int | None, int | None]  # tokens and columns of a block where they were given
    labels: int  # of a token
    all_count: bool  # whether `limit` is `vocab_size`
    interpret: Any

    def head_block(self, tile: Tile, width: int, model: int = 0) -> tuple[int, int]:
        """[vocabulary, width] the way round the head lies."""
        return (tile.vocab, width) if self.vocab_axes[model] == 0 else (width, tile.vocab)


class Place(NamedTuple):
    """A point of the grid."""

    sweep: Sweep
    layout: Layout
    tile: Tile
    vocab_block: Any
    inner: Any
    step: Any  # of the innermost axis
    last_inner: int
    last_step: int

    def first(self) -> Any:
        """Whether nothing was summed yet."""
        return (self.inner == 0) & (self.step == 0)

    def logits_complete(self) -> Any:
        """Whether the last part of the logits is in."""
        return self.step == self.tile.parts - 1

    def last(self) -> Any:
        """Whether this point completes the sum."""
        return (self.inner == self.last_inner) & (self.step == self.last_step)

    def limit(self, operands: Operands) -> Any:
        """How many columns count: a number where the program knows it, else read from memory."""
        return self.layout.vocab_size if self.layout.all_count else operands.limit[0, 0]

    def columns(self, shape: tuple[int, ...], vocab_axis: int = 1) -> jax.Array:
        """The column of the head that each entry of a block belongs to."""
        first = self.vocab_block * self.tile.vocab
        return first + lax.broadcasted_iota(jnp.int32, shape, vocab_axis)


def prepare(
    operation: str,
    models: Sequence[tuple[jax.Array, jax.Array]],
    scalars: Sequence[jax.Array],
    *,
    vocab_size: int,
    vocab_axis: int,
    chunks: tuple[int | None, int | None],
    num_valid: jax.Array | None,
    labels: int = 1,
) -> tuple[Layout, Operands]:
    """Models with hidden states [..., D] as the kernels take them.

    Raises:
      ImplementationError: the kernels cannot serve them.
    """
    blocks.check(operation, models, vocab_size, chunks, labels)
    interpret = on_tpu.INTERPRET.get()
    laid_out, vocab_axes = [], []
    for hidden, head in models:
        axis = vocab_axis
        if head.shape[1] % blocks.LANES and head.shape[0] % blocks.LANES == 0:
            # XLA lays an array out so that padding to registers is least: this is no copy, but for
            # a kernel it would make one, of the head and of its gradient.
            head, axis = head.T, 1 - axis
        laid_out.append(Model(hidden.reshape(-1, hidden.shape[-1]), head))
        vocab_axes.append(axis)
    limit = jnp.asarray(vocab_size if num_valid is None else num_valid, jnp.int32)
    if not interpret:
        limit = on_tpu.require_tpu(limit)
    scalars = tuple(x.reshape(1, 1) for x in scalars)
    all_count = num_valid is None
    axes = tuple(vocab_axes)
    layout = Layout(operation, vocab_size, axes, chunks, labels, all_count, interpret)
    return layout, Operands(tuple(laid_out), limit.reshape(1, 1), scalars)


def call(
    kernel: Callable[..., None],
    sweep: Sweep,
    layout: Layout,
    operands: Operands,
    per_token: Sequence[jax.Array],
    *,
    output: int | jax.typing.DTypeLike,
    scratch: Callable[[Tile], list[Any]],
) -> jax.Array:
    """Run `kernel(place, operands, per_token, output, scratch)` at all points of the grid.

    Per token are arrays [N, K]. The output is so many columns [N, output], or the gradient of the
    first model's operand, of this type.
    """
    sizes = blocks.Sizes.of(operands.models, layout.vocab_size, layout.chunks, layout.labels)
    tile = blocks.choose_tile(layout.operation, sweep, sizes)
    num_tokens = operands.models[0].hidden.shape[0]
    operands, per_token = _in_whole_blocks(tile, operands, per_token)
    grid = _grid(sweep, tile, layout, operands)
    specs = _Specs(sweep, tile, layout, grid[1] - 1)
    shape, dtype, out_spec = specs.output(operands.models[0], output)
    inputs, structure = jax.tree.flatten((operands, per_token))

    def body(*refs: Any) -> None:
        outer, inner, step = (pl.program_id(axis) for axis in range(3))
        vocab_block = inner if sweep.over == "vocabulary" else outer
        place = Place(sweep, layout, tile, vocab_block, inner, step, grid[1] - 1, grid[2] - 1)
        given = jax.tree.unflatten(structure, refs[: len(inputs)])
        kernel(place, *given, refs[len(inputs)], refs[len(inputs) + 1 :])

    result = pl.pallas_call(
        body,
        out_shape=on_tpu.output(shape, dtype, like=inputs[0]),
        grid=grid,
        in_specs=jax.tree.leaves(specs.inputs(operands, per_token)),
        out_specs=out_spec,
        scratch_shapes=scratch(tile),
        compiler_params=on_tpu.compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=layout.interpret,
        name=f"{layout.operation}_{sweep.name}",
    )(*inputs)
    return result if sweep is HEAD_GRADIENT else result[:num_tokens]


def _in_whole_blocks(
    tile: Tile, operands: Operands, per_token: Sequence[jax.Array]
) -> tuple[Operands, list[jax.Array]]:
    """With zeros for the tokens that fill the last block; hidden states in the product's type."""

    def padded(model: Model) -> Model:
        hidden = tiles.in_product_type(model.hidden, model.head)
        return Model(on_tpu.pad_rows(hidden, tile.tokens), model.head)

    operands = operands._replace(models=tuple(map(padded, operands.models)))
    per_token = [on_tpu.pad_rows(x, tile.tokens) for x in per_token]
    leaves, structure = jax.tree.flatten((operands, per_token))
    return jax.tree.unflatten(structure, tiles.vary_alike(*leaves))


def _grid(sweep: Sweep, tile: Tile, layout: Layout, operands: Operands) -> tuple[int, int, int]:
    hidden, head = operands.models[0]
    token_blocks = hidden.shape[0] // tile.tokens
    steps = tile.parts * (1 if sweep.product_with is None or tile.parts == 1 else 2)
    if sweep.over == "vocabulary":
        return token_blocks, pl.cdiv(layout.vocab_size, tile.vocab), steps
    # A gradient has all columns of the head, those that do not count too.
    return pl.cdiv(head.shape[layout.vocab_axes[0]], tile.vocab), token_blocks, steps


class _Specs(NamedTuple):
    """Which block of an array is in VMEM at a point (outer, inner, step) of the grid."""

    sweep: Sweep
    tile: Tile
    layout: Layout
    last_inner: int

    def inputs(self, operands: Operands, per_token: Sequence[jax.Array]) -> tuple:
        scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
        models = tuple(
            Model(self._hidden(at, x.hidden.shape[1]), self._head(at, x.hidden.shape[1]))
            for at, x in enumerate(operands.models)
        )
        rows = [self._rows(x.shape[1]) for x in per_token]
        return Operands(models, scalar, (scalar,) * len(operands.scalars)), rows

    def output(
        self, model: Model, output: int | jax.typing.DTypeLike
    ) -> tuple[tuple[int, int], jax.typing.DTypeLike, pl.BlockSpec]:
        """Its shape, type and block.

        A gradient's block leaves as a part of the width at a time, while the last products are
        taken, so that VMEM holds little of it beside the sum.
        """
        num_tokens, width = model.hidden.shape
        if isinstance(output, int):
            spec = pl.BlockSpec((self.tile.tokens, output), lambda outer, *_: (outer, 0))
            return (num_tokens, output), jnp.float32, spec
        parts = self.tile.parts
        shape, block, by_row = (num_tokens, width), (self.tile.tokens, width // parts), True
        if self.sweep is HEAD_GRADIENT:
            shape, block = model.head.shape, self.layout.head_block(self.tile, width // parts)
            by_row = self.layout.vocab_axes[0] == 0

        def index(outer: Any, inner: Any, step: Any) -> tuple:
            done = jnp.where(inner == self.last_inner, jnp.maximum(step - parts, 0), 0)
            place = outer, 0 if parts == 1 else done
            return place if by_row else place[::-1]

        return shape, output, pl.BlockSpec(block, index)

    def _part(self, step: Any, model: int, operand: str) -> Any:
        """Parts in order; then, for the product, one operand's once more while others stay."""
        if self.tile.parts == 1:
            return 0
        if model == 0 and operand == self.sweep.product_with:
            return step % self.tile.parts
        return jnp.minimum(step, self.tile.parts - 1)

    def _token_block(self, outer: Any, inner: Any) -> Any:
        return outer if self.sweep.over == "vocabulary" else inner

    def _rows(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (self.tile.tokens, width), lambda outer, inner, _: (self._token_block(outer, inner), 0)
        )

    def _hidden(self, model: int, width: int) -> pl.BlockSpec:
        def index(outer: Any, inner: Any, step: Any) -> tuple:
            return self._token_block(outer, inner), self._part(step, model, "hidden")

        return pl.BlockSpec((self.tile.tokens, width // self.tile.parts), index)

    def _head(self, model: int, width: int) -> pl.BlockSpec:
        """Past the columns that count the last block stays: there may be none in the head."""
        last = pl.cdiv(self.layout.vocab_size, self.tile.vocab) - 1

        def index(outer: Any, inner: Any, step: Any) -> tuple:
            block = jnp.minimum(inner if self.sweep.over == "vocabulary" else outer, last)
            place = block, self._part(step, model, "head")
            return place if self.layout.vocab_axes[model] == 0 else place[::-1]

        block = self.layout.head_block(self.tile, width // self.tile.parts, model)
        return pl.BlockSpec(block, index)
