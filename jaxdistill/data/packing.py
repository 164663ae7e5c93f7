"""Packing: which tokens of which example stand where in rows of one length.

A packer sees only the lengths of the examples and returns a plan: for each row the pieces of
examples that fill it, in order. `build_row` turns one row of the plan into arrays when it is
needed, so a packed data set costs no more memory than its tokens.

In every row `segment_ids` counts the pieces 1, 2, ... and is 0 on padding; `positions` restarts
at 0 in each piece; padding has token 0 and loss mask 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PACKINGS = ("concat", "first_fit", "none")


class Example(NamedTuple):
    """Tokens int32 [n] and loss_mask float32 [n], 1 where the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class Piece(NamedTuple):
    """The tokens [start, stop) of one example."""

    example: int
    start: int
    stop: int


class Plan(NamedTuple):
    """The pieces of every row, and how many examples lost their end because they were too long."""

    rows: list[list[Piece]]
    truncated: int


def concat(lengths: Sequence[int], length: int) -> Plan:
    """Join all examples and cut the stream into rows of `length` tokens.

    Every token is used once and every position but the end of the last row is filled; an example
    that crosses a cut becomes two pieces.

    Args:
      lengths: tokens of each example.
      length: tokens of a row.
    Returns: the plan; nothing is ever truncated.

    >>> for row in concat([3, 4], 5).rows:
    ...     print([tuple(piece) for piece in row])
    [(0, 0, 3), (1, 0, 2)]
    [(1, 2, 4)]
    """
    rows: list[list[Piece]] = []
    room = 0
    for example, size in enumerate(lengths):
        start = 0
        while start < size:
            if room == 0:
                rows.append([])
                room = length
            stop = min(size, start + room)
            rows[-1].append(Piece(example, start, stop))
            room -= stop - start
            start = stop
    return Plan(rows, truncated=0)


def first_fit(lengths: Sequence[int], length: int, *, too_long: str = "error") -> Plan:
    """Put each whole example into the first row that still has room for it.

    Args:
      lengths: tokens of each example.
      length: tokens of a row.
      too_long: "error" refuses an example longer than a row; "truncate" keeps its first `length`
        tokens and counts it.
    Returns: the plan with the count of truncated examples.
    Raises: ValueError for an example longer than a row, unless it may be truncated.

    >>> for row in first_fit([3, 4, 2], 5).rows:
    ...     print([tuple(piece) for piece in row])
    [(0, 0, 3), (2, 0, 2)]
    [(1, 0, 4)]
    """
    sizes, truncated = _fit(lengths, length, too_long)
    rows: list[list[Piece]] = []
    room = np.zeros(len(sizes), np.int64)  # of each row; only the first len(rows) are open
    for example, size in enumerate(sizes):
        fits = room[: len(rows)] >= size
        row = int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = length
        rows[row].append(Piece(example, 0, size))
        room[row] -= size
    return Plan(rows, truncated)


def one_per_row(lengths: Sequence[int], length: int, *, too_long: str = "error") -> Plan:
    """Give every example its own row, padded at the end; arguments as in `first_fit`.

    >>> for row in one_per_row([3, 4], 5).rows:
    ...     print([tuple(piece) for piece in row])
    [(0, 0, 3)]
    [(1, 0, 4)]
    """
    sizes, truncated = _fit(lengths, length, too_long)
    return Plan([[Piece(example, 0, size)] for example, size in enumerate(sizes)], truncated)


def _fit(lengths: Sequence[int], length: int, too_long: str) -> tuple[list[int], int]:
    """The lengths cut to `length`, and how many were cut."""
    if too_long not in ("error", "truncate"):
        raise ValueError(f"too_long must be 'error' or 'truncate', got {too_long!r}")
    over = [example for example, size in enumerate(lengths) if size > length]
    if over and too_long == "error":
        raise ValueError(
            f"{len(over)} of {len(lengths)} examples are longer than the row of {length} tokens "
            f"(the first is example {over[0]} with {lengths[over[0]]}); "
            "give a larger length, or too_long='truncate' to cut them"
        )
    return [min(size, length) for size in lengths], len(over)


def plan(lengths: Sequence[int], length: int, packing: str, *, too_long: str = "error") -> Plan:
    """The plan of the packing named "concat", "first_fit" or "none" (one example a row)."""
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens to have a target, got length={length}")
    if packing == "concat":
        return concat(lengths, length)
    if packing == "first_fit":
        return first_fit(lengths, length, too_long=too_long)
    if packing == "none":
        return one_per_row(lengths, length, too_long=too_long)
    raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")


def build_row(
    examples: Sequence[Example], pieces: Sequence[Piece], length: int
) -> dict[str, np.ndarray]:
    """Build one row of a plan.

    Args:
      examples: the examples the plan was made of.
      pieces: the pieces of the row; none gives a row of padding.
      length: tokens of the row.
    Returns: {"tokens" int32, "segment_ids" int32, "positions" int32, "loss_mask" float32}, all
      [length].

    >>> example = Example(np.array([7, 8, 9], np.int32), np.ones(3, np.float32))
    >>> row = build_row([example], [Piece(0, 0, 1), Piece(0, 1, 3)], 4)
    >>> row["tokens"].tolist(), row["segment_ids"].tolist(), row["positions"].tolist()
    ([7, 8, 9, 0], [1, 2, 2, 0], [0, 0, 1, 0])
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["loss_mask"] = np.zeros(length, np.float32)
    column = 0
    for segment, piece in enumerate(pieces, start=1):
        size = piece.stop - piece.start
        here = slice(column, column + size)
        row["tokens"][here] = examples[piece.example].tokens[piece.start : piece.stop]
        row["segment_ids"][here] = segment
        row["positions"][here] = np.arange(size)
        row["loss_mask"][here] = examples[piece.example].loss_mask[piece.start : piece.stop]
        column += size
    return row
