"""The lean twin: one tile of both models' logits at a time, forward and backward, in plain XLA.

A KL takes one sweep over the vocabulary, see `statistics`. The other kinds need both log-sum-exps
first, so they take a second one. Residuals are the inputs, both log-sum-exps and the sum of the
slopes (see `kinds`): nothing of size [tokens, vocabulary].
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import tiles
from jaxdistill.kernels.linear_divergence import kinds
from jaxdistill.kernels.linear_divergence.statistics import (
    DIRECTIONS,
    Running,
    Sums,
    of_kl,
    over_devices,
    own_columns,
)


class _Options(NamedTuple):
    kind: str
    vocab_size: int
    soft_caps: tuple[float | None, float | None]  # student, teacher
    vocab_axis: int
    axis_name: str | None
    tiling: tiles.Tiling


class _Models(NamedTuple):
    """The operands: hidden states [num_chunks, C, D] and heads, and scalars."""

    student_hidden: jax.Array
    student_head: jax.Array
    teacher_hidden: jax.Array
    teacher_head: jax.Array
    temperature: jax.Array
    share: jax.Array
    num_valid: jax.Array | None  # this device's columns that count, of a split head


def linear_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
    share: jax.Array,
    *,
    kind: str,
    vocab_size: int,
    student_soft_cap: float | None,
    teacher_soft_cap: float | None,
    vocab_axis: int,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
    axis_name: str | None = None,
) -> jax.Array:
    """Divergence `[...]`; one tile of logits of each model is in memory.

    With an axis name the heads are one device's part of a vocabulary of `vocab_size` columns.
    """
    num_valid = None
    if axis_name is not None:
        num_valid = own_columns(student_head, vocab_axis, vocab_size, axis_name)
        vocab_size = student_head.shape[vocab_axis]
    shape = student_hidden.shape[:-1]
    tiling = tiles.plan(math.prod(shape), vocab_size, chunk_tokens, chunk_vocab)
    soft_caps = (student_soft_cap, teacher_soft_cap)
    options = _Options(kind, vocab_size, soft_caps, vocab_axis, axis_name, tiling)
    models = _Models(
        tiles.chunk(student_hidden, len(shape), tiling),
        student_head,
        tiles.chunk(teacher_hidden, len(shape), tiling),
        teacher_head,
        temperature,
        share,
        num_valid,
    )
    leaves, structure = jax.tree.flatten(models)
    models = jax.tree.unflatten(structure, tiles.vary_alike(*leaves))
    return tiles.unchunk(_chunked(options, models), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(options: _Options, models: _Models) -> jax.Array:
    """Divergence [num_chunks, C]."""
    return _divergence_and_sums(options, models)[0]


def _divergence_and_sums(options: _Options, models: _Models) -> tuple[jax.Array, Sums]:
    running = _statistics(options, models)
    if options.kind in kinds.KL:
        return of_kl(options.kind, running)
    log_sum_exps = running.student.log_sum_exp(), running.teacher.log_sum_exp()
    divergence, slopes = _second_sweep(options, models, *log_sum_exps)
    return divergence, Sums(*log_sum_exps, slopes)


def _in_product_types(models: _Models) -> _Models:
    return models._replace(
        student_hidden=tiles.in_product_type(models.student_hidden, models.student_head),
        teacher_hidden=tiles.in_product_type(models.teacher_hidden, models.teacher_head),
    )


def _zeros(models: _Models) -> jax.Array:
    return jnp.zeros_like(models.student_hidden[..., 0], dtype=jnp.float32)


def _statistics(options: _Options, models: _Models) -> Running:
    models = _in_product_types(models)

    def take_block(running: Running, index: jax.Array) -> tuple[Running, None]:
        columns = _columns(options, models, index)
        blocks = _blocks(options, models, columns)

        def take_tile(_: None, chunk: tuple) -> tuple[None, Running]:
            *hidden, running = chunk
            student, teacher, _slope = _tile(options, models, hidden, blocks)
            return None, _absorb(options, running, student, teacher, columns)

        return lax.scan(take_tile, None, (*_hidden(models), running))[1], None

    zeros = _zeros(models)
    softmax, directions = tiles.start_softmax(zeros), DIRECTIONS.get(options.kind, ())
    start = Running(softmax, softmax, (zeros,) * len(directions))
    running, _ = lax.scan(take_block, start, jnp.arange(options.tiling.num_blocks))
    if options.axis_name is None:
        return running
    return over_devices(options.kind, running, options.axis_name)


def _columns(options: _Options, models: _Models, index: jax.Array) -> tiles.Block:
    columns = tiles.block_at(index, options.tiling, options.vocab_size)
    if models.num_valid is None:
        return columns
    return columns._replace(valid=columns.valid & (columns.columns < models.num_valid))


def _hidden(models: _Models) -> tuple[jax.Array, jax.Array]:
    return models.student_hidden, models.teacher_hidden


def _blocks(
    options: _Options, models: _Models, columns: tiles.Block
) -> tuple[jax.Array, jax.Array]:
    """These columns of both heads, in the type their products are taken in."""

    def taken(head: jax.Array, hidden: jax.Array) -> jax.Array:
        size = options.tiling.chunk_vocab
        block = tiles.take_block(head, columns.start, size, options.vocab_axis)
        if models.num_valid is not None:  # padding may hold NaN, which a product with 0 keeps
            exist = jnp.expand_dims(columns.columns < models.num_valid, 1 - options.vocab_axis)
            block = jnp.where(exist, block, jnp.zeros_like(block))
        return block.astype(hidden.dtype)

    return (
        taken(models.student_head, models.student_hidden),
        taken(models.teacher_head, models.teacher_hidden),
    )


def _tile(
    options: _Options,
    models: _Models,
    hidden: Sequence[jax.Array],
    blocks: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Student's and teacher's logits [C, Vb], and the slope of the student's in its raw ones."""
    student, teacher = (
        tiles.scaled(tiles.project(states, block, options.vocab_axis), models.temperature, cap)
        for states, block, cap in zip(hidden, blocks, options.soft_caps, strict=True)
    )
    return student[0], teacher[0], student[1]


