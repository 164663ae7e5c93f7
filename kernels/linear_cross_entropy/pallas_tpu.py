"""The TPU kernels: a tile of logits lives in VMEM and never reaches HBM.

Forward: tokens outside, vocabulary inside; running statistics of a block of tokens stay in VMEM.
Backward: two kernels recompute the tile from the saved log-sum-exp, take the gradient G of its raw
logits and keep one product each,

    hidden's gradient   sum over the vocabulary of G @ head     vocabulary inside
    head's gradient     sum over the tokens of G.T @ hidden     tokens inside

so each gradient is summed in float32 in VMEM and written once, in the type of its operand. See
`head_grid` for the grid and `head_tile` for the products.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxdistill.kernels import head_grid, head_tile, tiles
from jaxdistill.kernels.blocks import FORWARD
from jaxdistill.kernels.head_grid import Layout, Operands, Place
from jaxdistill.kernels.head_tile import lane_max, lane_sum, row_max, row_sum, spread

Outputs = tuple[jax.Array, jax.Array, jax.Array]


class _Options(NamedTuple):
    soft_cap: float | None
    with_entropy: bool
    layout: Layout


class _Residuals(NamedTuple):
    operands: Operands
    labels: jax.Array
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
    """Log-prob, log-sum-exp and entropy `[...]`; of [tokens, vocabulary] nothing leaves VMEM.

    Raises:
      ImplementationError: an argument the kernels cannot serve.
    """
    layout, operands = head_grid.prepare(
        "linear_cross_entropy",
        [(hidden, head)],
        [temperature],
        vocab_size=vocab_size,
        vocab_axis=vocab_axis,
        chunks=(chunk_tokens, chunk_vocab),
        num_valid=num_valid,
    )
    leaves, structure = jax.tree.flatten((operands, labels.reshape(-1, 1)))
    operands, column = jax.tree.unflatten(structure, tiles.vary_alike(*leaves))
    outputs = _flat(_Options(soft_cap, with_entropy, layout), operands, column)
    log_prob, log_sum_exp, entropy = (x.reshape(labels.shape) for x in outputs)
    return log_prob, log_sum_exp, entropy if with_entropy else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flat(options: _Options, operands: Operands, labels: jax.Array) -> Outputs:
    """Labels [N, 1] -> log-prob, log-sum-exp, entropy, [N] each."""
    return _forward(options, operands, labels)[0]


def _forward(
    options: _Options, operands: Operands, labels: jax.Array
) -> tuple[Outputs, _Residuals]:
    statistics = head_tile.statistics(
        functools.partial(_statistics, options),
        FORWARD,
        options.layout,
        operands,
        (labels,),
        running=4,
        output=3,
    )
    label_logit, log_sum_exp, entropy = (statistics[:, i] for i in range(3))
    exists = (labels >= 0) & (labels < operands.limit)
    log_prob = jnp.where(exists[:, 0], label_logit - log_sum_exp, jnp.nan)
    return (log_prob, log_sum_exp, entropy), _Residuals(operands, labels, log_sum_exp, entropy)


def _backward(
    options: _Options, residuals: _Residuals, cotangents: Outputs
) -> tuple[Operands, None]:
    """Gradients of hidden and head; the kernel of one nobody asks for is dead code."""
    operands, labels, log_sum_exp, entropy = residuals
    to_log_prob, to_log_sum_exp, to_entropy = cotangents
    weight = to_log_sum_exp - to_log_prob
    numbers = jnp.stack([log_sum_exp, entropy, weight, to_log_prob, to_entropy], axis=-1)
    logits_gradient = functools.partial(_logits_gradient, options)
    return head_tile.gradients(logits_gradient, options.layout, operands, (labels, numbers)), None


_flat.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """Logits [tokens, vocab], their slope in the raw logits, their columns, and which count."""

    logits: jax.Array
    slope: jax.Array
    columns: jax.Array
    valid: jax.Array


def _tile(options: _Options, place: Place, operands: Operands, raw: Any) -> _Tile:
    """The tile at this place; columns that do not count hold anything."""
    (temperature,) = operands.scalars
    logits, slope = tiles.scaled(raw[...], temperature[0, 0], options.soft_cap)
    columns = place.columns(logits.shape)
    return _Tile(logits, slope, columns, columns < place.limit(operands))


def _statistics(
    options: _Options,
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    output: Any,
    raw: Sequence[Any],
    running: Sequence[Any],
) -> None:
    """The label's logit, the log-sum-exp and the entropy.

    m' = max(m, x);  total and moment = sum e^(x - m) (x - m) move along with m.
    """
    maximum, total, moment, label_logit = running

    @pl.when(place.first())
    def _() -> None:
        maximum[...] = jnp.full_like(maximum, tiles.LOWEST)
        for zero in (total, moment, label_logit):
            zero[...] = jnp.zeros_like(zero)

    head_tile.add_logits(place, operands, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        tile = _tile(options, place, operands, raw[0])
        logits = jnp.where(tile.valid, tile.logits, -jnp.inf)
        new = jnp.maximum(maximum[...], lane_max(logits))
        shift, centred = maximum[...] - new, logits - spread(new, logits.shape[1])
        decay, terms = jnp.exp(shift), jnp.exp(centred)
        if options.with_entropy:
            moments = jnp.where(tile.valid, terms * centred, 0.0)
            moment[...] = decay * (moment[...] + total[...] * shift) + lane_sum(moments)
        total[...] = decay * total[...] + lane_sum(terms)
        maximum[...] = new
        is_label = tile.valid & (tile.columns == per_token[0][...])
        label_logit[...] += lane_sum(jnp.where(is_label, logits, 0.0))

    @pl.when(place.last())
    def _() -> None:
        largest = row_max(maximum[...])
        shift = maximum[...] - largest
        decay = jnp.exp(shift)
        every = row_sum(decay * total[...])
        moments = row_sum(decay * (moment[...] + total[...] * shift))
        output[:, 0:1] = row_sum(label_logit[...])
        output[:, 1:2] = largest + jnp.log(every)
        output[:, 2:3] = jnp.where(every != 0, jnp.log(every) - moments / every, 0.0)


def _logits_gradient(
    options: _Options,
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    raw: Sequence[Any],
) -> jax.Array:
    """d log_prob = onehot - p;  d log_sum_exp = p;  d entropy = -p (log p + entropy)."""
    labels, numbers = per_token
    log_sum_exp, entropy, weight, to_log_prob, to_entropy = (
        numbers[:, i : i + 1] for i in range(5)
    )
    tile = _tile(options, place, operands, raw[0])
    log_p = jnp.where(tile.valid, tile.logits - log_sum_exp, -jnp.inf)
    if options.with_entropy:
        weight = weight - to_entropy * jnp.where(tile.valid, log_p + entropy, 0.0)
    label = jnp.where(tile.columns == labels[...], to_log_prob, 0.0)
    return jnp.where(tile.valid, tile.slope * (jnp.exp(log_p) * weight + label), 0.0)
