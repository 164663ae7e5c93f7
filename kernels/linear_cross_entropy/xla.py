"""The lean twin: one tile of logits at a time, forward and backward, in plain XLA.

Residuals are the inputs, the log-sum-exp and the entropy: nothing of size [tokens, vocabulary].
The backward pass recomputes each tile from the same operands, so both see the same logits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import tiles


class _Options(NamedTuple):
    vocab_size: int
    soft_cap: float | None
    with_entropy: bool
    vocab_axis: int
    tiling: tiles.Tiling


class _Running(NamedTuple):
    """Statistics of the columns seen so far, [num_chunks, C] each."""

    softmax: tiles.OnlineSoftmax
    label_logit: jax.Array  # NaN until its column comes by
    moment: jax.Array  # sum exp(x - m) (x - m)


class _Residuals(NamedTuple):
    hidden: jax.Array
    head: jax.Array
    labels: jax.Array
    temperature: jax.Array
    num_valid: jax.Array | None
    log_sum_exp: jax.Array
    entropy: jax.Array


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    *,
    vocab_size: int,
    soft_cap: float | None,
    with_entropy: bool,
    vocab_axis: int,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
    num_valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-prob, log-sum-exp and entropy `[...]`; one tile of logits is in memory.

    Of the `vocab_size` columns those from `num_valid` on do not count either: how many do may
    differ from device to device. With none the log-sum-exp is -inf and the entropy 0.
    """
    tiling = tiles.plan(labels.size, vocab_size, chunk_tokens, chunk_vocab)
    options = _Options(vocab_size, soft_cap, with_entropy, vocab_axis, tiling)
    leading = labels.ndim
    operands = hidden, head, labels, temperature
    if num_valid is None:
        hidden, head, labels, temperature = tiles.vary_alike(*operands)
    else:
        hidden, head, labels, temperature, num_valid = tiles.vary_alike(*operands, num_valid)
    outputs = _chunked(
        options,
        tiles.chunk(hidden, leading, tiling),
        head,
        tiles.chunk(labels, leading, tiling),
        temperature,
        num_valid,
    )
    shape = hidden.shape[:-1]
    log_prob, log_sum_exp, entropy = (tiles.unchunk(x, shape) for x in outputs)
    return log_prob, log_sum_exp, entropy if with_entropy else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    options: _Options,
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    num_valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[num_chunks, C, D] and a head -> log-prob, log-sum-exp, entropy, [num_chunks, C] each."""
    hidden = tiles.in_product_type(hidden, head)

    def take_block(running: _Running, index: jax.Array) -> tuple[_Running, None]:
        block, columns = _block(options, head, index, hidden.dtype, num_valid)

        def take_tile(_: None, chunk: tuple) -> tuple[None, _Running]:
            hidden, labels, running = chunk
            logits, _slope = _tile(options, hidden, block, columns, temperature)
            return None, _absorb(options, running, logits, labels, columns)

        return lax.scan(take_tile, None, (hidden, labels, running))[1], None

    zeros = jnp.zeros_like(hidden[..., 0], dtype=jnp.float32)
    start = _Running(tiles.start_softmax(zeros), jnp.full_like(zeros, jnp.nan), zeros)
    running, _ = lax.scan(take_block, start, jnp.arange(options.tiling.num_blocks))
    log_sum_exp = running.softmax.log_sum_exp()
    total = running.softmax.total
    entropy = jnp.where(total != 0, jnp.log(total) - running.moment / total, 0.0)
    return running.label_logit - log_sum_exp, log_sum_exp, entropy


def _block(
    options: _Options,
    head: jax.Array,
    index: jax.Array,
    dtype: jnp.dtype,
    num_valid: jax.Array | None,
) -> tuple[jax.Array, tiles.Block]:
    """Block `index` of the head in the type the products are taken in, and its columns.

    Columns from `num_valid` on may hold NaN, which a product with zeros keeps: they become zeros.
    """
    columns = tiles.block_at(index, options.tiling, options.vocab_size)
    size, axis = options.tiling.chunk_vocab, options.vocab_axis
    block = tiles.take_block(head, columns.start, size, axis).astype(dtype)
    if num_valid is None:
        return block, columns
    exist = columns.columns < num_valid
    block = jnp.where(jnp.expand_dims(exist, 1 - axis), block, jnp.zeros_like(block))
    return block, columns._replace(valid=columns.valid & exist)


def _tile(
    options: _Options,
    hidden: jax.Array,
    block: jax.Array,
    columns: tiles.Block,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits [C, Vb], -inf in columns that do not count, and their slope in the raw logits."""
    raw = tiles.project(hidden, block, options.vocab_axis)
    logits, slope = tiles.scaled(raw, temperature, options.soft_cap)
    return jnp.where(columns.valid[None, :], logits, -jnp.inf), slope


