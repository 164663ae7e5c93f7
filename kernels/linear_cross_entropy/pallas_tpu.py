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
from jaxdistill.kernels.blocks import FORWARD, LANES
from jaxdistill.kernels.head_grid import Layout, Operands, Place
from jaxdistill.kernels.linear_cross_entropy import pallas_labels
from jaxdistill.kernels.tiles import lane_sum, row_max, row_sum

Outputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class _Options(NamedTuple):
    soft_cap: float | None
    with_entropy: bool
    with_rest: bool
    layout: Layout


class _Residuals(NamedTuple):
    operands: Operands
    labels: jax.Array
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

    Of [tokens, vocabulary] nothing leaves VMEM.

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
        labels=labels.shape[-1],
    )
    in_order, order = labels.reshape(-1, labels.shape[-1]), None
    if labels.shape[-1] > 1:
        order = jnp.argsort(in_order, axis=-1)
        in_order = jnp.take_along_axis(in_order, order, axis=-1)
    leaves, structure = jax.tree.flatten((operands, in_order))
    operands, in_order = jax.tree.unflatten(structure, tiles.vary_alike(*leaves))
    options = _Options(soft_cap, with_entropy, with_rest, layout)
    log_prob, *sums = _flat(options, operands, in_order)
    if order is not None:
        log_prob = jnp.take_along_axis(log_prob, jnp.argsort(order, axis=-1), axis=-1)
    log_sum_exp, entropy, rest = (x.reshape(labels.shape[:-1]) for x in sums)
    wanted = entropy if with_entropy else None, rest if with_rest else None
    return log_prob.reshape(labels.shape), log_sum_exp, *wanted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flat(options: _Options, operands: Operands, labels: jax.Array) -> Outputs:
    """Sorted labels [N, K] -> log-prob [N, K]; log-sum-exp, entropy, that of the rest, [N] each."""
    return _forward(options, operands, labels)[0]


def _forward(
    options: _Options, operands: Operands, labels: jax.Array
) -> tuple[Outputs, _Residuals]:
    num_labels = labels.shape[1]
    statistics = head_tile.statistics(
        functools.partial(_statistics, options),
        FORWARD,
        options.layout,
        operands,
        (labels,),
        running=[LANES] * 5 + [LANES if num_labels == 1 else num_labels],
        output=3 + num_labels,
    )
    log_sum_exp, entropy, rest = (statistics[:, i] for i in range(3))
    exists = (labels >= 0) & (labels < operands.limit)
    log_prob = jnp.where(exists, statistics[:, 3:] - log_sum_exp[:, None], jnp.nan)
    outputs = log_prob, log_sum_exp, entropy, rest
    return outputs, _Residuals(operands, labels, *outputs[1:])


def _backward(
    options: _Options, residuals: _Residuals, cotangents: Outputs
) -> tuple[Operands, None]:
    """Gradients of hidden and head; the kernel of one nobody asks for is dead code."""
    operands, labels, log_sum_exp, entropy, rest = residuals
    to_log_prob, to_log_sum_exp, to_entropy, to_rest = cotangents
    weight = to_log_sum_exp - jnp.sum(to_log_prob, axis=-1)
    # Where no column is left the logits are -inf as their sum is: the difference would be NaN.
    rest = jnp.where(rest != -jnp.inf, rest, 0.0)
    numbers = jnp.stack([log_sum_exp, entropy, rest, weight, to_entropy, to_rest], axis=-1)
    return head_tile.gradients(
        functools.partial(_logits_gradient, options),
        options.layout,
        operands,
        (labels, to_log_prob, numbers),
    ), None


_flat.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """Logits [tokens, vocab], their slope in the raw logits, their columns, and which count."""

    logits: jax.Array
    slope: jax.Array
    columns: jax.Array
    valid: jax.Array


def _tile(options: _Options, place: Place, operands: Operands, raw: Any) -> _Tile:
    """The tile at this place; the logits of columns that do not count are -inf."""
    (temperature,) = operands.scalars
    logits, slope = tiles.scaled(raw[...], temperature[0, 0], options.soft_cap)
    columns = place.columns(logits.shape)
    valid = columns < place.limit(operands)
    return _Tile(jnp.where(valid, logits, -jnp.inf), slope, columns, valid)


