"""The lean twin: one tile of both models' logits at a time, forward and backward, in plain XLA.

Write KL(p||q), with (p, q) = (teacher, student) for the forward and (student, teacher) for the
reverse. With running maxima m and totals Z of both, the forward pass keeps

    A = sum exp(p - m_p) ((p - m_p) - (q - m_q));    KL = A / Z_p - log Z_p + log Z_q

so the terms stay near the size of the divergence however large the logits. Residuals are the
inputs, both log-sum-exps and the KL: nothing of size [tokens, vocabulary].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import tiles


class _Options(NamedTuple):
    kind: str
    vocab_size: int
    soft_caps: tuple[float | None, float | None]  # student, teacher
    vocab_axis: int
    tiling: tiles.Tiling


class _Running(NamedTuple):
    """Statistics of the columns seen so far, [num_chunks, C] each."""

    student: tiles.OnlineSoftmax
    teacher: tiles.OnlineSoftmax
    difference: jax.Array  # A of the module's docstring


def linear_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
    *,
    kind: str,
    vocab_size: int,
    student_soft_cap: float | None,
    teacher_soft_cap: float | None,
    vocab_axis: int,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
) -> jax.Array:
    """Divergence `[...]`; one tile of logits of each model is in memory."""
    shape = student_hidden.shape[:-1]
    tiling = tiles.plan(math.prod(shape), vocab_size, chunk_tokens, chunk_vocab)
    soft_caps = (student_soft_cap, teacher_soft_cap)
    options = _Options(kind, vocab_size, soft_caps, vocab_axis, tiling)
    student_hidden, student_head, teacher_hidden, teacher_head, temperature = tiles.vary_alike(
        student_hidden, student_head, teacher_hidden, teacher_head, temperature
    )
    divergence = _chunked(
        options,
        tiles.chunk(student_hidden, len(shape), tiling),
        student_head,
        tiles.chunk(teacher_hidden, len(shape), tiling),
        teacher_head,
        temperature,
    )
    return tiles.unchunk(divergence, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    options: _Options,
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Two times [num_chunks, C, D] and a head -> divergence [num_chunks, C]."""
    running = _statistics(
        options, student_hidden, student_head, teacher_hidden, teacher_head, temperature
    )
    return _divergence(options, running)


def _statistics(
    options: _Options,
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
) -> _Running:
    student_hidden = tiles.in_product_type(student_hidden, student_head)
    teacher_hidden = tiles.in_product_type(teacher_hidden, teacher_head)

    def take_block(running: _Running, index: jax.Array) -> tuple[_Running, None]:
        columns = tiles.block_at(index, options.tiling, options.vocab_size)
        student_block = _block(options, student_head, columns, student_hidden.dtype)
        teacher_block = _block(options, teacher_head, columns, teacher_hidden.dtype)

        def take_tile(_: None, chunk: tuple) -> tuple[None, _Running]:
            student_hidden, teacher_hidden, running = chunk
            student, _slope = _tile(options, 0, student_hidden, student_block, columns, temperature)
            teacher, _slope = _tile(options, 1, teacher_hidden, teacher_block, columns, temperature)
            return None, _absorb(options, running, student, teacher, columns)

        return lax.scan(take_tile, None, (student_hidden, teacher_hidden, running))[1], None

    zeros = jnp.zeros_like(student_hidden[..., 0], dtype=jnp.float32)
    start = _Running(tiles.start_softmax(zeros), tiles.start_softmax(zeros), zeros)
    running, _ = lax.scan(take_block, start, jnp.arange(options.tiling.num_blocks))
    return running


def _block(options: _Options, head: jax.Array, columns: tiles.Block, dtype: jnp.dtype) -> jax.Array:
    size = options.tiling.chunk_vocab
    return tiles.take_block(head, columns.start, size, options.vocab_axis).astype(dtype)


