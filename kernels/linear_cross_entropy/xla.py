"""The lean twin: one tile of logits at a time, forward and backward, in plain XLA.

Residuals are the inputs, two log-sum-exps and the entropy: nothing of size [tokens, vocabulary].
The backward pass recomputes each tile from the same operands, so both see the same logits.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import tiles

Outputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class _Options(NamedTuple):
    vocab_size: int
    soft_cap: float | None
    with_entropy: bool
    with_rest: bool
    vocab_axis: int
    tiling: tiles.Tiling


class _Running(NamedTuple):
    """Statistics of the columns seen so far, [num_chunks, C] each, of labels [num_chunks, C, K]."""

    softmax: tiles.OnlineSoftmax
    rest: tiles.OnlineSoftmax  # of the columns that are no label
    label_logits: jax.Array  # NaN until their columns come by
    moment: jax.Array  # sum exp(x - m) (x - m)


class _Residuals(NamedTuple):
    hidden: jax.Array
    head: jax.Array
    labels: jax.Array
    temperature: jax.Array
    num_valid: jax.Array | None
    log_sum_exp: jax.Array
    entropy: jax.Array
    rest: jax.Array


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    *,
    vocab_size: int,
    soft_cap: float | None,
    with_entropy: bool,
    with_rest: bool,
    vocab_axis: int,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
    num_valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Log-prob of labels `[..., K]`, log-sum-exp, entropy and the log-sum-exp of the rest, `[...]`.

    One tile of logits is in memory. Of the `vocab_size` columns those from `num_valid` on do not
    count either: how many do may differ from device to device. With none the log-sum-exp is -inf
    and the entropy 0.
    """
    shape = labels.shape[:-1]
    leading = len(shape)
    tiling = tiles.plan(math.prod(shape), vocab_size, chunk_tokens, chunk_vocab)
    options = _Options(vocab_size, soft_cap, with_entropy, with_rest, vocab_axis, tiling)
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
    log_prob, log_sum_exp, entropy, rest = (tiles.unchunk(x, shape) for x in outputs)
    wanted = entropy if with_entropy else None, rest if with_rest else None
    return log_prob, log_sum_exp, *wanted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    options: _Options,
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    num_valid: jax.Array | None,
) -> Outputs:
    """[num_chunks, C, D] and a head -> log-prob [num_chunks, C, K], the others [num_chunks, C]."""
    hidden = tiles.in_product_type(hidden, head)

    def take_block(running: _Running, index: jax.Array) -> tuple[_Running, None]:
        block, columns = _block(options, head, index, hidden.dtype, num_valid)

        def take_tile(_: None, chunk: tuple) -> tuple[None, _Running]:
            hidden, labels, running = chunk
            logits, _slope = _tile(options, hidden, block, columns, temperature)
            return None, _absorb(options, running, logits, labels, columns)

        return lax.scan(take_tile, None, (hidden, labels, running))[1], None

    zeros = jnp.zeros_like(hidden[..., 0], dtype=jnp.float32)
    unseen = jnp.full_like(labels, jnp.nan, dtype=jnp.float32)
    start = _Running(tiles.start_softmax(zeros), tiles.start_softmax(zeros), unseen, zeros)
    running, _ = lax.scan(take_block, start, jnp.arange(options.tiling.num_blocks))
    log_sum_exp = running.softmax.log_sum_exp()
    total = running.softmax.total
    entropy = jnp.where(total != 0, jnp.log(total) - running.moment / total, 0.0)
    log_prob = running.label_logits - log_sum_exp[..., None]
    return log_prob, log_sum_exp, entropy, running.rest.log_sum_exp()


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
    """Statistics after one more tile; `running` and `labels` are those of its chunk."""
    softmax, centred, shift = tiles.absorb(running.softmax, logits)
    moment = running.moment
    if options.with_entropy:
        terms = jnp.where(columns.valid[None, :], jnp.exp(centred) * centred, 0.0)
        moved = running.moment + running.softmax.total * shift
        moment = jnp.exp(shift) * moved + jnp.sum(terms, axis=-1)
    rest = running.rest
    if options.with_rest:
        rest = tiles.absorb(rest, _without_labels(logits, labels, columns))[0]
    position = _positions(labels, columns)
    picked = jnp.take_along_axis(logits, position, axis=-1, mode="clip")
    picked = jnp.where(position < columns.columns.size, picked, running.label_logits)
    return _Running(softmax, rest, picked, moment)


