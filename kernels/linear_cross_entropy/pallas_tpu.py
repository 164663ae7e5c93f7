"""The TPU kernels: a tile of logits lives in VMEM and never reaches HBM.

Forward: tokens outside, vocabulary inside; running statistics of a block of tokens stay in VMEM.
Backward: two kernels recompute the tile from the saved log-sum-exp, take the gradient G of its raw
logits and keep one product each,

    hidden's gradient   sum over the vocabulary of G @ head     vocabulary inside
    head's gradient     sum over the tokens of G.T @ hidden     tokens inside

so each gradient is summed in float32 in VMEM and written once, in the type of its operand.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import blocks, on_tpu, tiles
from jaxdistill.kernels.dispatch import ImplementationError

WIDTH_PART = 512  # of a product's result that is in VMEM at a time, beside its accumulator


class _Options(NamedTuple):
    soft_cap: float | None
    with_entropy: bool
    vocab_axis: int
    forward: blocks.Blocks
    hidden_gradient: blocks.Blocks
    head_gradient: blocks.Blocks
    interpret: Any


class _Operands(NamedTuple):
    """What is in HBM: [N, D], a head, labels [N, 1], temperature and how many columns, [1, 1]."""

    hidden: jax.Array
    head: jax.Array
    labels: Any
    temperature: Any
    limit: Any


class _Residuals(NamedTuple):
    operands: _Operands
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
    """Log-prob, log-sum-exp and entropy `[...]`; of [tokens, vocabulary] nothing leaves VMEM."""
    chosen = choose_blocks(hidden, head, labels.size, vocab_size, chunk_tokens, chunk_vocab)
    options = _Options(soft_cap, with_entropy, vocab_axis, *chosen, on_tpu.INTERPRET.get())
    if not options.interpret:
        temperature = on_tpu.require_tpu(temperature)
    if head.shape[1] % blocks.LANES and head.shape[0] % blocks.LANES == 0:
        # XLA lays an array out so that padding to registers is least: this is no copy, but for
        # a kernel it would make one, of the head and of its gradient.
        head, options = head.T, options._replace(vocab_axis=1 - vocab_axis)
    limit = jnp.asarray(vocab_size if num_valid is None else num_valid, jnp.int32)
    shape = labels.shape
    operands = tiles.vary_alike(
        hidden.reshape(labels.size, hidden.shape[-1]),
        head,
        labels.reshape(-1, 1),
        temperature.reshape(1, 1),
        limit.reshape(1, 1),
    )
    outputs = _flat(options, _Operands(*operands))
    log_prob, log_sum_exp, entropy = (x.reshape(shape) for x in outputs)
    return log_prob, log_sum_exp, entropy if with_entropy else None


def choose_blocks(
    hidden: jax.Array,
    head: jax.Array,
    num_tokens: int,
    vocab_size: int,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
) -> tuple[blocks.Blocks, blocks.Blocks, blocks.Blocks]:
    """Blocks of the forward, the hidden's gradient and the head's gradient kernel.

    Raises:
      ImplementationError: a size given is no multiple of what the kernel can hold, or the width is
        too large for VMEM.
    """
    for name, value, multiple in (
        ("chunk_tokens", chunk_tokens, blocks.ROWS),
        ("chunk_vocab", chunk_vocab, blocks.LANES),
    ):
        if value is not None and value % multiple:
            raise ImplementationError(
                f"{name} must be a multiple of {multiple} for implementation 'pallas', but it is "
                f"{value}: 'xla' takes any"
            )
    itemsize = max(hidden.dtype.itemsize, head.dtype.itemsize)

    def planned(sweep: blocks.Sweep) -> blocks.Blocks:
        if chunk_tokens and chunk_vocab:
            return blocks.Blocks(chunk_tokens, chunk_vocab)
        try:
            plan = blocks.plan(num_tokens, vocab_size, (hidden.shape[-1],), itemsize, sweep=sweep)
        except ValueError as error:
            raise ImplementationError(
                f"implementation 'pallas' cannot serve width {hidden.shape[-1]} in {hidden.dtype}: "
                f"{error}; choose 'xla'"
            ) from error
        return blocks.Blocks(chunk_tokens or plan.tokens, chunk_vocab or plan.vocab)

    return planned("forward"), planned("hidden_gradient"), planned("head_gradient")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flat(options: _Options, operands: _Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-prob, log-sum-exp, entropy, [N] each."""
    return _forward(options, operands)[0]


def _forward(
    options: _Options, operands: _Operands
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Residuals]:
    grid = _Grid(options, options.forward, "tokens", operands)
    out = (grid.num_tokens, 3), jnp.dtype(jnp.float32), grid.token_spec(3)
    column = pltpu.VMEM((options.forward.tokens, 1), jnp.float32)
    statistics = grid.call(_forward_kernel, (), out, [column] * 4)
    labels = operands.labels[:, 0]
    label_logit, log_sum_exp, entropy = (statistics[: labels.size, i] for i in range(3))
    exists = (labels >= 0) & (labels < operands.limit[0, 0])
    log_prob = jnp.where(exists, label_logit - log_sum_exp, jnp.nan)
    return (log_prob, log_sum_exp, entropy), _Residuals(operands, log_sum_exp, entropy)


