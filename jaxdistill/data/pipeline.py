"""The input pipeline: examples to an endless stream of batches, shuffled, sharded, resumable.

Rows are planned once, ahead, by `packing` (in numpy, from the lengths alone), and the order of
each epoch is a permutation made from (seed, epoch). So batch b of process p is a pure function of
(examples, options, b, p): the whole state is the number b, and going to it replays nothing. Grain
does the rest: it batches, shards and prefetches by threads.

Two parts of grain are not used, on purpose. Its packers are iterators that pack after sharding, so
the rows would depend on the number of processes, and the state would be the half-filled rows of
each. Its shuffle seeds epoch e with seed + e, so neighbouring seeds share whole epochs, and it
takes milliseconds a row when there are few rows.

Order: rows -> permuted anew in each epoch, endlessly -> batches of batch_size / process_count rows
-> process p takes every process_count-th of them, from p on. So the batches of all processes, in
the order of the processes, are the one global batch that a single process would see.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np

from jaxdistill.data import packing as packing_lib
from jaxdistill.data.packing import Example
from jaxdistill.data.tokenizers.interface import Tokenizer

Batch = dict[str, np.ndarray]
TRANSFORMS_VERSION = 1  # raise it whenever the same arguments give other batches


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, *, add_bos: bool = False) -> list[Example]:
    """Tokenize documents, each ended by the end-of-sequence token; every token is a target.

    Args:
      texts: the documents.
      tokenizer: its `eos_id` ends each document.
      add_bos: put the beginning-of-sequence token first.
    Returns: one Example a document.
    Raises: ValueError if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so documents cannot be joined"
        )
    examples = []
    for text in texts:
        tokens = [*tokenizer.encode(text, add_bos=add_bos), tokenizer.eos_id]
        examples.append(Example(np.array(tokens, np.int32), np.ones(len(tokens), np.float32)))
    return examples


class PackedRows:
    """Random access to the packed rows of examples; what grain reads.

    Raises: ValueError if there are no examples, one is empty or malformed, a token lies outside
    the vocabulary, or one is too long for the packing.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        length: int,
        vocab_size: int,
        packing: str = "concat",
        too_long: str = "error",
    ):
        check_examples(examples, vocab_size)
        lengths = [len(example.tokens) for example in examples]
        plan = packing_lib.plan(lengths, length, packing, too_long=too_long)
        self.truncated = plan.truncated
        self._examples, self._rows, self._length = examples, plan.rows, length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        return packing_lib.build_row(self._examples, self._rows[index], self._length)


class EndlessRows:
    """Random access to the rows of all epochs; row i of epoch e has the index e * len(rows) + i."""

    def __init__(self, rows: PackedRows, seed: int):
        if seed < 0:
            raise ValueError(f"the data seed must be >= 0, got {seed}")
        self._rows, self._seed = rows, seed
        self._order = functools.lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, len(self._rows))
        return self._rows[self._order(epoch)[place]]

    def _permutation(self, epoch: int) -> np.ndarray:
        # Raw bits, because numpy keeps their stream over versions, but not that of `permutation`.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        return np.argsort(bits.random_raw(len(self._rows)), kind="stable")


def check_examples(examples: Sequence[Example], vocab_size: int) -> None:
    """Raise ValueError unless there are examples and all of them fit the vocabulary."""
    if len(examples) == 0:
        raise ValueError("the data set is empty: expected at least one example, got none")
    for index, (tokens, loss_mask) in enumerate(examples):
        shapes_fit = np.ndim(tokens) == 1 and np.shape(tokens) == np.shape(loss_mask)
        if not shapes_fit or len(tokens) == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"example {index}: expected integer tokens and loss_mask of one shape [n], n >= 1, "
                f"got {np.shape(tokens)} of {tokens.dtype} and {np.shape(loss_mask)}"
            )
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"example {index} has the token id {low if low < 0 else high}, but the vocabulary "
                f"has {vocab_size} tokens; use the tokenizer that the model was made with"
            )


class Pipeline:
    """An endless, deterministic stream of batches, every row once an epoch.

    Args:
      examples: tokenized examples.
      length: tokens of a row.
      batch_size: rows of the global batch, over all processes.
      seed: any integer >= 0; it decides the order of the rows in every epoch.
      vocab_size: of the model; larger token ids are refused.
      packing: "concat", "first_fit" or "none" (see `packing`).
      too_long: "error" or "truncate", for an example longer than a row (never with "concat").
      process_index, process_count: pass jax.process_index() and jax.process_count(); `next` then
        gives this process its batch_size / process_count rows of each global batch.
      prefetch: batches made ahead by as many threads; 0 makes them when asked.
      sources: names and sha256 of the sources, for the fingerprint.
      tokenizer: fingerprint of the tokenizer.
    `next` returns {"tokens", "segment_ids", "positions": int32, "loss_mask": float32}, each
    [batch_size / process_count, length]. `rows_per_epoch` and `truncated` (examples cut to fit)
    are counts; `fingerprint` is what decides the batches, JSON-able.
    Raises: ValueError for options or examples that cannot make a batch.

    >>> examples = [Example(np.arange(1, 5), np.ones(4)), Example(np.arange(5, 9), np.ones(4))]
    >>> pipeline = Pipeline(examples, length=4, batch_size=2, seed=0, vocab_size=9, prefetch=0)
    >>> sorted(next(pipeline)["tokens"].tolist())
    [[1, 2, 3, 4], [5, 6, 7, 8]]
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        length: int,
        batch_size: int,
        seed: int,
        vocab_size: int,
        packing: str = "concat",
        too_long: str = "error",
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
        sources: Mapping[str, str] | None = None,
        tokenizer: str | None = None,
    ):
        local_batch_size = _local_batch_size(batch_size, process_index, process_count)
        rows = PackedRows(
            examples, length=length, vocab_size=vocab_size, packing=packing, too_long=too_long
        )
        self.rows_per_epoch = len(rows)
        self.truncated = rows.truncated
        self.fingerprint = _fingerprint_of_data(examples, sources, tokenizer) | {
            "rows": len(rows),
            "length": length,
            "packing": packing,
            "too_long": too_long,
            "batch_size": batch_size,
            "process_count": process_count,
            "seed": seed,
        }
        stream = grain.MapDataset.source(EndlessRows(rows, seed))
        batches = stream.batch(local_batch_size, drop_remainder=True)[process_index::process_count]
        options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The state to checkpoint, JSON-able: the number of the next batch and the fingerprint."""
        return {
            "next_batch": grain.experimental.get_next_index(self._iterator),
            "fingerprint": self.fingerprint,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state` of a pipeline with the same fingerprint.

        Raises: ValueError if the fingerprints differ, or the state is none of `get_state`.
        """
        next_batch = state.get("next_batch")
        if type(next_batch) is not int or next_batch < 0 or "fingerprint" not in state:
            raise ValueError(
                "expected a pipeline state with 'next_batch' >= 0 and 'fingerprint', "
                f"got {dict(state)}; pass what get_state() returned"
            )
        compare_fingerprints(state["fingerprint"], self.fingerprint)
        grain.experimental.set_next_index(self._iterator, next_batch)

    def close(self) -> None:
        """Stop the prefetching threads; the pipeline gives no batch afterwards."""
        self._iterator.close()


