"""The input pipeline: order, sharding, exact resume, fingerprints, refusals."""

import gc
import json
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.data import packing as packing_lib
from jaxdistill.data.packing import Example
from jaxdistill.data.pipeline import (
    Batch,
    Pipeline,
    compare_fingerprints,
    evaluation_batches,
    tokenize,
)

SIZES = [5, 3, 9, 1, 7, 8, 2, 6, 4, 9, 9, 3, 5]
OPTIONS: dict[str, Any] = {
    "length": 10,
    "batch_size": 4,
    "seed": 0,
    "vocab_size": 200,
    "packing": "first_fit",
}


def examples_of(sizes: list[int] = SIZES) -> list[Example]:
    """Examples whose tokens are 1, 2, 3, ... without repetition."""
    stops = np.cumsum(sizes)
    return [
        Example(np.arange(stop - size + 1, stop + 1, dtype=np.int32), np.ones(size, np.float32))
        for stop, size in zip(stops, sizes, strict=True)
    ]


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes pipelines with OPTIONS, changed as asked, and closes them."""
    made = []

    def build(examples: list[Example] | None = None, **changes: Any) -> Pipeline:
        made.append(Pipeline(examples or examples_of(), **(OPTIONS | changes)))
        return made[-1]

    yield build
    for pipeline in made:
        pipeline.close()


def take(pipeline: Iterator[Batch], count: int) -> list[Batch]:
    return [next(pipeline) for _ in range(count)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


def all_rows(examples: list[Example], length: int, packing: str) -> list[tuple[int, ...]]:
    plan = packing_lib.plan([len(e.tokens) for e in examples], length, packing)
    rows = (packing_lib.build_row(examples, pieces, length) for pieces in plan.rows)
    return [tuple(row["tokens"].tolist()) for row in rows]


def test_batch_contract(make: Any) -> None:
    batch = next(make())
    shapes = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
    assert shapes == {
        "tokens": ((4, 10), "int32"),
        "segment_ids": ((4, 10), "int32"),
        "positions": ((4, 10), "int32"),
        "loss_mask": ((4, 10), "float32"),
    }


def test_same_arguments_give_the_same_batches(make: Any) -> None:
    assert_same(take(make(), 20), take(make(), 20))


@pytest.mark.parametrize("packing", packing_lib.PACKINGS)
def test_every_epoch_has_every_row_once_in_a_new_order(make: Any, packing: str) -> None:
    pipeline = make(packing=packing, batch_size=1)
    epochs = [rows_of(take(pipeline, pipeline.rows_per_epoch)) for _ in range(3)]
    expected = all_rows(examples_of(), 10, packing)
    for epoch in epochs:
        assert Counter(epoch) == Counter(expected)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_neighbouring_seeds_share_no_epoch(make: Any) -> None:
    # A shuffle seeded with seed + epoch would begin seed 1 with the second epoch of seed 0.
    orders = []
    for seed in (0, 1):
        pipeline = make(examples_of([5] * 12), packing="none", batch_size=12, seed=seed)
        orders += [tuple(rows_of([batch])) for batch in take(pipeline, 3)]
    assert len(set(orders)) == 6


def test_order_is_the_one_that_checkpoints_rely_on(make: Any) -> None:
    # If this fails, runs begun before can no longer be resumed exactly: raise TRANSFORMS_VERSION,
    # so that they are refused, and write down the new order.
    pipeline = make(examples_of([1] * 8), packing="none", batch_size=8, seed=3)
    orders = [batch["tokens"][:, 0].tolist() for batch in take(pipeline, 2)]
    assert orders == [[1, 5, 8, 2, 6, 7, 4, 3], [1, 7, 3, 2, 4, 8, 5, 6]]


def test_every_order_is_equally_likely(make: Any) -> None:
    orders: Counter[tuple[int, ...]] = Counter()
    for seed in range(40):
        pipeline = make(examples_of([1] * 3), packing="none", batch_size=3, seed=seed, prefetch=0)
        orders.update(tuple(batch["tokens"][:, 0].tolist()) for batch in take(pipeline, 30))
    counts = np.array(list(orders.values()))
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom exceeds 20.5 once in a thousand.
    assert np.sum((counts - 200) ** 2 / 200) < 20.5


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 10), min_size=1, max_size=15),
    st.sampled_from(packing_lib.PACKINGS),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_restored_state_continues_bitwise(
    sizes: list[int], packing: str, batch_size: int, before: int, elsewhere: int
) -> None:
    options = OPTIONS | {"packing": packing, "batch_size": batch_size, "prefetch": 3}
    original, restored = (Pipeline(examples_of(sizes), **options) for _ in range(2))
    take(original, before)
    state = json.loads(json.dumps(original.get_state()))
    expected = take(original, 5)
    take(restored, elsewhere)  # also into a pipeline that already runs and prefetches
    restored.set_state(state)
    assert restored.get_state() == state
    assert_same(take(restored, 5), expected)
    original.set_state(state)  # and back in itself
    assert_same(take(original, 5), expected)
    original.close()
    restored.close()


def test_state_is_taken_without_the_prefetched_batches(make: Any) -> None:
    pipeline = make(prefetch=5)
    take(pipeline, 2)
    assert pipeline.get_state()["next_batch"] == 2


def test_long_jump_needs_no_replay(make: Any) -> None:
    pipeline = make()
    far = {"next_batch": 10**9, "fingerprint": pipeline.fingerprint}
    pipeline.set_state(far)
    assert next(pipeline)["tokens"].shape == (4, 10)
    assert pipeline.get_state()["next_batch"] == 10**9 + 1


@pytest.mark.parametrize("packing", packing_lib.PACKINGS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_see_the_global_batches(
    make: Any, packing: str, process_count: int
) -> None:
    alone = take(make(packing=packing), 15)
    shards = [
        take(make(packing=packing, process_index=index, process_count=process_count), 15)
        for index in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, alone)


def test_processes_see_disjoint_rows_within_an_epoch(make: Any) -> None:
    examples = examples_of([5] * 24)
    shards = [
        rows_of(
            take(make(examples, packing="none", process_index=index, process_count=2), 6)
        )  # 6 batches of 4 rows are one epoch
        for index in range(2)
    ]
    assert set(shards[0]).isdisjoint(shards[1])
    assert sorted(shards[0] + shards[1]) == sorted(all_rows(examples, 10, "none"))


@pytest.mark.parametrize("prefetch", [1, 4, 16])
def test_prefetch_does_not_change_the_order(make: Any, prefetch: int) -> None:
    assert_same(take(make(prefetch=prefetch), 20), take(make(prefetch=0), 20))


def test_a_batch_belongs_to_the_caller(make: Any) -> None:
    pipeline, examples = make(batch_size=8), examples_of()
    for batch in take(pipeline, 3):
        for values in batch.values():
            values[...] = -1
    assert (next(pipeline)["tokens"] >= 0).all()
    assert_same([next(make(examples))], [next(make(examples))])


def test_closing_ends_the_threads_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = set(threading.enumerate())
        pipeline = Pipeline(examples_of(), **OPTIONS, prefetch=4)
        next(pipeline)
        started = set(threading.enumerate()) - before
        assert started
        pipeline.close()
        pipeline.close()
        for thread in started:
            thread.join(timeout=10)
            assert not thread.is_alive()
        with pytest.raises(ValueError, match="closed"):
            next(pipeline)
        del pipeline
        gc.collect()


# Fingerprints.

CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"batch_size": 8},
    {"length": 12},
    {"packing": "none"},
    {"too_long": "truncate"},
    {"process_count": 2},
    {"sources": {"other": "00"}},
    {"tokenizer": "11"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_state_of_other_settings_is_refused_with_both_values(
    make: Any, change: dict[str, Any]
) -> None:
    saved, current = make(), make(**change)
    state = json.loads(json.dumps(saved.get_state()))
    with pytest.raises(ValueError, match="would not be the same run") as error:
        current.set_state(state)
    ((name, value),) = change.items()
    was = json.dumps(saved.fingerprint[name])
    assert f"{name} was {was}, is {json.dumps(value)}" in str(error.value)
    assert_same(take(current, 2), take(make(**change), 2))  # the refusal moved nothing


@pytest.mark.parametrize("part", [0, 1])
def test_state_of_other_content_is_refused(make: Any, part: int) -> None:
    changed = examples_of()
    changed[4][part][-1] = 0
    with pytest.raises(ValueError, match=r"content was \"\w{64}\", is \"\w{64}\""):
        make(changed).set_state(make().get_state())


def test_content_hash_sees_where_examples_end(make: Any) -> None:
    def zeros(size: int) -> Example:  # tokens and masks of the same bytes
        return Example(np.zeros(size, np.int32), np.zeros(size, np.float32))

    first, second = make([zeros(4)]), make([zeros(2), zeros(2)])
    assert first.fingerprint["content"] != second.fingerprint["content"]


def test_fingerprint_is_the_same_for_every_process_and_prefetch(make: Any) -> None:
    first = make(process_index=0, process_count=2, prefetch=0).fingerprint
    second = make(process_index=1, process_count=2, prefetch=4).fingerprint
    assert first == second == json.loads(json.dumps(first))


def test_compare_fingerprints_reports_missing_entries() -> None:
    with pytest.raises(ValueError, match=r"new was null, is 1; old was 2, is null"):
        compare_fingerprints({"old": 2, "same": 0}, {"new": 1, "same": 0})


@pytest.mark.parametrize("next_batch", [-1, "3", None, True])
def test_state_of_another_kind_is_refused(make: Any, next_batch: Any) -> None:
    pipeline = make()
    with pytest.raises(ValueError, match="pass what get_state"):
        pipeline.set_state({"next_batch": next_batch, "fingerprint": pipeline.fingerprint})
    with pytest.raises(ValueError, match="pass what get_state"):
        pipeline.set_state({"next_batch": 1})


# Evaluation.


@pytest.mark.parametrize("packing", packing_lib.PACKINGS)
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_sees_every_row_once_in_order(packing: str, process_count: int) -> None:
    options = {name: OPTIONS[name] for name in ("length", "batch_size", "vocab_size")}
    options |= {"packing": packing, "process_count": process_count}
    shards = [
        list(evaluation_batches(examples_of(), process_index=index, **options))
        for index in range(process_count)
    ]
    seen = [row for parts in zip(*shards, strict=True) for row in rows_of(list(parts))]
    expected = all_rows(examples_of(), 10, packing)
    assert seen[: len(expected)] == expected
    assert all(not any(row) for row in seen[len(expected) :])
    assert len(seen) == -(-len(expected) // 4) * 4
    last = shards[-1][-1]
    assert not last["loss_mask"][last["segment_ids"] == 0].any()


def test_evaluation_refuses_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        evaluation_batches([], length=10, batch_size=4, vocab_size=9)


# Tokenization.


class Bytes:
    """A tokenizer of the bytes of the text."""

    bos_id: int | None = 256
    eos_id: int | None = 257
    fingerprint = "bytes"

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [256] * add_bos + list(text.encode())


def test_tokenized_documents_end_with_eos_and_are_all_targets() -> None:
    first, second = tokenize(["ab", ""], Bytes())
    assert first.tokens.tolist() == [97, 98, 257]
    assert first.loss_mask.tolist() == [1, 1, 1]
    assert second.tokens.tolist() == [257]
    assert (first.tokens.dtype, first.loss_mask.dtype) == (np.int32, np.float32)
    assert tokenize(["a"], Bytes(), add_bos=True)[0].tokens.tolist() == [256, 97, 257]


def test_tokenizer_without_eos_is_refused() -> None:
    tokenizer = Bytes()
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokenize(["a"], tokenizer)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"positive multiple of the 1 processes, got 0"),
        ({"batch_size": 4, "process_count": 3}, r"positive multiple of the 3 processes, got 4"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in \[0, 2\), got 2"),
        ({"process_index": -1}, r"process_index must be in \[0, 1\), got -1"),
        ({"length": 8}, r"3 of 13 examples are longer than the row of 8 tokens"),
        ({"vocab_size": 71}, r"example 12 has the token id 71, but the vocabulary has 71 tokens"),
        ({"seed": -1}, r"seed must be >= 0, got -1"),
        ({"packing": "tight"}, r"packing must be one of concat, first_fit, none, got 'tight'"),
    ],
)
def test_impossible_settings_are_refused(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], r"data set is empty"),
        ([Example(np.array([], np.int32), np.array([], np.float32))], r"example 0: .* n >= 1"),
        ([Example(np.array([1, 2]), np.array([1.0]))], r"got \(2,\) of int64 and \(1,\)"),
        ([Example(np.array([[1]]), np.array([[1.0]]))], r"got \(1, 1\)"),
        ([Example(np.array([1.5]), np.array([1.0]))], r"integer tokens.*float64"),
        ([Example(np.array([3, -1]), np.ones(2))], r"token id -1"),
    ],
)
def test_bad_examples_are_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline(examples, **OPTIONS)


def test_truncated_examples_are_counted(make: Any) -> None:
    pipeline = make(length=8, too_long="truncate")
    assert pipeline.truncated == sum(size > 8 for size in SIZES)
