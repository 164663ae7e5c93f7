"""Packed rows hold every token of every example exactly once, in its place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.data import packing
from jaxdistill.data.packing import Example

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def examples_of(sizes: list[int]) -> list[Example]:
    """Examples whose tokens are 1, 2, 3, ... without repetition, a third of them no target."""
    stops = np.cumsum(sizes)
    return [
        Example(tokens, (tokens % 3 > 0).astype(np.float32))
        for stop, size in zip(stops, sizes, strict=True)
        for tokens in [np.arange(stop - size + 1, stop + 1, dtype=np.int32)]
    ]


def pack(examples: list[Example], length: int, name: str, **options: str) -> dict[str, np.ndarray]:
    plan = packing.plan([len(e.tokens) for e in examples], length, name, **options)
    rows = [packing.build_row(examples, pieces, length) for pieces in plan.rows]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def segments_of(packed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Tokens of every segment, in row order, read from segment_ids alone."""
    return [
        tokens[ids == segment]
        for tokens, ids in zip(packed["tokens"], packed["segment_ids"], strict=True)
        for segment in range(1, ids.max() + 1)
    ]


@settings(deadline=None)
@given(SIZES, st.integers(12, 20), st.sampled_from(packing.PACKINGS))
def test_every_token_is_packed_once_with_its_mask(sizes: list[int], length: int, name: str) -> None:
    packed = pack(examples_of(sizes), length, name)
    real = packed["segment_ids"] > 0
    tokens = packed["tokens"][real]
    assert sorted(tokens) == list(range(1, sum(sizes) + 1))
    np.testing.assert_array_equal(packed["loss_mask"][real], tokens % 3 > 0)
    for key in ("tokens", "positions", "loss_mask"):
        assert not packed[key][~real].any()
    dtypes = {key: value.dtype.name for key, value in packed.items()}
    assert dtypes == {
        "tokens": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_mask": "float32",
    }


@settings(deadline=None)
@given(SIZES, st.integers(12, 20), st.sampled_from(packing.PACKINGS))
def test_segments_are_contiguous_and_positions_restart(
    sizes: list[int], length: int, name: str
) -> None:
    packed = pack(examples_of(sizes), length, name)
    for ids, positions in zip(packed["segment_ids"], packed["positions"], strict=True):
        real = ids[ids > 0]
        assert (ids[: len(real)] > 0).all()  # padding only at the end
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}
        for segment in range(1, real[-1] + 1):
            count = np.sum(ids == segment)
            np.testing.assert_array_equal(positions[ids == segment], np.arange(count))


@settings(deadline=None)
@given(SIZES, st.integers(2, 20))
def test_concat_is_the_stream_cut_to_length(sizes: list[int], length: int) -> None:
    packed = pack(examples_of(sizes), length, "concat")
    stream = packed["tokens"].ravel()
    np.testing.assert_array_equal(stream[: sum(sizes)], np.arange(1, sum(sizes) + 1))
    assert len(packed["tokens"]) == -(-sum(sizes) // length)  # all positions but the last row's
    starts = set(np.cumsum([0, *sizes])[:-1]) | set(range(0, sum(sizes), length))
    assert {int(tokens[0]) - 1 for tokens in segments_of(packed)} == starts


@settings(deadline=None)
@given(SIZES, st.integers(12, 20))
def test_first_fit_keeps_examples_whole_in_the_first_row_with_room(
    sizes: list[int], length: int
) -> None:
    room: list[int] = []  # the definition, by plain search
    expected = []
    for size in sizes:
        row = next((i for i, left in enumerate(room) if left >= size), len(room))
        if row == len(room):
            room.append(length)
        room[row] -= size
        expected.append(row)
    rows = packing.first_fit(sizes, length).rows
    placed = {piece.example: row for row, pieces in enumerate(rows) for piece in pieces}
    assert [placed[example] for example in range(len(sizes))] == expected
    assert all(piece.start == 0 and piece.stop == sizes[piece.example] for r in rows for piece in r)


def test_one_example_a_row() -> None:
    packed = pack(examples_of([3, 1, 2]), 4, "none")
    np.testing.assert_array_equal(packed["tokens"], [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]])
    np.testing.assert_array_equal(packed["segment_ids"].max(axis=1), [1, 1, 1])


@pytest.mark.parametrize("name", ["first_fit", "none"])
def test_too_long_examples_are_refused_or_cut_and_counted(name: str) -> None:
    message = r"2 of 3 examples are longer than the row of 4 tokens .*example 1 with 5.*'truncate'"
    with pytest.raises(ValueError, match=message):
        packing.plan([4, 5, 9], 4, name)
    plan = packing.plan([4, 5, 9], 4, name, too_long="truncate")
    assert plan.truncated == 2
    assert [[tuple(piece) for piece in row] for row in plan.rows] == [
        [(0, 0, 4)],
        [(1, 0, 4)],
        [(2, 0, 4)],
    ]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="concat, first_fit, none, got 'best_fit'"):
        packing.plan([1], 4, "best_fit")
    with pytest.raises(ValueError, match="'error' or 'truncate', got 'drop'"):
        packing.plan([1], 4, "none", too_long="drop")
    with pytest.raises(ValueError, match="length=1"):
        packing.plan([1], 1, "concat")