def _absorb(
    options: _Options,
    running: Running,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    columns: tiles.Block,
) -> Running:
    """Statistics after one more tile; `running` is that of its chunk, [C]."""
    valid = columns.valid[None, :]
    student, of_student, student_shift = tiles.absorb(
        running.student, jnp.where(valid, student_logits, -jnp.inf)
    )
    teacher, of_teacher, teacher_shift = tiles.absorb(
        running.teacher, jnp.where(valid, teacher_logits, -jnp.inf)
    )
    differences = []
    for forward, before in zip(DIRECTIONS.get(options.kind, ()), running.differences, strict=True):
        p_total, p, p_shift = running.teacher.total, of_teacher, teacher_shift
        q, q_shift = of_student, student_shift
        if not forward:
            p_total, p, q = running.student.total, q, p
            p_shift, q_shift = q_shift, p_shift
        terms = jnp.where(valid, jnp.exp(p) * (p - q), 0.0)
        moved = before + p_total * (p_shift - q_shift)
        differences.append(jnp.exp(p_shift) * moved + jnp.sum(terms, axis=-1))
    return Running(student, teacher, tuple(differences))


def _second_sweep(
    options: _Options, models: _Models, student_sum: jax.Array, teacher_sum: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums of the terms and of the slopes, [num_chunks, C], given both log-sum-exps."""
    models = _in_product_types(models)

    def take_block(totals: tuple, index: jax.Array) -> tuple[tuple, None]:
        columns = _columns(options, models, index)
        blocks = _blocks(options, models, columns)

        def take_tile(_: None, chunk: tuple) -> tuple[None, tuple]:
            *hidden, student_sum, teacher_sum, totals = chunk
            student, teacher, _slope = _tile(options, models, hidden, blocks)
            log_q, log_p = student - student_sum[:, None], teacher - teacher_sum[:, None]
            found = (
                of(options.kind, log_q, log_p, models.share) for of in (kinds.terms, kinds.slopes)
            )
            return None, tuple(
                total + jnp.sum(jnp.where(columns.valid[None, :], x, 0.0), axis=-1)
                for total, x in zip(totals, found, strict=True)
            )

        chunks = (*_hidden(models), student_sum, teacher_sum, totals)
        return lax.scan(take_tile, None, chunks)[1], None

    zeros = _zeros(models)
    totals, _ = lax.scan(take_block, (zeros, zeros), jnp.arange(options.tiling.num_blocks))
    return totals if options.axis_name is None else lax.psum(totals, options.axis_name)


def _forward(options: _Options, models: _Models) -> tuple[jax.Array, tuple[_Models, Sums]]:
    divergence, sums = _divergence_and_sums(options, models)
    return divergence, (models, sums)


def _backward(
    options: _Options, residuals: tuple[_Models, Sums], cotangent: jax.Array
) -> tuple[_Models]:
    """Gradients of the student; the one nobody asks for is dead code to the compiler."""
    original, sums = residuals
    models = _in_product_types(original)
    axis = options.vocab_axis

    def take_block(gradients: tuple, index: jax.Array) -> tuple[tuple, None]:
        hidden_total, head_total = gradients
        columns = _columns(options, models, index)
        blocks = _blocks(options, models, columns)

        def take_tile(block_total: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
            *hidden, total, sums, cotangent = chunk
            student, teacher, slope = _tile(options, models, hidden, blocks)
            gradient = _logits_gradient(options, student, teacher, sums, models.share)
            raw = jnp.where(columns.valid[None, :], slope * cotangent[:, None] * gradient, 0.0)
            block_total += tiles.head_gradient(raw, hidden[0], axis)
            return block_total, total + tiles.hidden_gradient(raw, blocks[0], axis)

        nothing = jnp.zeros_like(blocks[0], dtype=jnp.float32)
        chunks = (*_hidden(models), hidden_total, sums, cotangent)
        part, hidden_total = lax.scan(take_tile, nothing, chunks)
        return (hidden_total, tiles.add_block(head_total, part, columns.start, axis)), None

    start = (
        jnp.zeros_like(models.student_hidden, dtype=jnp.float32),
        jnp.zeros_like(models.student_head),
    )
    blocks = jnp.arange(options.tiling.num_blocks)
    (hidden_total, head_total), _ = lax.scan(take_block, start, blocks)
    nothing = jax.tree.map(lambda _: None, models)
    hidden_total = hidden_total.astype(original.student_hidden.dtype)
    return (nothing._replace(student_hidden=hidden_total, student_head=head_total),)


def _logits_gradient(
    options: _Options,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    sums: Sums,
    share: jax.Array,
) -> jax.Array:
    log_q = student_logits - sums.student[:, None]
    log_p = teacher_logits - sums.teacher[:, None]
    slopes = kinds.slopes(options.kind, log_q, log_p, share)
    return slopes - jnp.exp(log_q) * sums.slopes[:, None]


_chunked.defvjp(_forward, _backward)
