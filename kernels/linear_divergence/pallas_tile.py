"""What the kernels of this folder can serve, and the size of the tile each of them works on.

A kernel holds a block of tokens and a block of the vocabulary of both models, over the whole width
or a part of it, the tile of logits between them, and the sum it makes. Of all tiles that fit into
VMEM that one is taken which moves the fewest bytes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxdistill.kernels import blocks
from jaxdistill.kernels.dispatch import ImplementationError

VMEM_SPEED = 16  # how much faster than HBM it is read and written, about


class Tile(NamedTuple):
    """Block of tokens, block of the vocabulary, and the number of parts of both widths."""

    tokens: int
    vocab: int
    parts: int


class Sweep(NamedTuple):
    """What a kernel sums over, and the student's operand its product is taken with."""

    name: str
    over: str
    product_with: str | None = None


FORWARD = Sweep("forward", "vocabulary")
SECOND_FORWARD = Sweep("second_forward", "vocabulary")
HIDDEN_GRADIENT = Sweep("hidden_gradient", "vocabulary", "head")
HEAD_GRADIENT = Sweep("head_gradient", "tokens", "hidden")


class Sizes(NamedTuple):
    """What the choice of a tile depends on."""

    num_tokens: int
    vocab_size: int
    widths: tuple[int, int]
    itemsize: int
    chunks: tuple[int | None, int | None]

    @classmethod
    def of(
        cls,
        operands: Sequence[jax.Array],
        vocab_size: int,
        chunks: tuple[int | None, int | None],
    ) -> "Sizes":
        """Those of (student's hidden states, head, teacher's hidden states, head)."""
        student_hidden, _, teacher_hidden, _ = operands
        widths = student_hidden.shape[-1], teacher_hidden.shape[-1]
        num_tokens = max(math.prod(student_hidden.shape[:-1]), 1)
        itemsize = max(x.dtype.itemsize for x in operands)
        return cls(num_tokens, vocab_size, widths, itemsize, chunks)


def choose_tile(sweep: Sweep, sizes: Sizes) -> Tile:
    """The tile that moves the fewest bytes among those that fit; chunks that were given stay.

    Raises ImplementationError where none fits.
    """
    parts = [1] + [
        parts
        for parts in range(2, min(sizes.widths) // blocks.LANES + 1)
        if all(width % (parts * blocks.LANES) == 0 for width in sizes.widths)
    ]
    limits = (sizes.num_tokens, blocks.ROWS), (sizes.vocab_size, blocks.LANES)
    candidates = [
        [given] if given else [x for x in choices if x < most] + [_round_up(most, multiple)]
        for given, choices, (most, multiple) in zip(
            sizes.chunks, (blocks.TOKENS, blocks.VOCAB), limits, strict=True
        )
    ]
    fitting = [
        tile
        for tile in itertools.starmap(Tile, itertools.product(*candidates, parts))
        if vmem_of(sweep, tile, sizes) <= blocks.BUDGET_BYTES
    ]
    if not fitting:
        tokens, vocab = sizes.chunks[0] or blocks.ROWS, sizes.chunks[1] or blocks.LANES
        raise ImplementationError(
            f"implementation 'pallas' of linear_divergence cannot fit widths {sizes.widths[0]} "
            f"and {sizes.widths[1]} in blocks of {tokens} tokens and {vocab} columns into "
            f"{blocks.BUDGET_BYTES} bytes of VMEM: choose 'xla', or smaller chunks if any are given"
        )
    return min(fitting, key=lambda tile: _moved(sweep, tile, sizes))


def vmem_of(sweep: Sweep, tile: Tile, sizes: Sizes) -> int:
    """Bytes a kernel holds: what is read and written twice over, to overlap the moving."""
    padded = sum(_round_up(width // tile.parts, blocks.LANES) for width in sizes.widths)
    operands = 2 * sizes.itemsize * (tile.tokens + tile.vocab) * padded
    rows = {None: 0, "head": tile.tokens, "hidden": tile.vocab}[sweep.product_with]
    # the sum, its two output blocks, and the newest product before it is added
    number = 4 + 2 * sizes.itemsize + 4 // tile.parts
    gradient = rows * _round_up(sizes.widths[0], blocks.LANES) * number
    logits = 4 * blocks.LIVE_TILES * tile.tokens * tile.vocab  # of both models together
    return operands + gradient + logits + blocks.TOKEN_BYTES * tile.tokens


def _moved(sweep: Sweep, tile: Tile, sizes: Sizes) -> float:
    """Bytes that are read in the inner loop, and what its steps cost in bytes."""
    read = (tile.vocab if sweep.over == "vocabulary" else tile.tokens) * sum(sizes.widths)
    added = 0
    if tile.parts > 1:
        again = {None: 0, "head": tile.vocab, "hidden": tile.tokens}[sweep.product_with]
        read = (tile.tokens + tile.vocab) * sum(sizes.widths) + again * sizes.widths[0]
        # Each part reads and writes the sums of both logits in VMEM.
        added = tile.parts * 2 * 2 * 4 * tile.tokens * tile.vocab // VMEM_SPEED
    steps = -(-sizes.num_tokens // tile.tokens) * -(-sizes.vocab_size // tile.vocab)
    # Blocks that the tokens do not fill cost a copy of the hidden states: little time, but memory.
    filled = 1.0 if sizes.num_tokens % tile.tokens == 0 else 1.1
    return filled * steps * (read * sizes.itemsize + added + tile.parts * blocks.STEP_BYTES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check(
    operands: Sequence[jax.Array],
    vocab_size: int,
    chunks: tuple[int | None, int | None],
    axis_name: str | None,
) -> None:
    """Raise ImplementationError unless the kernels can serve (hidden, head) of two models."""
    if axis_name is not None:
        raise ImplementationError(
            "implementation 'pallas' of linear_divergence takes whole heads, but axis_name is "
            f"{axis_name!r}: choose 'xla' or 'reference'"
        )
    for dtype in (x.dtype for x in operands):
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ImplementationError(
                "implementation 'pallas' of linear_divergence takes float32 and bfloat16, but "
                f"{dtype} was given: choose 'xla' or 'reference'"
            )
    for name, size, multiple in (
        ("chunk_tokens", chunks[0], blocks.ROWS),
        ("chunk_vocab", chunks[1], blocks.LANES),
    ):
        if size is not None and size % multiple:
            raise ImplementationError(
                f"{name} must be a multiple of {multiple} for implementation 'pallas', but it is "
                f"{size}: choose 'xla' for any size"
            )
    sizes = Sizes.of(operands, vocab_size, chunks)
    for sweep in (FORWARD, HIDDEN_GRADIENT, HEAD_GRADIENT):
        choose_tile(sweep, sizes)
