"""What the lean heads share: of [tokens, vocabulary] only one tile exists at a time.

The vocabulary is the outer loop. A block of the head is then read once for all tokens, and its
gradient is complete, in float32, when the block is left; it is rounded to the head's type once.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE_BYTES = 64 * 2**20  # of one float32 tile; a backward pass holds about four
MAX_CHUNK_TOKENS = 8192
LANES = 128  # the width of a TPU register: blocks are a multiple of it

LOWEST = float(jnp.finfo(jnp.float32).min)


class Tiling(NamedTuple):
    """Sizes of a tile and how often it fits."""

    chunk_tokens: int
    num_chunks: int
    chunk_vocab: int
    num_blocks: int


def plan(
    num_tokens: int,
    vocab_size: int,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
) -> Tiling:
    """Tiles of about TILE_BYTES where the sizes are not given; blocks of nearly equal width."""
    tokens = min(chunk_tokens or MAX_CHUNK_TOKENS, max(num_tokens, 1))
    if chunk_vocab is None:
        fitting = max(TILE_BYTES // (4 * tokens), LANES)
        blocks = -(-vocab_size // fitting)
        chunk_vocab = round_up(-(-vocab_size // blocks), LANES)
    vocab = min(chunk_vocab, vocab_size)
    return Tiling(tokens, -(-num_tokens // tokens), vocab, -(-vocab_size // vocab))


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def chunk(array: jax.Array, leading: int, tiling: Tiling) -> jax.Array:
    """[..., *rest] with `leading` token dimensions -> [num_chunks, chunk_tokens, *rest].

    Zeros fill the last chunk. Their results are cut off again by `unchunk`, so their cotangents
    are zeros and they contribute nothing.
    """
    rest = array.shape[leading:]
    flat = array.reshape(-1, *rest)
    missing = tiling.num_chunks * tiling.chunk_tokens - flat.shape[0]
    padded = jnp.pad(flat, [(0, missing)] + [(0, 0)] * len(rest))
    return padded.reshape(tiling.num_chunks, tiling.chunk_tokens, *rest)


def unchunk(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[num_chunks, chunk_tokens, *rest] -> [*shape, *rest], without what filled the last chunk."""
    rest = values.shape[2:]
    return values.reshape(-1, *rest)[: math.prod(shape)].reshape(*shape, *rest)


class Block(NamedTuple):
    """A block of the vocabulary: its first column, all its columns, and which of them count."""

    start: jax.Array
    columns: jax.Array
    valid: jax.Array


def block_at(index: jax.Array, tiling: Tiling, vocab_size: int) -> Block:
    """Block `index`. The last one is moved back to end with the vocabulary.

    It then overlaps the one before, and the columns seen already do not count again. Columns of a
    padded vocabulary are never touched.
    """
    first = index * tiling.chunk_vocab
    start = jnp.minimum(first, vocab_size - tiling.chunk_vocab)
    columns = start + jnp.arange(tiling.chunk_vocab)
    return Block(start, columns, columns >= first)


