"""The grid all kernels of this folder run on: (outer, inner, part of the width), and its blocks.

Of the two outer axes one goes over blocks of tokens, the other over blocks of the vocabulary; what
a kernel sums over is the inner one. Where [block, D] of both models does not fit into VMEM, or only
in blocks so small that reading them takes longer than the products, the innermost axis goes over
parts of both widths: it builds the logits, and a backward kernel then goes over the same parts once
more, for the product with the logits' gradient.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxdistill.kernels import on_tpu, tiles
from jaxdistill.kernels.linear_divergence.pallas_tile import (
    HEAD_GRADIENT,
    Sizes,
    Sweep,
    Tile,
    choose_tile,
)


class Models(NamedTuple):
    """Hidden states [N, D], heads, and scalars [1, 1]; in a kernel the blocks of them in VMEM."""

    student_hidden: Any
    student_head: Any
    teacher_hidden: Any
    teacher_head: Any
    temperature: Any
    share: Any

    def in_product_types(self) -> "Models":
        return self._replace(
            student_hidden=tiles.in_product_type(self.student_hidden, self.student_head),
            teacher_hidden=tiles.in_product_type(self.teacher_hidden, self.teacher_head),
        )


class Options(NamedTuple):
    kind: str
    vocab_size: int
    soft_caps: tuple[float | None, float | None]  # student, teacher
    vocab_axis: int
    chunks: tuple[int | None, int | None]  # tokens and columns of a block where they were given
    interpret: Any

    def head_block(self, tile: Tile, width: int) -> tuple[int, int]:
        """[vocabulary, width] the way round the head lies."""
        return (tile.vocab, width) if self.vocab_axis == 0 else (width, tile.vocab)


class Place(NamedTuple):
    """A point of the grid."""

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


def call(
    kernel: Callable[..., None],
    sweep: Sweep,
    options: Options,
    models: Models,
    per_token: Sequence[jax.Array],
    *,
    outputs: int | jax.typing.DTypeLike,
    scratch: Callable[[Tile], list[Any]],
) -> list[jax.Array]:
    """Run `kernel(options, place, models, per_token, outputs, scratch)` at all points of the grid.

    Outputs are so many columns [N, 1], or the gradient of the student's operand, of this type.
    """
    tile = choose_tile(sweep, Sizes.of(models[:4], options.vocab_size, options.chunks))
    num_tokens = models.student_hidden.shape[0]
    models = models._replace(
        student_hidden=on_tpu.pad_rows(models.student_hidden, tile.tokens),
        teacher_hidden=on_tpu.pad_rows(models.teacher_hidden, tile.tokens),
    )
    per_token = [on_tpu.pad_rows(x, tile.tokens) for x in per_token]
    grid = _grid(sweep, tile, options, models)
    specs = _Specs(sweep, tile, options)
    shapes, out_specs = specs.outputs(models, outputs)
    counts = len(models), len(per_token), len(shapes)
    starts = list(itertools.accumulate(counts, initial=0))

    def body(*refs: Any) -> None:
        outer, inner, step = (pl.program_id(axis) for axis in range(3))
        vocab_block = inner if sweep.over == "vocabulary" else outer
        place = Place(tile, vocab_block, inner, step, grid[1] - 1, grid[2] - 1)
        given, tokens, written = (
            refs[start : start + count] for start, count in zip(starts, counts, strict=False)
        )
        kernel(options, place, Models(*given), tokens, written, refs[starts[-1] :])

    results = pl.pallas_call(
        body,
        out_shape=[on_tpu.output(*x, like=models.student_hidden) for x in shapes],
        grid=grid,
        in_specs=[*specs.models(models), *(specs.rows(1) for _ in per_token)],
        out_specs=out_specs,
        scratch_shapes=scratch(tile),
        compiler_params=on_tpu.compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=options.interpret,
        name=f"linear_divergence_{sweep.name}",
    )(*models, *per_token)
    return [x if sweep is HEAD_GRADIENT else x[:num_tokens] for x in results]


def _grid(sweep: Sweep, tile: Tile, options: Options, models: Models) -> tuple[int, int, int]:
    token_blocks = models.student_hidden.shape[0] // tile.tokens
    steps = tile.parts * (1 if sweep.product_with is None or tile.parts == 1 else 2)
    if sweep.over == "vocabulary":
        return token_blocks, pl.cdiv(options.vocab_size, tile.vocab), steps
    # A gradient has all columns of the head, those that do not count too.
    columns = models.student_head.shape[options.vocab_axis]
    return pl.cdiv(columns, tile.vocab), token_blocks, steps


class _Specs(NamedTuple):
    """Which block of an array is in VMEM at a point (outer, inner, step) of the grid."""

    sweep: Sweep
    tile: Tile
    options: Options

    def _part(self, step: Any, name: str) -> Any:
        """Parts in order; then, for the product, one operand's once more while others stay."""
        if self.tile.parts == 1:
            return 0
        if name == self.sweep.product_with:
            return step % self.tile.parts
        return jnp.minimum(step, self.tile.parts - 1)

    def rows(self, width: int, name: str | None = None) -> pl.BlockSpec:
        """Of an array [N, width]: whole rows, or parts of them where it is a named operand."""

        def index(outer: Any, inner: Any, step: Any) -> tuple:
            token_block = outer if self.sweep.over == "vocabulary" else inner
            return token_block, 0 if name is None else self._part(step, name)

        part = width if name is None else width // self.tile.parts
        return pl.BlockSpec((self.tile.tokens, part), index)

    def head(self, width: int, name: str) -> pl.BlockSpec:
        """Past the columns that count the last block stays: there may be none in the head."""
        last = pl.cdiv(self.options.vocab_size, self.tile.vocab) - 1

        def index(outer: Any, inner: Any, step: Any) -> tuple:
            block = jnp.minimum(inner if self.sweep.over == "vocabulary" else outer, last)
            place = block, self._part(step, name)
            return place if self.options.vocab_axis == 0 else place[::-1]

        return pl.BlockSpec(self.options.head_block(self.tile, width // self.tile.parts), index)

    def models(self, models: Models) -> list[pl.BlockSpec]:
        student, teacher = models.student_hidden.shape[1], models.teacher_hidden.shape[1]
        scalar = pl.BlockSpec((1, 1), lambda *_: (0, 0))
        return [
            self.rows(student, "hidden"),
            self.head(student, "head"),
            self.rows(teacher, "teacher_hidden"),
            self.head(teacher, "teacher_head"),
            scalar,
            scalar,
        ]

    def outputs(
        self, models: Models, outputs: int | jax.typing.DTypeLike
    ) -> tuple[list[tuple], list[pl.BlockSpec]]:
        """(shape, type) and block of each output; blocks change with the outer axis alone."""
        num_tokens, width = models.student_hidden.shape
        by_row = self.options.vocab_axis == 0 or self.sweep is not HEAD_GRADIENT
        columns = pl.BlockSpec((self.tile.tokens, 1), lambda outer, *_: (outer, 0))
        if isinstance(outputs, int):
            return [((num_tokens, 1), jnp.float32)] * outputs, [columns] * outputs
        shape, block = (num_tokens, width), (self.tile.tokens, width)
        if self.sweep is HEAD_GRADIENT:
            shape, block = models.student_head.shape, self.options.head_block(self.tile, width)
        place = pl.BlockSpec(block, lambda outer, *_: (outer, 0) if by_row else (0, outer))
        return [(shape, outputs)], [place]