def _statistics(
    options: _Options,
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    output: Any,
    raw: Sequence[Any],
    running: Sequence[Any],
) -> None:
    """The log-sum-exp, the entropy, the log-sum-exp of the rest, and the labels' logits.

    m' = max(m, x);  total and moment = sum e^(x - m) (x - m) move along with m.
    """
    maximum, total, moment, rest_maximum, rest_total, picked = running

    @pl.when(place.first())
    def _() -> None:
        for lowest in (maximum, rest_maximum):
            lowest[...] = jnp.full_like(lowest, tiles.LOWEST)
        for zero in (total, moment, rest_total, picked):
            zero[...] = jnp.zeros_like(zero)

    head_tile.add_logits(place, operands, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        tile = _tile(options, place, operands, raw[0])
        before = total[...]
        absorbed = head_tile.absorb(maximum, total, tile.logits)
        if options.with_entropy:
            terms = jnp.exp(absorbed.centred) * absorbed.centred
            moved = moment[...] + before * absorbed.shift
            terms = jnp.where(tile.valid, terms, 0.0)
            moment[...] = jnp.exp(absorbed.shift) * moved + lane_sum(terms)
        _pick(place, tile, per_token[0], picked, raw[0] if options.with_rest else None)
        if options.with_rest:
            head_tile.absorb(rest_maximum, rest_total, raw[0][...])

    @pl.when(place.last())
    def _() -> None:
        softmax, shift = _of_lanes(maximum, total)
        moments = row_sum(jnp.exp(shift) * (moment[...] + total[...] * shift))
        every = softmax.total
        output[:, 0:1] = softmax.log_sum_exp()
        output[:, 1:2] = jnp.where(every != 0, jnp.log(every) - moments / every, 0.0)
        output[:, 2:3] = _of_lanes(rest_maximum, rest_total)[0].log_sum_exp()
        several = per_token[0].shape[1] > 1
        output[:, 3:] = picked[...] if several else row_sum(picked[...])


def _of_lanes(maximum: Any, total: Any) -> tuple[tiles.OnlineSoftmax, jax.Array]:
    return tiles.joined(tiles.OnlineSoftmax(maximum[...], total[...]), row_max, row_sum)


def _pick(place: Place, tile: _Tile, labels: Any, picked: Any, rest: Any) -> None:
    """Add the logits of the labels in this tile to `picked`, and write the others to `rest`."""
    if labels.shape[1] == 1:
        hit = tile.columns == labels[...]
        picked[...] += lane_sum(jnp.where(hit, tile.logits, 0.0))
        if rest is not None:
            rest[...] = jnp.where(hit, -jnp.inf, tile.logits)
        return
    if rest is not None:
        rest[...] = tile.logits

    def pick(_: None, hit: jax.Array, at: jax.Array) -> None:
        value = row_sum(jnp.where(hit, tile.logits, 0.0))
        picked[...] += jnp.where(at, value, 0.0)
        if rest is not None:
            rest[...] = jnp.where(hit, -jnp.inf, rest[...])

    pallas_labels.for_each(place, labels, tile.columns, pick, None)


def _logits_gradient(
    options: _Options,
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    raw: Sequence[Any],
) -> jax.Array:
    """d log_prob_k = onehot_k - p;  d log_sum_exp = p;  d entropy = -p (log p + entropy);

    d rest = exp(logits - rest) in the columns that are no label.
    """
    labels, to_log_prob, numbers = per_token
    log_sum_exp, entropy, rest, weight, to_entropy, to_rest = (
        numbers[:, i : i + 1] for i in range(6)
    )
    tile = _tile(options, place, operands, raw[0])
    log_p = jnp.where(tile.valid, tile.logits - log_sum_exp, -jnp.inf)
    if options.with_entropy:
        weight = weight - to_entropy * jnp.where(tile.valid, log_p + entropy, 0.0)
    gradient = jnp.exp(log_p) * weight
    others = raw[0] if options.with_rest else None
    gradient += _of_labels(place, tile, labels, to_log_prob, others)
    if others is not None:
        gradient += to_rest * jnp.exp(others[...] - rest)
    return jnp.where(tile.valid, tile.slope * gradient, 0.0)


def _of_labels(place: Place, tile: _Tile, labels: Any, to_log_prob: Any, others: Any) -> jax.Array:
    """Cotangents of the labels in their columns; `others` becomes the logits of all the rest."""
    if labels.shape[1] == 1:
        hit = tile.columns == labels[...]
        if others is not None:
            others[...] = jnp.where(hit, -jnp.inf, tile.logits)
        return jnp.where(hit, to_log_prob[...], 0.0)
    if others is not None:
        others[...] = tile.logits

    def add(gradient: jax.Array, hit: jax.Array, at: jax.Array) -> jax.Array:
        if others is not None:
            others[...] = jnp.where(hit, -jnp.inf, others[...])
        value = row_sum(jnp.where(at, to_log_prob[...], 0.0))
        return gradient + jnp.where(hit, value, 0.0)

    return pallas_labels.for_each(place, labels, tile.columns, add, jnp.zeros_like(tile.logits))
