"""The TPU kernels: a tile of both models' logits lives in VMEM and never leaves it.

Forward: the recurrences of `xla`, tokens outside, vocabulary inside. One sweep gives both
log-sum-exps and for the KLs the value; the other kinds take a second sweep, given both. Backward:
two kernels recompute the tile and the gradient of its raw logits,

    G = cotangent slope (slope_v - q_v sum_u slope_u)             see `kinds`
    hidden's gradient  sum over the vocabulary of G head          vocabulary inside
    head's gradient    sum over the tokens of G^T hidden          tokens inside

so each accumulates in float32 in VMEM and is written once, rounded once. See `pallas_grid` for the
grid. Per-token numbers are columns [tokens, 1].
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import on_tpu, tiles
from jaxdistill.kernels.linear_divergence import kinds
from jaxdistill.kernels.linear_divergence.pallas_grid import Models, Options, Place, call
from jaxdistill.kernels.linear_divergence.pallas_tile import (
    FORWARD,
    HEAD_GRADIENT,
    HIDDEN_GRADIENT,
    SECOND_FORWARD,
    Sweep,
    Tile,
    check,
)
from jaxdistill.kernels.linear_divergence.xla import DIRECTIONS


class _Sums(NamedTuple):
    """What the backward pass needs of the whole vocabulary, [N, 1] each."""

    student: jax.Array  # log-sum-exp
    teacher: jax.Array
    slopes: jax.Array


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

    Raises:
      ImplementationError: an argument the kernels cannot serve.
    """
    operands = student_hidden, student_head, teacher_hidden, teacher_head
    check(operands, vocab_size, (chunk_tokens, chunk_vocab), axis_name)
    shape = student_hidden.shape[:-1]
    soft_caps, chunks = (student_soft_cap, teacher_soft_cap), (chunk_tokens, chunk_vocab)
    interpret = on_tpu.INTERPRET.get()
    options = Options(kind, vocab_size, soft_caps, vocab_axis, chunks, interpret)
    models = Models(
        *tiles.vary_alike(
            student_hidden.reshape(-1, student_hidden.shape[-1]),
            student_head,
            teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
            teacher_head,
            temperature.reshape(1, 1),
            share.reshape(1, 1),
        )
    )
    if not interpret:
        models = models._replace(temperature=on_tpu.require_tpu(models.temperature))
    return _flat(options, models).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flat(options: Options, models: Models) -> jax.Array:
    """Divergence [N, 1]."""
    return _forward(options, models)[0]


def _forward(options: Options, models: Models) -> tuple[jax.Array, tuple[Models, _Sums]]:
    operands = models.in_product_types()

    def scratch(columns: int) -> Any:
        return lambda tile: [*_logits(tile), *_columns(tile, columns)]

    directions = len(DIRECTIONS.get(options.kind, ()))
    student, teacher, *found = call(
        _statistics,
        FORWARD,
        options,
        operands,
        (),
        outputs=4 if directions else 2,
        scratch=scratch(4 + directions),
    )
    if not directions:
        given = options, operands, (student, teacher)
        found = call(_second_sweep, SECOND_FORWARD, *given, outputs=2, scratch=scratch(2))
    divergence, slopes = found
    return divergence, (models, _Sums(student, teacher, slopes))


def _backward(
    options: Options, residuals: tuple[Models, _Sums], cotangent: jax.Array
) -> tuple[Models]:
    """Gradients of the student; the one nobody asks for is dead code to the compiler."""
    original, sums = residuals
    models = original.in_product_types()
    width, dtype = models.student_hidden.shape[1], models.student_hidden.dtype

    def gradient(sweep: Sweep, like: jax.Array) -> jax.Array:
        def scratch(tile: Tile) -> list[Any]:
            part = width // tile.parts
            block = tile.tokens, part
            if sweep is HEAD_GRADIENT:
                block = options.head_block(tile, part)
            of_logits = pltpu.VMEM((tile.tokens, tile.vocab), dtype)
            return [*_logits(tile), of_logits, pltpu.VMEM((tile.parts, *block), jnp.float32)]

        kernel = functools.partial(_gradient, sweep)
        given = options, models, (*sums, cotangent)
        return call(kernel, sweep, *given, outputs=like.dtype, scratch=scratch)[0]

    nothing = jax.tree.map(lambda _: None, models)
    to_hidden = gradient(HIDDEN_GRADIENT, original.student_hidden)
    to_head = gradient(HEAD_GRADIENT, original.student_head)
    return (nothing._replace(student_hidden=to_hidden, student_head=to_head),)