def _fingerprint_of_data(
    examples: Sequence[Example], sources: Mapping[str, str] | None, tokenizer: str | None
) -> dict[str, Any]:
    return {
        "transforms_version": TRANSFORMS_VERSION,
        "sources": dict(sources or {}),
        "content": content_hash(examples),
        "tokenizer": tokenizer,
    }


def compare_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError, which shows both values of every differing entry, unless they agree.

    >>> compare_fingerprints({"seed": 1, "length": 8}, {"seed": 1, "length": 8})
    >>> compare_fingerprints({"seed": 1, "length": 8}, {"seed": 2, "length": 8})
    Traceback (most recent call last):
    ...
    ValueError: the data differs from the data of the checkpoint, so going on would not be the \
same run: seed was 1, is 2; restore these settings or start a new run
    """
    differing = [
        f"{name} was {json.dumps(saved.get(name))}, is {json.dumps(current.get(name))}"
        for name in sorted(saved.keys() | current.keys())
        if name not in saved or name not in current or saved[name] != current[name]
    ]
    if differing:
        raise ValueError(
            "the data differs from the data of the checkpoint, so going on would not be the same "
            f"run: {'; '.join(differing)}; restore these settings or start a new run"
        )


def content_hash(examples: Sequence[Example]) -> str:
    """The sha256 of the lengths, tokens and loss masks of all examples in their order."""
    digest = hashlib.sha256()
    for tokens, loss_mask in examples:
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(loss_mask, dtype="<f4").tobytes())
    return digest.hexdigest()


def evaluation_batches(
    examples: Sequence[Example],
    *,
    length: int,
    batch_size: int,
    vocab_size: int,
    packing: str = "none",
    too_long: str = "error",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled with rows of padding.

    Arguments, batches and errors are those of `Pipeline`. The errors are raised by the call,
    before the first batch is asked for.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    rows = PackedRows(
        examples, length=length, vocab_size=vocab_size, packing=packing, too_long=too_long
    )
    empty = packing_lib.build_row(examples, [], length)
    starts = range(
        process_index * local_batch_size, -(-len(rows) // batch_size) * batch_size, batch_size
    )
    return (
        _stack(
            [rows[i] if i < len(rows) else empty for i in range(start, start + local_batch_size)]
        )
        for start in starts
    )


def _stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"the global batch size must be a positive multiple of the {process_count} processes, "
            f"got {batch_size}"
        )
    return batch_size // process_count
