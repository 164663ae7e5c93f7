"""The tile a TPU kernel of a fused head works on: what fits VMEM and takes the least time.

A tile is a block of tokens, a block of the vocabulary and the logits between them. A kernel holds
of each model the block of the hidden states [tokens, D] and of the head [vocab, D], whole or, where
both do not fit, or only in blocks so small that reading them takes longer than the products, one of
`parts` parts of D at a time.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxdistill.kernels import generation, searched_blocks
from jaxdistill.kernels.dispatch import ImplementationError
from jaxdistill.kernels.tiles import LANES, round_up

ROWS = 16  # rows of a packed bfloat16 register; blocks of tokens are a multiple of it
TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
VOCAB = (128, 256, 384, 512, 768, 1024, 2048)
WIDTH_PART = 512  # columns of D of a gradient's product that are in VMEM before they are added
STEP_SECONDS = 0.35e-6  # what a step of a grid costs beside its work
# Logits of a tile, of all models together: a kernel is unrolled over their registers, so that twice
# as many take twice as long to compile (14 seconds at this size), and save steps alone.
LARGEST_TILE = 512 * 1024
LIVE_TILES = 5  # float32 tiles [tokens, vocab] alive at once, of all models together
TOKEN_BYTES = 8 * LANES * 4  # labels and statistics, a row: a scalar takes a row of lanes
VMEM_SPEED = 16  # how much faster than HBM it is read and written, about
FLOAT32_PASSES = 6  # of the matrix unit, which multiplies bfloat16, for one float32 product


class Tile(NamedTuple):
    """Block of tokens, block of the vocabulary, and the number of parts of every width."""

    tokens: int
    vocab: int
    parts: int


class Sweep(NamedTuple):
    """What a kernel sums over, and the first model's operand its product is taken with."""

    name: str
    over: str
    product_with: str | None = None


FORWARD = Sweep("forward", "vocabulary")
SECOND_FORWARD = Sweep("second_forward", "vocabulary")
HIDDEN_GRADIENT = Sweep("hidden_gradient", "vocabulary", "head")
HEAD_GRADIENT = Sweep("head_gradient", "tokens", "hidden")


class Sizes(NamedTuple):
    """What the choice of a tile depends on.

    chunks: tokens and columns of it where they were given. labels: how many a token has.
    """

    num_tokens: int
    vocab_size: int
    widths: tuple[int, ...]
    itemsize: int
    chunks: tuple[int | None, int | None] = (None, None)
    labels: int = 1

    @classmethod
    def of(
        cls,
        models: Sequence[tuple[jax.Array, jax.Array]],
        vocab_size: int,
        chunks: tuple[int | None, int | None],
        labels: int = 1,
    ) -> "Sizes":
        """Those of the (hidden states, head) of each model."""
        widths = tuple(hidden.shape[-1] for hidden, _ in models)
        num_tokens = max(math.prod(models[0][0].shape[:-1]), 1)
        itemsize = max(x.dtype.itemsize for model in models for x in model)
        return cls(num_tokens, vocab_size, widths, itemsize, chunks, labels)


def check(
    operation: str,
    models: Sequence[tuple[jax.Array, jax.Array]],
    vocab_size: int,
    chunks: tuple[int | None, int | None],
    labels: int = 1,
) -> None:
    """Raise ImplementationError unless the kernels of an operation can serve these models."""
    for dtype in (x.dtype for model in models for x in model):
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ImplementationError(
                f"implementation 'pallas' of {operation} takes float32 and bfloat16, but "
                f"{dtype} was given: choose 'xla' or 'reference'"
            )
    for name, size, multiple in (
        ("chunk_tokens", chunks[0], ROWS),
        ("chunk_vocab", chunks[1], LANES),
    ):
        if size is not None and size % multiple:
            raise ImplementationError(
                f"{name} must be a multiple of {multiple} for implementation 'pallas', but it is "
                f"{size}: choose 'xla' for any size"
            )
    sizes = Sizes.of(models, vocab_size, chunks, labels)
    for sweep in (FORWARD, HIDDEN_GRADIENT, HEAD_GRADIENT):
        choose_tile(operation, sweep, sizes)


def choose_tile(operation: str, sweep: Sweep, sizes: Sizes) -> Tile:
    """The tile that takes the least time among those that fit; chunks that were given stay.

    Raises:
      ImplementationError: none fits.

    Example:
      >>> choose_tile("linear_cross_entropy", FORWARD, Sizes(8192, 151936, (2048,), 2))
      Tile(tokens=256, vocab=512, parts=1)
    """
    searched = _searched(operation, sweep, sizes)
    if searched is not None:
        return searched
    fitting = ranked(sweep, sizes)
    if not fitting:
        tokens, vocab = sizes.chunks[0] or ROWS, sizes.chunks[1] or LANES
        raise ImplementationError(
            f"implementation 'pallas' of {operation} cannot fit widths "
            f"{' and '.join(map(str, sizes.widths))} in blocks of {tokens} tokens and {vocab} "
            f"columns into {budget()} bytes of VMEM: choose 'xla', or smaller chunks if any are "
            "given"
        )
    return fitting[0]


