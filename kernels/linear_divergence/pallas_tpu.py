"""The TPU kernels: a tile of both models' logits lives in VMEM and never leaves it.

Forward: the recurrences of `statistics`, tokens outside, vocabulary inside. One sweep gives both
log-sum-exps and for the KLs the value; the other kinds take a second sweep, given both. Backward:
two kernels recompute the tile and the gradient of its raw logits,

    G = cotangent slope (slope_v - q_v sum_u slope_u)             see `kinds`
    hidden's gradient  sum over the vocabulary of G head          vocabulary inside
    head's gradient    sum over the tokens of G^T hidden          tokens inside

so each accumulates in float32 in VMEM and is written once, rounded once. See `head_grid` for the
grid and `head_tile` for the products. Of a head split over devices each sweep's sums are combined
between the kernels.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxdistill.kernels import head_grid, head_tile, tiles
from jaxdistill.kernels.blocks import FORWARD, LANES, SECOND_FORWARD
from jaxdistill.kernels.head_grid import Layout, Operands, Place
from jaxdistill.kernels.linear_divergence import kinds
from jaxdistill.kernels.linear_divergence.statistics import (
    DIRECTIONS,
    Running,
    Sums,
    of_kl,
    over_devices,
    own_columns,
    together,
)
from jaxdistill.kernels.tiles import lane_sum, row_max, row_sum


class _Options(NamedTuple):
    kind: str
    soft_caps: tuple[float | None, float | None]  # student, teacher
    axis_name: str | None
    layout: Layout


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
    """Divergence `[...]`; nothing of size [tokens, vocabulary] leaves VMEM.

    With an axis name the heads are one device's part of a vocabulary of `vocab_size` columns.

    Raises:
      ImplementationError: an argument the kernels cannot serve.
    """
    num_valid = None
    if axis_name is not None:
        num_valid = own_columns(student_head, vocab_axis, vocab_size, axis_name)
        vocab_size = student_head.shape[vocab_axis]
    layout, operands = head_grid.prepare(
        "linear_divergence",
        [(student_hidden, student_head), (teacher_hidden, teacher_head)],
        [temperature, share],
        vocab_size=vocab_size,
        vocab_axis=vocab_axis,
        chunks=(chunk_tokens, chunk_vocab),
        num_valid=num_valid,
    )
    leaves, structure = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(structure, tiles.vary_alike(*leaves))
    soft_caps = student_soft_cap, teacher_soft_cap
    values = _flat(_Options(kind, soft_caps, axis_name, layout), operands)
    return values.reshape(student_hidden.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flat(options: _Options, operands: Operands) -> jax.Array:
    """Divergence [N]."""
    return _forward(options, operands)[0]


def _forward(options: _Options, operands: Operands) -> tuple[jax.Array, tuple[Operands, Sums]]:
    directions = len(DIRECTIONS.get(options.kind, ()))
    found = _sweep(_statistics, FORWARD, options, operands, (), 4 + directions)
    softmaxes = (tiles.OnlineSoftmax(*found[at : at + 2]) for at in (0, 2))
    running = Running(*softmaxes, tuple(found[4:]))
    if options.axis_name is not None:
        running = over_devices(options.kind, running, options.axis_name)
    if directions:
        divergence, sums = of_kl(options.kind, running)
        return divergence, (operands, sums)
    log_sum_exps = running.student.log_sum_exp(), running.teacher.log_sum_exp()
    given = (jnp.stack(log_sum_exps, axis=-1),)
    totals = _sweep(_second_sweep, SECOND_FORWARD, options, operands, given, 2)
    if options.axis_name is not None:
        totals = lax.psum(totals, options.axis_name)
    divergence, slopes = totals
    return divergence, (operands, Sums(*log_sum_exps, slopes))


def _sweep(
    kernel: Any,
    sweep: head_grid.Sweep,
    options: _Options,
    operands: Operands,
    per_token: Sequence[jax.Array],
    count: int,
) -> list[jax.Array]:
    """So many numbers a token, [N] each."""
    body = functools.partial(kernel, options)
    given = sweep, options.layout, operands, per_token
    found = head_tile.statistics(body, *given, running=[LANES] * count, output=count)
    return [found[:, at] for at in range(count)]


def _backward(
    options: _Options, residuals: tuple[Operands, Sums], cotangent: jax.Array
) -> tuple[Operands]:
    """Gradients of the student; the one nobody asks for is dead code to the compiler."""
    operands, sums = residuals
    numbers = jnp.stack([*sums, cotangent], axis=-1)
    logits_gradient = functools.partial(_logits_gradient, options)
    return (head_tile.gradients(logits_gradient, options.layout, operands, (numbers,)),)


_flat.defvjp(_forward, _backward)


def _statistics(
    options: _Options,
    place: Place,
    operands: Operands,
    _per_token: Sequence[Any],
    output: Any,
    raw: Sequence[Any],
    running: Sequence[Any],
) -> None:
    """The members of `statistics.Running`."""
    student, teacher, differences = running[:2], running[2:4], running[4:]

    @pl.when(place.first())
    def _() -> None:
        for maximum, total in (student, teacher):
            maximum[...] = jnp.full_like(maximum, tiles.LOWEST)
            total[...] = jnp.zeros_like(total)
        for difference in differences:
            difference[...] = jnp.zeros_like(difference)

    head_tile.add_logits(place, operands, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        q_raw, p_raw, _slope = _scaled(options, operands, raw)
        valid = _valid(place, operands, q_raw.shape)
        before = student[1][...], teacher[1][...]
        of_student = head_tile.absorb(*student, jnp.where(valid, q_raw, -jnp.inf))
        of_teacher = head_tile.absorb(*teacher, jnp.where(valid, p_raw, -jnp.inf))
        for forward, difference in zip(DIRECTIONS.get(options.kind, ()), differences, strict=True):
            p_total, p, q = before[forward], of_teacher, of_student
            if not forward:
                p, q = q, p
            terms = jnp.where(valid, jnp.exp(p.centred) * (p.centred - q.centred), 0.0)
            moved = difference[...] + p_total * (p.shift - q.shift)
            difference[...] = jnp.exp(p.shift) * moved + lane_sum(terms)

    @pl.when(place.last())
    def _() -> None:
        softmaxes = (tiles.OnlineSoftmax(*(x[...] for x in pair)) for pair in (student, teacher))
        lanes = Running(*softmaxes, tuple(x[...] for x in differences))
        _write(output, jax.tree.leaves(together(options.kind, lanes, row_max, row_sum)))


def _second_sweep(
    options: _Options,
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    output: Any,
    raw: Sequence[Any],
    totals: Sequence[Any],
) -> None:
    """The sums of the terms and of the slopes, given both log-sum-exps."""

    @pl.when(place.first())
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)

    head_tile.add_logits(place, operands, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        student, teacher, _slope = _scaled(options, operands, raw)
        (sums,) = per_token
        log_q, log_p = student - sums[:, 0:1], teacher - sums[:, 1:2]
        valid = _valid(place, operands, student.shape)
        for total, of in zip(totals, (kinds.terms, kinds.slopes), strict=True):
            found = of(options.kind, log_q, log_p, _share(operands))
            total[...] += lane_sum(jnp.where(valid, found, 0.0))

    @pl.when(place.last())
    def _() -> None:
        _write(output, [row_sum(total[...]) for total in totals])


def _write(output: Any, columns: Sequence[jax.Array]) -> None:
    for at, column in enumerate(columns):
        output[:, at : at + 1] = column


def _logits_gradient(
    options: _Options,
    place: Place,
    operands: Operands,
    per_token: Sequence[Any],
    raw: Sequence[Any],
) -> jax.Array:
    """Gradient of the student's raw logits [tokens, vocab], float32, 0 in columns of padding."""
    (numbers,) = per_token
    student, teacher, slope = _scaled(options, operands, raw)
    student_sum, teacher_sum, slope_sum, cotangent = (numbers[:, at : at + 1] for at in range(4))
    log_q, log_p = student - student_sum, teacher - teacher_sum
    slopes = kinds.slopes(options.kind, log_q, log_p, _share(operands))
    gradient = slope * cotangent * (slopes - jnp.exp(log_q) * slope_sum)
    return jnp.where(_valid(place, operands, gradient.shape), gradient, 0.0)


def _scaled(
    options: _Options, operands: Operands, raw: Sequence[Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Student's and teacher's logits, and the slope of the student's in its raw ones."""
    temperature = operands.scalars[0][0, 0]
    student, teacher = (
        tiles.scaled(logits[...], temperature, cap)
        for logits, cap in zip(raw, options.soft_caps, strict=True)
    )
    return student[0], teacher[0], student[1]


def _share(operands: Operands) -> jax.Array:
    """As a vector [1, 1]: of a scalar a TPU takes no logarithm."""
    return jnp.full((1, 1), operands.scalars[1][0, 0])


def _valid(place: Place, operands: Operands, shape: tuple[int, ...]) -> jax.Array:
    """Which entries of a tile belong to columns that count."""
    return place.columns(shape) < place.limit(operands)