def _absorb(
    options: _Options,
    running: _Running,
    logits: jax.Array,
    labels: jax.Array,
    columns: tiles.Block,
) -> _Running:
    """Statistics after one more tile; `running` and `labels` are those of its chunk, [C]."""
    softmax, centred, shift = tiles.absorb(running.softmax, logits)
    moment = running.moment
    if options.with_entropy:
        terms = jnp.where(columns.valid[None, :], jnp.exp(centred) * centred, 0.0)
        moved = running.moment + running.softmax.total * shift
        moment = jnp.exp(shift) * moved + jnp.sum(terms, axis=-1)
    position = jnp.clip(labels - columns.start, 0, options.tiling.chunk_vocab - 1)
    here = (columns.columns[position] == labels) & columns.valid[position]
    picked = jnp.take_along_axis(logits, position[:, None], axis=-1)[:, 0]
    return _Running(softmax, jnp.where(here, picked, running.label_logit), moment)


def _forward(
    options: _Options,
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    num_valid: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Residuals]:
    operands = hidden, head, labels, temperature, num_valid
    outputs = _chunked(options, *operands)
    _, log_sum_exp, entropy = outputs
    return outputs, _Residuals(*operands, log_sum_exp, entropy)


def _backward(
    options: _Options,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None, None]:
    """Gradients of hidden and head; the gradient nobody asks for is dead code to the compiler."""
    head, axis = residuals.head, options.vocab_axis
    hidden = tiles.in_product_type(residuals.hidden, head)
    some = residuals.log_sum_exp != -jnp.inf  # else -inf - -inf, where no column counts
    log_sum_exp = jnp.where(some, residuals.log_sum_exp, 0.0)
    per_token = (residuals.labels, log_sum_exp, residuals.entropy, cotangents)

    def take_block(gradients: tuple, index: jax.Array) -> tuple[tuple, None]:
        hidden_total, head_total = gradients
        block, columns = _block(options, head, index, hidden.dtype, residuals.num_valid)

        def take_tile(block_total: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
            hidden, total, per_token = chunk
            logits, slope = _tile(options, hidden, block, columns, residuals.temperature)
            raw = slope * _logits_gradient(options, logits, columns, *per_token)
            block_total += tiles.head_gradient(raw, hidden, axis)
            return block_total, total + tiles.hidden_gradient(raw, block, axis)

        nothing = jnp.zeros_like(block, dtype=jnp.float32)
        part, hidden_total = lax.scan(take_tile, nothing, (hidden, hidden_total, per_token))
        return (hidden_total, tiles.add_block(head_total, part, columns.start, axis)), None

    start = (jnp.zeros_like(hidden, dtype=jnp.float32), jnp.zeros_like(head))
    blocks = jnp.arange(options.tiling.num_blocks)
    (hidden_total, head_total), _ = lax.scan(take_block, start, blocks)
    return hidden_total.astype(residuals.hidden.dtype), head_total, None, None, None


def _logits_gradient(
    options: _Options,
    logits: jax.Array,
    columns: tiles.Block,
    labels: jax.Array,
    log_sum_exp: jax.Array,
    entropy: jax.Array,
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """d log_prob = onehot - p;  d log_sum_exp = p;  d entropy = -p (log p + entropy)."""
    to_log_prob, to_log_sum_exp, to_entropy = cotangents
    valid = columns.valid[None, :]
    log_p = logits - log_sum_exp[:, None]
    weight = (to_log_sum_exp - to_log_prob)[:, None]
    if options.with_entropy:
        surprise = jnp.where(valid, log_p + entropy[:, None], 0.0)
        weight = weight - to_entropy[:, None] * surprise
    is_label = (columns.columns[None, :] == labels[:, None]) & valid
    return jnp.exp(log_p) * weight + jnp.where(is_label, to_log_prob[:, None], 0.0)


_chunked.defvjp(_forward, _backward)