def _backward(
    options: _Options,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[_Operands]:
    """Gradients of hidden and head; the kernel of one nobody asks for is dead code."""
    operands, log_sum_exp, entropy = residuals
    hidden, head, *_ = operands
    to_log_prob, to_log_sum_exp, to_entropy = cotangents
    weight = to_log_sum_exp - to_log_prob
    per_token = jnp.stack([log_sum_exp, entropy, weight, to_log_prob, to_entropy], axis=-1)

    grid = _Grid(options, options.hidden_gradient, "tokens", operands)
    out = grid.hidden.shape, hidden.dtype, grid.token_spec(grid.width)
    total = pltpu.VMEM((grid.sizes.tokens, grid.width), jnp.float32)
    to_hidden = grid.call(_hidden_gradient_kernel, (per_token,), out, [total])

    grid = _Grid(options, options.head_gradient, "vocab", operands)
    total = pltpu.VMEM(grid.head_block, jnp.float32)
    out = head.shape, head.dtype, grid.head_spec()
    to_head = grid.call(_head_gradient_kernel, (per_token,), out, [total])
    return (_Operands(to_hidden[: hidden.shape[0]], to_head, None, None, None),)


_flat.defvjp(_forward, _backward)


class _Grid:
    """Blocks of tokens and of columns, the one named `outer` outside, and the kernel over them."""

    def __init__(
        self, options: _Options, sizes: blocks.Blocks, outer: str, operands: _Operands
    ) -> None:
        hidden = tiles.in_product_type(operands.hidden, operands.head)
        self.options, self.sizes, self.operands = options, sizes, operands
        self.hidden = on_tpu.pad_rows(hidden, sizes.tokens)
        self.num_tokens, self.width = self.hidden.shape
        token_blocks = self.num_tokens // sizes.tokens
        vocab_blocks = pl.cdiv(operands.head.shape[options.vocab_axis], sizes.vocab)
        self.vocab_at = 1 if outer == "tokens" else 0
        self.shape = (token_blocks, vocab_blocks)[:: 1 if outer == "tokens" else -1]
        self.head_block = (sizes.vocab, self.width)[:: 1 if options.vocab_axis == 0 else -1]

    def token_spec(self, lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.sizes.tokens, lanes), lambda *at: (at[1 - self.vocab_at], 0))

    def head_spec(self) -> pl.BlockSpec:
        def index(*at: Any) -> tuple:
            block = at[self.vocab_at]
            return (block, 0) if self.options.vocab_axis == 0 else (0, block)

        return pl.BlockSpec(self.head_block, index)

    def call(
        self,
        kernel: Callable[..., None],
        per_token: tuple[jax.Array, ...],
        out: tuple[tuple[int, ...], jnp.dtype, pl.BlockSpec],
        scratch: list,
    ) -> jax.Array:
        """The output (shape, type, spec) of the kernel, which takes also `per_token` [N, K]."""
        scalar, (shape, dtype, spec) = pl.BlockSpec(memory_space=pltpu.SMEM), out
        _, head, labels, temperature, limit = self.operands
        labels, *others = (on_tpu.pad_rows(x, self.sizes.tokens) for x in (labels, *per_token))
        inputs = temperature, limit, labels, self.hidden, head, *others
        specs = [self.token_spec(x.shape[1]) for x in (labels, self.hidden, *others)]
        specs.insert(2, self.head_spec())

        def body(*refs: Any) -> None:
            inner = pl.program_id(1)
            last = inner == pl.num_programs(1) - 1
            at = _At(pl.program_id(self.vocab_at), inner == 0, last)
            kernel(self.options, at, _Inputs(*refs[: len(inputs)]), *refs[len(inputs) :])

        return pl.pallas_call(
            body,
            out_shape=on_tpu.output(shape, dtype, self.hidden),
            grid=self.shape,
            in_specs=[scalar, scalar, *specs],
            out_specs=spec,
            scratch_shapes=scratch,
            compiler_params=on_tpu.compiler_params("parallel", "arbitrary"),
            interpret=self.options.interpret,
            name=kernel.__name__.strip("_"),
        )(*inputs)


class _Inputs(NamedTuple):
    """What a kernel reads: temperature and the number of columns [1, 1], then its blocks."""

    temperature: Any
    limit: Any
    labels: Any  # [tokens, 1]
    hidden: Any  # [tokens, D]
    head: Any  # [vocab, D] or [D, vocab]
    per_token: Any = None  # [tokens, 5], see `_raw_gradient`


class _At(NamedTuple):
    """Where the grid is: the block of the vocabulary, and whether the inner loop begins or ends."""

    vocab: Any
    first: Any
    last: Any


class _Tile(NamedTuple):
    """Logits [tokens, vocab], their slope in the raw logits, their columns, and which count."""

    logits: jax.Array
    slope: jax.Array
    columns: jax.Array
    valid: jax.Array


