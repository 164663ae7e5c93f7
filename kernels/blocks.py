"""Sizes of the blocks a TPU kernel of a fused head holds in VMEM, from a budget in bytes.

A block pair is tokens of the hidden states [tokens, D] and columns of the head [vocab, D]; between
them stands one tile of logits [tokens, vocab]. Of all pairs that fit, the one is taken that moves
the fewest bytes from HBM, where a step of the grid costs as much time as moving STEP_BYTES.
"""

import itertools
from typing import Literal, NamedTuple

MIB = 2**20
BUDGET_BYTES = 12 * MIB  # the rest is left to the compiler: spilled registers, operands rearranged

ROWS = 16  # rows of a packed bfloat16 register; blocks of tokens are a multiple of it
LANES = 128  # the width of a register; blocks of columns are a multiple of it
TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
VOCAB = (128, 256, 384, 512, 768, 1024, 2048)
STEP_BYTES = 256 * 1024  # 0.35 microseconds at 800 GB/s
LIVE_TILES = 5  # float32 tiles [tokens, vocab] alive at once, a head
TOKEN_BYTES = 8 * LANES * 4  # labels and statistics, a row: a scalar takes a row of lanes

Sweep = Literal["forward", "hidden_gradient", "head_gradient", "all"]


class Blocks(NamedTuple):
    """Tokens and columns of a block: multiples of 16 and 128."""

    tokens: int
    vocab: int


def plan(
    num_tokens: int,
    vocab_size: int,
    widths: tuple[int, ...],
    itemsize: int,
    vmem_bytes: int = BUDGET_BYTES,
    sweep: Sweep = "all",
) -> Blocks:
    """The block pair that moves the fewest bytes among those that fit.

    Args:
      num_tokens, vocab_size: what there is; blocks are no larger than it, rounded up.
      widths: D of each hidden state and head that are in VMEM together.
      itemsize: bytes of one of their numbers.
      vmem_bytes: what all blocks, accumulators and tiles may take.
      sweep: the kernel the blocks are for. "forward" and "hidden_gradient" go through the
        vocabulary for each block of tokens, "head_gradient" through the tokens for each block of
        the head; "all" fits and weighs the three together.

    Raises:
      ValueError: not even the smallest pair fits.

    Example:
      >>> plan(8192, 151936, (2048,), 2)
      Blocks(tokens=256, vocab=256)
    """
    pairs = [
        Blocks(*x)
        for x in itertools.product(
            _up_to(TOKENS, num_tokens, ROWS), _up_to(VOCAB, vocab_size, LANES)
        )
    ]
    fitting = [x for x in pairs if vmem_of(x, widths, itemsize, sweep) <= vmem_bytes]
    if not fitting:
        smallest = vmem_of(pairs[0], widths, itemsize, sweep)
        raise ValueError(
            f"blocks must fit {vmem_bytes} bytes of VMEM, but the smallest of widths {widths} "
            f"take {smallest}"
        )
    bytes_of = {
        x: _moved(x, num_tokens, vocab_size, sum(widths) * itemsize, sweep) for x in fitting
    }
    return min(fitting, key=lambda x: (bytes_of[x], x.tokens * x.vocab))


def vmem_of(blocks: Blocks, widths: tuple[int, ...], itemsize: int, sweep: Sweep = "all") -> int:
    """Bytes of VMEM a kernel takes: what is read and written twice over, to overlap the moving."""
    width = sum(_round_up(x, LANES) for x in widths)
    accumulated = {
        "forward": 0,
        "hidden_gradient": blocks.tokens,
        "head_gradient": blocks.vocab,
        "all": max(blocks),
    }[sweep]
    operands = 2 * itemsize * width * sum(blocks)
    gradient = accumulated * width * (4 + 2 * itemsize)
    tiles = 4 * LIVE_TILES * len(widths) * blocks.tokens * blocks.vocab
    return operands + gradient + tiles + TOKEN_BYTES * blocks.tokens


def _moved(blocks: Blocks, num_tokens: int, vocab_size: int, row_bytes: int, sweep: Sweep) -> int:
    """Bytes the innermost loop reads, and what its steps cost."""
    steps = -(-num_tokens // blocks.tokens) * -(-vocab_size // blocks.vocab)
    through_vocabulary = steps * (blocks.vocab * row_bytes + STEP_BYTES)
    through_tokens = steps * (blocks.tokens * row_bytes + STEP_BYTES)
    if sweep == "all":
        return 2 * through_vocabulary + through_tokens
    return through_tokens if sweep == "head_gradient" else through_vocabulary


def _up_to(sizes: tuple[int, ...], most: int, multiple: int) -> list[int]:
    """The sizes below what there is, and what there is itself, rounded up, where that is small."""
    whole = _round_up(max(most, 1), multiple)
    return [x for x in sizes if x < whole] + ([whole] if whole <= sizes[-1] else [])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