def ranked(sweep: Sweep, sizes: Sizes) -> list[Tile]:
    """All tiles that fit, that which is reckoned to take the least time first."""
    fitting = [tile for tile in _tiles(sizes) if vmem_of(sweep, tile, sizes) <= budget()]
    return sorted(fitting, key=lambda tile: (seconds_of(sweep, tile, sizes), tile))


def _searched(operation: str, sweep: Sweep, sizes: Sizes) -> Tile | None:
    """What the search found, for a problem that fills such tiles and has no wishes of its own."""
    target = generation.target()
    if target is None or target.generation is None or any(sizes.chunks) or sizes.labels > 1:
        return None
    key = f"{operation}_{sweep.name}", target.generation, sizes.widths, sizes.itemsize
    if key not in searched_blocks.HEADS:
        return None
    tile = Tile(*searched_blocks.HEADS[key])
    fills = sizes.num_tokens % tile.tokens == 0 and sizes.vocab_size >= tile.vocab
    return tile if fills else None


def budget() -> int:
    """Bytes of VMEM for what a kernel holds; the compiler spills registers into the rest."""
    return generation.vmem_limit() * 3 // 4


def _tiles(sizes: Sizes) -> list[Tile]:
    """All there are for a problem of these sizes."""
    parts = [1] + [
        parts
        for parts in range(2, min(sizes.widths) // LANES + 1)
        if all(width % (parts * LANES) == 0 for width in sizes.widths)
    ]
    given_tokens, given_vocab = sizes.chunks
    tokens = [given_tokens] if given_tokens else _up_to(TOKENS, sizes.num_tokens, ROWS)
    vocab = [given_vocab] if given_vocab else _up_to(VOCAB, sizes.vocab_size, LANES)
    largest = LARGEST_TILE // len(sizes.widths)
    pairs = [
        pair
        for pair in itertools.product(tokens, vocab)
        if pair == sizes.chunks or math.prod(pair) <= largest
    ]
    return [Tile(*pair, x) for pair in pairs for x in parts]


def vmem_of(sweep: Sweep, tile: Tile, sizes: Sizes) -> int:
    """Bytes a kernel holds: what is read and written twice over, to overlap the moving."""
    part = sum(round_up(width // tile.parts, LANES) for width in sizes.widths)
    operands = 2 * sizes.itemsize * (tile.tokens + tile.vocab) * part
    rows = {None: 0, "head": tile.tokens, "hidden": tile.vocab}[sweep.product_with]
    width = round_up(sizes.widths[0], LANES)
    of_width = 4 * width + 2 * sizes.itemsize * (width // tile.parts)  # the sum, and its output
    gradient = rows * (of_width + 4 * min(width // tile.parts, WIDTH_PART))
    logits = 4 * tile.tokens * tile.vocab
    held = operands + gradient + LIVE_TILES * logits + TOKEN_BYTES * tile.tokens
    if sizes.labels == 1:
        return held
    # A loop over labels carries a tile and writes another; all it does to them is as wide as they.
    return held + 3 * logits + 4 * 12 * round_up(sizes.labels, LANES) * tile.tokens


def seconds_of(sweep: Sweep, tile: Tile, sizes: Sizes) -> float:
    """About how long a kernel takes: its products or its reading, whichever takes longer.

    Multiplying by a block of n rows takes as long as reading it where n is the multiplications a
    core does in the time it reads a byte, 240 of a v5e and 560 of a v6e: smaller blocks wait.
    """
    speed = generation.speed()
    width, logits = sum(sizes.widths), tile.tokens * tile.vocab
    multiplied = width + (sizes.widths[0] if sweep.product_with else 0)
    passes = FLOAT32_PASSES if sizes.itemsize == 4 else 1
    read = (tile.vocab if sweep.over == "vocabulary" else tile.tokens) * width
    if tile.parts > 1:
        again = {None: 0, "head": tile.vocab, "hidden": tile.tokens}[sweep.product_with]
        read = (tile.tokens + tile.vocab) * width + again * sizes.widths[0]
    products = 2 * logits * multiplied * passes / speed.operations
    reading = read * sizes.itemsize / speed.bytes
    rows = {None: 0, "head": tile.tokens, "hidden": tile.vocab}[sweep.product_with]
    sums = 2 * 4 * (rows * sizes.widths[0] + (tile.parts - 1) * len(sizes.widths) * logits)
    steps = tile.parts * (2 if tile.parts > 1 and sweep.product_with else 1)
    step = max(products, reading) + sums / (VMEM_SPEED * speed.bytes) + steps * STEP_SECONDS
    # Blocks that the tokens do not fill cost a copy of the hidden states: little time, but memory.
    filled = 1.0 if sizes.num_tokens % tile.tokens == 0 else 1.1
    return filled * step * -(-sizes.num_tokens // tile.tokens) * -(-sizes.vocab_size // tile.vocab)


def _up_to(sizes: tuple[int, ...], most: int, multiple: int) -> list[int]:
    """The sizes below what there is, and what there is itself, rounded up, where that is small."""
    whole = round_up(max(most, 1), multiple)
    return [x for x in sizes if x < whole] + ([whole] if whole <= sizes[-1] else [])