def _positions(labels: jax.Array, columns: tiles.Block) -> jax.Array:
    """Where in the tile the labels [C, K] are; its width where a label is none of its columns."""
    width = columns.columns.size
    position = jnp.clip(labels - columns.start, 0, width - 1)
    here = (columns.columns[position] == labels) & columns.valid[position]
    return jnp.where(here, position, width)


def _without_labels(logits: jax.Array, labels: jax.Array, columns: tiles.Block) -> jax.Array:
    """The tile with -inf in the columns of the labels."""
    if labels.shape[-1] == 1:  # a comparison fuses with its neighbours, a scatter does not
        return jnp.where(columns.columns[None, :] == labels, -jnp.inf, logits)
    position = _positions(labels, columns)
    return jnp.put_along_axis(logits, position, -jnp.inf, axis=-1, inplace=False, mode="drop")


def _add_at_labels(
    tile: jax.Array, values: jax.Array, labels: jax.Array, columns: tiles.Block
) -> jax.Array:
    """The tile plus values [C, K] in the columns of the labels, of equal ones all."""
    if labels.shape[-1] == 1:
        is_label = (columns.columns[None, :] == labels) & columns.valid[None, :]
        return tile + jnp.where(is_label, values, 0.0)
    rows = jnp.arange(tile.shape[0])[:, None]
    return tile.at[rows, _positions(labels, columns)].add(values, mode="drop")


def _forward(
    options: _Options,
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    num_valid: jax.Array | None,
) -> tuple[Outputs, _Residuals]:
    operands = hidden, head, labels, temperature, num_valid
    outputs = _chunked(options, *operands)
    return outputs, _Residuals(*operands, *outputs[1:])


def _backward(
    options: _Options,
    residuals: _Residuals,
    cotangents: Outputs,
) -> tuple[jax.Array, jax.Array, None, None, None]:
    """Gradients of hidden and head; the gradient nobody asks for is dead code to the compiler."""
    head, axis = residuals.head, options.vocab_axis
    hidden = tiles.in_product_type(residuals.hidden, head)
    # Where no column counts the sums are -inf, and so are the logits: their difference is NaN.
    log_sum_exp, rest = (
        jnp.where(x != -jnp.inf, x, 0.0) for x in (residuals.log_sum_exp, residuals.rest)
    )
    per_token = (residuals.labels, log_sum_exp, residuals.entropy, rest, cotangents)

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
    rest: jax.Array,
    cotangents: Outputs,
) -> jax.Array:
    """d log_prob_k = onehot_k - p;  d log_sum_exp = p;  d entropy = -p (log p + entropy);

    d rest = exp(logits - rest) in the columns that are no label.
    """
    to_log_prob, to_log_sum_exp, to_entropy, to_rest = cotangents
    log_p = logits - log_sum_exp[:, None]
    weight = (to_log_sum_exp - jnp.sum(to_log_prob, axis=-1))[:, None]
    if options.with_entropy:
        surprise = jnp.where(columns.valid[None, :], log_p + entropy[:, None], 0.0)
        weight = weight - to_entropy[:, None] * surprise
    gradient = jnp.exp(log_p) * weight
    if options.with_rest:
        others = _without_labels(logits, labels, columns)
        gradient += to_rest[:, None] * jnp.exp(others - rest[:, None])
    return _add_at_labels(gradient, to_log_prob, labels, columns)


_chunked.defvjp(_forward, _backward)