_flat.defvjp(_forward, _backward)


def _logits(tile: Tile) -> list[Any]:
    """Raw logits of the student and the teacher."""
    return [pltpu.VMEM((tile.tokens, tile.vocab), jnp.float32)] * 2


def _columns(tile: Tile, count: int) -> list[Any]:
    return [pltpu.VMEM((tile.tokens, 1), jnp.float32)] * count


def _statistics(
    options: Options,
    place: Place,
    models: Models,
    _per_token: Sequence[Any],
    outputs: Sequence[Any],
    scratch: Sequence[Any],
) -> None:
    """Both log-sum-exps; for the KLs also the divergence and the sum of the slopes."""
    *raw, student_max, student_total, teacher_max, teacher_total = scratch[:6]
    differences = scratch[6:]
    student, teacher = (student_max, student_total), (teacher_max, teacher_total)

    @pl.when(place.first())
    def _() -> None:
        for maximum, total in (student, teacher):
            maximum[...] = jnp.full_like(maximum, tiles.LOWEST)
            total[...] = jnp.zeros_like(total)
        for difference in differences:
            difference[...] = jnp.zeros_like(difference)

    _add_logits(options, place, models, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        q_raw, p_raw, _slope = _scaled(options, models, raw)
        valid = _valid(options, place, q_raw.shape)
        before = student_total[...], teacher_total[...]
        of_student = _absorb(*student, jnp.where(valid, q_raw, -jnp.inf))
        of_teacher = _absorb(*teacher, jnp.where(valid, p_raw, -jnp.inf))
        for forward, difference in zip(DIRECTIONS.get(options.kind, ()), differences, strict=True):
            p_total, p, q = before[forward], of_teacher, of_student
            if not forward:
                p, q = q, p
            terms = jnp.where(valid, jnp.exp(p.centred) * (p.centred - q.centred), 0.0)
            moved = difference[...] + p_total * (p.shift - q.shift)
            difference[...] = jnp.exp(p.shift) * moved + _row_sum(terms)

    @pl.when(place.last())
    def _() -> None:
        for (maximum, total), output in zip((student, teacher), outputs[:2], strict=True):
            output[...] = maximum[...] + jnp.log(total[...])
        if differences:
            totals = student_total[...], teacher_total[...]
            outputs[2][...], outputs[3][...] = _kl(options.kind, *totals, differences)


def _kl(
    kind: str, student_total: jax.Array, teacher_total: jax.Array, differences: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    """Divergence and sum of slopes from A / Z_p - log Z_p + log Z_q of each direction."""
    directions = DIRECTIONS[kind]
    divergence = slopes = jnp.zeros_like(student_total)
    for forward, difference in zip(directions, differences, strict=True):
        p_total, q_total = teacher_total, student_total
        if not forward:
            p_total, q_total = q_total, p_total
        kl = difference[...] / p_total - jnp.log(p_total) + jnp.log(q_total)
        divergence += kl / len(directions)
        slopes += (-jnp.ones_like(kl) if forward else kl) / len(directions)
    return divergence, slopes


def _second_sweep(
    options: Options,
    place: Place,
    models: Models,
    per_token: Sequence[Any],
    outputs: Sequence[Any],
    scratch: Sequence[Any],
) -> None:
    """The sums of the terms and of the slopes, given both log-sum-exps."""
    *raw, divergence, slopes = scratch
    totals = divergence, slopes

    @pl.when(place.first())
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)

    _add_logits(options, place, models, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        student, teacher, _slope = _scaled(options, models, raw)
        log_q, log_p = student - per_token[0][...], teacher - per_token[1][...]
        valid = _valid(options, place, student.shape)
        for total, of in zip(totals, (kinds.terms, kinds.slopes), strict=True):
            found = of(options.kind, log_q, log_p, models.share[...])
            total[...] += _row_sum(jnp.where(valid, found, 0.0))

    @pl.when(place.last())
    def _() -> None:
        for total, output in zip(totals, outputs, strict=True):
            output[...] = total[...]


def _gradient(
    sweep: Sweep,
    options: Options,
    place: Place,
    models: Models,
    per_token: Sequence[Any],
    outputs: Sequence[Any],
    scratch: Sequence[Any],
) -> None:
    """The gradient of the student's hidden states or of its head."""
    *raw, of_logits, accumulated = scratch
    (output,) = outputs

    @pl.when(place.first())
    def _() -> None:
        accumulated[...] = jnp.zeros_like(accumulated)

    _add_logits(options, place, models, raw)

    @pl.when(place.logits_complete())
    def _() -> None:
        gradient = _logits_gradient(options, place, models, per_token, raw)
        of_logits[...] = gradient.astype(of_logits.dtype)

    @pl.when((place.step >= place.tile.parts) | (place.tile.parts == 1))
    def _() -> None:
        part = place.step % place.tile.parts
        accumulated[part] += _product(sweep, options, place, models, of_logits[...])

    @pl.when(place.last())
    def _() -> None:
        by_row = sweep is HIDDEN_GRADIENT or options.vocab_axis == 0
        width = accumulated.shape[2 if by_row else 1]
        for part in range(place.tile.parts):
            here = slice(part * width, (part + 1) * width)
            at = (slice(None), here) if by_row else (here, slice(None))
            output[at] = accumulated[part].astype(output.dtype)


def _product(
    sweep: Sweep, options: Options, place: Place, models: Models, of_logits: jax.Array
) -> jax.Array:
    """The logits' gradient times the part of the student's other operand that is here."""
    axis = options.vocab_axis
    if sweep is HIDDEN_GRADIENT:
        head = models.student_head[...]
        if options.vocab_size % place.tile.vocab:
            # What lies past the columns that count may be NaN, which no zero removes.
            valid = _valid(options, place, head.shape, axis)
            head = jnp.where(valid, head.astype(jnp.float32), 0.0)
        return _dot(of_logits, head.astype(of_logits.dtype), (1, axis))
    hidden = models.student_hidden[...]
    if axis == 0:
        return _dot(of_logits, hidden, (0, 0))
    return _dot(hidden, of_logits, (0, 0))


def _logits_gradient(
    options: Options, place: Place, models: Models, per_token: Sequence[Any], raw: Sequence[Any]
) -> jax.Array:
    """Gradient of the student's raw logits [tokens, vocab], float32, 0 in columns of padding."""
    student, teacher, slope = _scaled(options, models, raw)
    student_sum, teacher_sum, slope_sum, cotangent = (x[...] for x in per_token)
    log_q, log_p = student - student_sum, teacher - teacher_sum
    slopes = kinds.slopes(options.kind, log_q, log_p, models.share[...])
    gradient = slope * cotangent * (slopes - jnp.exp(log_q) * slope_sum)
    return jnp.where(_valid(options, place, gradient.shape), gradient, 0.0)


def _add_logits(options: Options, place: Place, models: Models, raw: Sequence[Any]) -> None:
    """Add this part of the width to the raw logits of both models."""
    operands = models[:2], models[2:4]

    def part(hidden: Any, head: Any) -> jax.Array:
        block = head[...].astype(hidden.dtype)
        return _dot(hidden[...], block, (1, 1 - options.vocab_axis))

    @pl.when(place.step == 0)
    def _() -> None:
        for logits, model in zip(raw, operands, strict=True):
            logits[...] = part(*model)

    if place.tile.parts > 1:

        @pl.when((place.step > 0) & (place.step < place.tile.parts))
        def _() -> None:
            for logits, model in zip(raw, operands, strict=True):
                logits[...] += part(*model)


def _scaled(
    options: Options, models: Models, raw: Sequence[Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Student's and teacher's logits, and the slope of the student's in its raw ones."""
    student, teacher = (
        tiles.scaled(logits[...], models.temperature[...], cap)
        for logits, cap in zip(raw, options.soft_caps, strict=True)
    )
    return student[0], teacher[0], student[1]


def _valid(
    options: Options, place: Place, shape: tuple[int, ...], vocab_axis: int = 1
) -> jax.Array:
    """Which entries of a block belong to columns that count."""
    columns = lax.broadcasted_iota(jnp.int32, shape, vocab_axis)
    return columns < options.vocab_size - place.vocab_block * place.tile.vocab


class _Absorbed(NamedTuple):
    centred: jax.Array  # logits - m
    shift: jax.Array  # m before - m


def _absorb(maximum: Any, total: Any, logits: jax.Array) -> _Absorbed:
    """Take a tile into the running maximum m and the total sum exp(x - m)."""
    before = maximum[...]
    new = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    centred, shift = logits - new, before - new
    maximum[...] = new
    total[...] = total[...] * jnp.exp(shift) + _row_sum(jnp.exp(centred))
    return _Absorbed(centred, shift)


def _row_sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """In float32; float32 operands keep their digits, which by default the unit rounds off."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    )