def _tile(options: _Options, at: _At, refs: _Inputs) -> _Tile:
    """The tile at this step of the grid; columns from `limit` on hold anything."""
    block = refs.head[...].astype(refs.hidden.dtype)
    raw = tiles.project(refs.hidden[...], block, options.vocab_axis)
    columns = at.vocab * raw.shape[1] + lax.broadcasted_iota(jnp.int32, raw.shape, 1)
    logits, slope = tiles.scaled(raw, refs.temperature[0, 0], options.soft_cap)
    return _Tile(logits, slope, columns, columns < refs.limit[0, 0])


def _forward_kernel(
    options: _Options,
    at: _At,
    refs: _Inputs,
    statistics: Any,
    maximum: Any,
    total: Any,
    moment: Any,
    label_logit: Any,
) -> None:
    """m' = max(m, x);  total and moment = sum e^(x - m) (x - m) move along with m."""

    @pl.when(at.first)
    def start() -> None:
        maximum[...] = jnp.full_like(maximum, tiles.LOWEST)
        for zero in (total, moment, label_logit):
            zero[...] = jnp.zeros_like(zero)

    tile = _tile(options, at, refs)
    logits = jnp.where(tile.valid, tile.logits, -jnp.inf)
    new = jnp.maximum(maximum[...], _row_max(logits))
    shift, centred = maximum[...] - new, logits - new
    decay, terms = jnp.exp(shift), jnp.exp(centred)
    if options.with_entropy:
        moments = jnp.where(tile.valid, terms * centred, 0.0)
        moment[...] = decay * (moment[...] + total[...] * shift) + _row_sum(moments)
    total[...] = decay * total[...] + _row_sum(terms)
    maximum[...] = new
    is_label = tile.valid & (tile.columns == refs.labels[...])
    label_logit[...] += _row_sum(jnp.where(is_label, logits, 0.0))

    @pl.when(at.last)
    def finish() -> None:
        log_total = jnp.log(total[...])
        entropy = jnp.where(total[...] != 0, log_total - moment[...] / total[...], 0.0)
        statistics[:, 0:1] = label_logit[...]
        statistics[:, 1:2] = maximum[...] + log_total
        statistics[:, 2:3] = entropy


def _row_max(values: jax.Array) -> jax.Array:
    return jnp.max(values, axis=1, keepdims=True)


def _row_sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=1, keepdims=True)


def _raw_gradient(options: _Options, tile: _Tile, refs: _Inputs) -> jax.Array:
    """d log_prob = onehot - p;  d log_sum_exp = p;  d entropy = -p (log p + entropy)."""
    log_sum_exp, entropy, weight, to_log_prob, to_entropy = (
        refs.per_token[:, i : i + 1] for i in range(5)
    )
    log_p = jnp.where(tile.valid, tile.logits - log_sum_exp, -jnp.inf)
    if options.with_entropy:
        weight = weight - to_entropy * jnp.where(tile.valid, log_p + entropy, 0.0)
    label = jnp.where(tile.columns == refs.labels[...], to_log_prob, 0.0)
    return jnp.where(tile.valid, tile.slope * (jnp.exp(log_p) * weight + label), 0.0)


def _hidden_gradient_kernel(
    options: _Options, at: _At, refs: _Inputs, gradient: Any, total: Any
) -> None:
    """total += G @ head. Columns that do not count may hold NaN, so the head loses them too."""
    axis = options.vocab_axis

    @pl.when(at.first)
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    tile = _tile(options, at, refs)
    raw = _raw_gradient(options, tile, refs)
    counting = refs.limit[0, 0] - at.vocab * raw.shape[1]

    def add(masked: bool) -> None:
        for part in _parts(refs.hidden.shape[1]):
            columns = refs.head[:, part] if axis == 0 else refs.head[part, :]
            columns = columns.astype(refs.hidden.dtype)
            if masked:
                index = lax.broadcasted_iota(jnp.int32, columns.shape, axis)
                columns = jnp.where(index < counting, columns, jnp.zeros_like(columns))
            total[:, part] += tiles.hidden_gradient(raw, columns, axis)

    pl.when(counting >= raw.shape[1])(functools.partial(add, False))
    pl.when((counting > 0) & (counting < raw.shape[1]))(functools.partial(add, True))

    @pl.when(at.last)
    def finish() -> None:
        gradient[...] = total[...].astype(gradient.dtype)


def _head_gradient_kernel(
    options: _Options, at: _At, refs: _Inputs, gradient: Any, total: Any
) -> None:
    """total += G.T @ hidden, which is zeros in columns that do not count."""

    @pl.when(at.first)
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    tile = _tile(options, at, refs)
    raw = _raw_gradient(options, tile, refs)
    for part in _parts(refs.hidden.shape[1]):
        to_block = (slice(None), part) if options.vocab_axis == 0 else (part, slice(None))
        total[to_block] += tiles.head_gradient(raw, refs.hidden[:, part], options.vocab_axis)

    @pl.when(at.last)
    def finish() -> None:
        gradient[...] = total[...].astype(gradient.dtype)


def _parts(width: int) -> Iterator[slice]:
    """The width in parts of WIDTH_PART and what is left."""
    return (slice(x, min(x + WIDTH_PART, width)) for x in range(0, width, WIDTH_PART))
