"""The grid of the TPU kernels: the sizes of their blocks, and which of them a step works on.

It is static: (rows, key heads, outer blocks, inner steps). Which blocks a block has to do with
comes in as `first` and `last`, in scalar memory before the kernel starts; the steps past `last`
do nothing, and their index maps stay at the last block, so nothing is fetched for them.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import generation, on_tpu, searched_blocks, tiles
from jaxdistill.kernels.attention.problem import Blocking, Bounds, Options, Places
from jaxdistill.kernels.dispatch import ImplementationError

MARGIN_BYTES = 2 * 2**20  # of VMEM, left to the compiler
MAX_ROWS = 1024  # of a tile: queries times the heads that share a key head
MAX_KEYS = 512


class Call(NamedTuple):
    """What the three kernels have in common."""

    options: Options
    blocking: Blocking
    heads: int  # R, that share a key head
    outer_is_query: bool  # which side's block stays while the other side's go by

    def blocks(self) -> tuple[int, int]:
        """How many blocks the outer side has, and the inner."""
        counts = self.blocking.num_query, self.blocking.num_key
        return counts if self.outer_is_query else counts[::-1]


class Step(NamedTuple):
    """Where one step of the grid stands; scalars of the kernel."""

    is_start: jax.Array  # the first of an outer block
    is_end: jax.Array
    is_needed: jax.Array  # whether there is a tile to look at
    query_block: jax.Array
    key_block: jax.Array
    length: jax.Array | None  # how many keys the row has


def plan(options: Options, query: jax.Array, slots: int) -> Blocking:
    """The largest tile that fits VMEM, of query [B, G, R, T, K]; sizes given are taken as given.

    Raises:
      ImplementationError: not even the smallest fits.
    """
    heads, length, width = query.shape[2:]
    max_rows, max_keys = _largest(width, query.dtype.itemsize)
    sizes = [tiles.LANES << x for x in range(4)]
    up_to = max(max_rows // heads, tiles.LANES)
    queries = [x for x in sizes if x <= up_to and x < 2 * length] or sizes[:1]
    keys = [x for x in sizes if x <= max_keys and x < 2 * slots] or sizes[:1]
    pairs = itertools.product(
        [options.block_query] if options.block_query else queries,
        [options.block_key] if options.block_key else keys,
    )
    given = options.block_query and options.block_key
    budget = generation.vmem_limit() - MARGIN_BYTES
    fitting = [
        pair
        for pair in pairs
        if given or vmem_of(heads * pair[0], pair[1], width, query.dtype.itemsize) <= budget
    ]
    if not fitting:
        raise ImplementationError(
            f"implementation 'pallas' of attention must fit {budget} bytes of VMEM, but "
            f"{heads} heads of width {width} to a key head do not: choose 'xla' or 'reference'"
        )
    block_query, block_key = max(fitting, key=lambda pair: (pair[0] * pair[1], pair[1]))
    return Blocking(
        block_query, block_key, -(-length // block_query), -(-slots // block_key), slots
    )


def _largest(width: int, itemsize: int) -> tuple[int, int]:
    """Rows and keys of the tile to take where there is room: what the search found, if it did."""
    target = generation.target()
    known = (target and target.generation) or ""
    return searched_blocks.ATTENTION.get((known, width, itemsize), (MAX_ROWS, MAX_KEYS))


def vmem_of(rows: int, keys: int, width: int, itemsize: int) -> int:
    """Bytes a backward kernel takes: operands and results twice over, sums, tiles of scores.

    A product in float32 splits its operands into three parts of bfloat16.
    """
    width = -(-width // tiles.LANES) * tiles.LANES
    operands = 2 * 2 * itemsize * width * (rows + keys)
    results = (4 + 2 * itemsize) * width * max(rows, 2 * keys)
    exact = itemsize == 4
    parts = 3 * 2 * 2 * width * (rows + keys) if exact else 0
    return operands + results + parts + (6 if exact else 4) * 4 * rows * keys


def _bounds_index(call: Call, bounds: jax.Ref, row: jax.Array, outer: jax.Array) -> jax.Array:
    """Where in [B * blocks], or in [blocks] where all rows are alike, the bounds of a block lie."""
    outer_blocks = call.blocks()[0]
    return outer if bounds.shape[0] == outer_blocks else row * outer_blocks + outer


def _block_of(call: Call, queries: bool) -> Callable:
    """(grid indices, scalars) -> the block of queries, or of keys, that the step works on."""

    def block(row, group, outer, step, first, last, *_):
        if queries == call.outer_is_query:
            return outer
        index = _bounds_index(call, first, row, outer)
        stay = jnp.maximum(jnp.minimum(first[index] + step, last[index]), 0)
        return jnp.minimum(stay, call.blocks()[1] - 1)

    return block


def _spec(call: Call, name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    """The block of an operand or output, by its name and the shape of the whole."""
    blocking = call.blocking
    of_query, of_key = _block_of(call, True), _block_of(call, False)
    if name in ("key", "value"):
        return pl.BlockSpec(
            (None, None, blocking.key, shape[-1]), lambda b, g, *x: (b, g, of_key(b, g, *x), 0)
        )
    if name in ("query", "output", "to_output"):
        return pl.BlockSpec(
            (None, None, call.heads, blocking.query, shape[-1]),
            lambda b, g, *x: (b, g, 0, of_query(b, g, *x), 0),
        )
    if name in ("log_sum_exp", "delta"):
        return pl.BlockSpec(
            (None, None, call.heads, blocking.query),
            lambda b, g, *x: (b, g, 0, of_query(b, g, *x)),
        )
    size, of = (blocking.key, of_key) if name == "key_segments" else (blocking.query, of_query)
    return pl.BlockSpec((None, 1, size), lambda b, g, *x: (b, 0, of(b, g, *x)))


def _step(call: Call, steps: int, first: jax.Ref, last: jax.Ref, lengths: jax.Ref | None) -> Step:
    row, outer, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    index = _bounds_index(call, first, row, outer)
    inner = first[index] + step
    return Step(
        is_start=step == 0,
        is_end=step == steps - 1,
        is_needed=inner <= last[index],
        query_block=outer if call.outer_is_query else inner,
        key_block=inner if call.outer_is_query else outer,
        length=None if lengths is None else lengths[row],
    )


def run(
    kernel: Callable,
    call: Call,
    bounds: Bounds,
    places: Places,
    inputs: dict[str, jax.Array],
    outputs: dict[str, tuple],
    scratch: list[tuple[int, ...]],
) -> list[jax.Array]:
    """Run a kernel over (rows, key heads, outer blocks, inner steps)."""
    given = {
        name: getattr(places, name)[:, None, :]
        for name in ("positions", "query_segments", "key_segments")
        if getattr(places, name) is not None
    }
    inputs = inputs | given
    scalars = [bounds.first.reshape(-1), bounds.last.reshape(-1)]
    scalars += [] if places.lengths is None else [places.lengths]
    like = inputs["query"]
    rows, groups = like.shape[:2]

    def body(*refs: jax.Ref) -> None:
        named = refs[len(scalars) :]
        ends = len(inputs), len(inputs) + len(outputs)
        lengths = None if places.lengths is None else refs[2]
        kernel(
            call,
            _step(call, bounds.steps, refs[0], refs[1], lengths),
            dict(zip(inputs, named[: ends[0]], strict=True)),
            dict(zip(outputs, named[ends[0] : ends[1]], strict=True)),
            named[ends[1] :],
        )

    body.__name__ = f"attention{kernel.__name__}"
    return pl.pallas_call(
        body,
        out_shape=[on_tpu.output(shape, dtype, like) for shape, dtype in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(rows, groups, call.blocks()[0], bounds.steps),
            in_specs=[_spec(call, name, x.shape) for name, x in inputs.items()],
            out_specs=[_spec(call, name, shape) for name, (shape, _) in outputs.items()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=on_tpu.compiler_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=call.options.interpret,
        name=body.__name__,
    )(*scalars, *inputs.values())