def _tile(
    options: _Options,
    side: int,
    hidden: jax.Array,
    block: jax.Array,
    columns: tiles.Block,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits [C, Vb], -inf in columns that do not count, and their slope in the raw logits."""
    raw = tiles.project(hidden, block, options.vocab_axis)
    logits, slope = tiles.scaled(raw, temperature, options.soft_caps[side])
    return jnp.where(columns.valid[None, :], logits, -jnp.inf), slope


def _absorb(
    options: _Options,
    running: _Running,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    columns: tiles.Block,
) -> _Running:
    """Statistics after one more tile; `running` is that of its chunk, [C]."""
    student, student_centred, student_shift = tiles.absorb(running.student, student_logits)
    teacher, teacher_centred, teacher_shift = tiles.absorb(running.teacher, teacher_logits)
    p_total, p, p_shift = running.teacher.total, teacher_centred, teacher_shift
    q, q_shift = student_centred, student_shift
    if options.kind == "reverse_kl":
        p_total, p, q = running.student.total, q, p
        p_shift, q_shift = q_shift, p_shift
    terms = jnp.where(columns.valid[None, :], jnp.exp(p) * (p - q), 0.0)
    moved = running.difference + p_total * (p_shift - q_shift)
    return _Running(student, teacher, jnp.exp(p_shift) * moved + jnp.sum(terms, axis=-1))


def _divergence(options: _Options, running: _Running) -> jax.Array:
    p, q = running.teacher, running.student
    if options.kind == "reverse_kl":
        p, q = q, p
    return running.difference / p.total - jnp.log(p.total) + jnp.log(q.total)


def _forward(options: _Options, *operands: jax.Array) -> tuple[jax.Array, tuple]:
    running = _statistics(options, *operands)
    divergence = _divergence(options, running)
    sums = (running.student.log_sum_exp(), running.teacher.log_sum_exp())
    return divergence, (operands, sums, divergence)


def _backward(
    options: _Options, residuals: tuple, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None, None]:
    """Gradients of the student; the one nobody asks for is dead code to the compiler."""
    operands, (student_sum, teacher_sum), divergence = residuals
    original, student_head, teacher_hidden, teacher_head, temperature = operands
    student_hidden = tiles.in_product_type(original, student_head)
    teacher_hidden = tiles.in_product_type(teacher_hidden, teacher_head)
    per_token = (student_sum, teacher_sum, divergence, cotangent)
    axis = options.vocab_axis

    def take_block(gradients: tuple, index: jax.Array) -> tuple[tuple, None]:
        hidden_total, head_total = gradients
        columns = tiles.block_at(index, options.tiling, options.vocab_size)
        student_block = _block(options, student_head, columns, student_hidden.dtype)
        teacher_block = _block(options, teacher_head, columns, teacher_hidden.dtype)

        def take_tile(block_total: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
            hidden, teacher_hidden, total, per_token = chunk
            student, slope = _tile(options, 0, hidden, student_block, columns, temperature)
            teacher, _slope = _tile(options, 1, teacher_hidden, teacher_block, columns, temperature)
            raw = slope * _logits_gradient(options, student, teacher, columns, *per_token)
            block_total += tiles.head_gradient(raw, hidden, axis)
            return block_total, total + tiles.hidden_gradient(raw, student_block, axis)

        nothing = jnp.zeros_like(student_block, dtype=jnp.float32)
        chunks = (student_hidden, teacher_hidden, hidden_total, per_token)
        part, hidden_total = lax.scan(take_tile, nothing, chunks)
        return (hidden_total, tiles.add_block(head_total, part, columns.start, axis)), None

    start = (jnp.zeros_like(student_hidden, dtype=jnp.float32), jnp.zeros_like(student_head))
    blocks = jnp.arange(options.tiling.num_blocks)
    (hidden_total, head_total), _ = lax.scan(take_block, start, blocks)
    return hidden_total.astype(original.dtype), head_total, None, None, None


def _logits_gradient(
    options: _Options,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    columns: tiles.Block,
    student_sum: jax.Array,
    teacher_sum: jax.Array,
    divergence: jax.Array,
    cotangent: jax.Array,
) -> jax.Array:
    """d forward KL = Q - P;  d reverse KL = Q (log Q - log P - KL)."""
    log_q = student_logits - student_sum[:, None]
    log_p = teacher_logits - teacher_sum[:, None]
    if options.kind == "forward_kl":
        return cotangent[:, None] * (jnp.exp(log_q) - jnp.exp(log_p))
    excess = log_q - log_p - divergence[:, None]
    return cotangent[:, None] * jnp.where(columns.valid[None, :], jnp.exp(log_q) * excess, 0.0)


_chunked.defvjp(_forward, _backward)