def take_block(head: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """Columns [start, start + size) of the head.

    XLA:CPU has no bfloat16 slice: it widens the operand to float32, and would hoist the widened
    head out of the loop. A branch it cannot decide keeps that inside, one block at a time.
    """

    def taken(head: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(head, start, size, axis)

    def taken_in_branch(head: jax.Array, start: jax.Array) -> jax.Array:
        nothing = jnp.zeros_like(lax.slice_in_dim(head, 0, size, axis=axis))
        return lax.cond(start >= 0, lambda: taken(head, start), lambda: nothing)

    return lax.platform_dependent(head, start, cpu=taken_in_branch, default=taken)


def add_block(gradient: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """Add float32 `part` at `start`; where blocks overlap all but one of the parts are zero."""
    before = lax.dynamic_slice_in_dim(gradient, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(
        gradient, before + part.astype(gradient.dtype), start, axis
    )


def in_product_type(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Hidden in the type products with the head are taken in: float32 where they differ."""
    return hidden if hidden.dtype == head.dtype else hidden.astype(jnp.float32)


def project(hidden: jax.Array, block: jax.Array, axis: int) -> jax.Array:
    """Raw logits of a tile, [C, D] x block -> [C, Vb], accumulated in float32."""
    return _dot(hidden, block, (1, 1 - axis))


def hidden_gradient(raw_gradient: jax.Array, block: jax.Array, axis: int) -> jax.Array:
    """Gradient of a tile's raw logits [C, Vb] -> its part of the hidden's, float32."""
    return _dot(raw_gradient.astype(block.dtype), block, (1, axis))


def head_gradient(raw_gradient: jax.Array, hidden: jax.Array, axis: int) -> jax.Array:
    """Gradient of a tile's raw logits [C, Vb] -> its part of the block's gradient, float32."""
    raw_gradient = raw_gradient.astype(hidden.dtype)
    if axis == 0:
        return _dot(raw_gradient, hidden, (0, 0))
    return _dot(hidden, raw_gradient, (0, 0))


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Product of two matrices over one dimension of each, summed in float32.

    A TPU multiplies float32 in bfloat16 unless told otherwise.
    """
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision(a), preferred_element_type=jnp.float32
    )


def precision(operand: jax.Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None


def scaled(
    raw: jax.Array, temperature: jax.Array, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Logits after soft cap and temperature, c tanh(raw / c) / T, and their slope in `raw`."""
    if soft_cap is None:
        return raw / temperature, 1 / temperature
    bounded = jnp.tanh(raw / soft_cap)
    return soft_cap * bounded / temperature, (1 - bounded * bounded) / temperature


class OnlineSoftmax(NamedTuple):
    """Running maximum m and total sum exp(x - m) of each row, [C]."""

    maximum: jax.Array
    total: jax.Array

    def log_sum_exp(self) -> jax.Array:
        return self.maximum + jnp.log(self.total)


def start_softmax(like: jax.Array) -> OnlineSoftmax:
    """Nothing seen yet. The maximum is finite from the start, so it can be subtracted."""
    return OnlineSoftmax(jnp.full_like(like, LOWEST), jnp.zeros_like(like))


def joined(
    softmax: OnlineSoftmax, largest: Callable, summed: Callable
) -> tuple[OnlineSoftmax, jax.Array]:
    """Of parts of the vocabulary together, by maxima and sums over the parts; m of each - m.

    A part without a column that counts has a total of 0.
    """
    maximum = largest(softmax.maximum)
    shift = softmax.maximum - maximum
    return OnlineSoftmax(maximum, summed(softmax.total * jnp.exp(shift))), shift


def absorb(state: OnlineSoftmax, logits: jax.Array) -> tuple[OnlineSoftmax, jax.Array, jax.Array]:
    """Take in a tile [C, Vb]: the new state, logits - m [C, Vb], and m_before - m [C]."""
    maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=-1))
    centred = logits - maximum[:, None]
    shift = state.maximum - maximum
    total = state.total * jnp.exp(shift) + jnp.sum(jnp.exp(centred), axis=-1)
    return OnlineSoftmax(maximum, total), centred, shift


def vary_alike(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Inside shard_map, mark every operand as varying over the axes any of them varies over.

    The loops carry sums over all operands, so they need one type. The transpose of the mark is
    the sum over devices, which is what the gradient of a replicated head needs.
    """
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in operands))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(varying - jax.typeof(x).mat.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return tuple(mark(x) for x in operands)


# A sum over the columns of a tile is kept for each lane apart, [tokens, LANES]: adding registers is
# what the unit does best, adding the lanes of one what it does worst. The last step does that once.


def lane_max(values: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _registers(values))


def lane_sum(values: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, _registers(values))


def row_max(lanes: jax.Array) -> jax.Array:
    return jnp.max(lanes, axis=1, keepdims=True)


def row_sum(lanes: jax.Array) -> jax.Array:
    return jnp.sum(lanes, axis=1, keepdims=True)


def _registers(values: jax.Array) -> list[jax.Array]:
    """[tokens, vocab] -> [tokens, LANES] each."""
    starts = range(0, values.shape[1], LANES)
    return [values[:, start : start + LANES] for start in starts]
