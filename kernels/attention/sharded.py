"""Attention over devices: rows and heads apart, and sequences in a ring."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxdistill.kernels import on_tpu, tiles
from jaxdistill.kernels.attention.api import attention

Axes = str | tuple[str, ...] | None


def attention_sharded(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    rows: Axes = None,
    heads: Axes = None,
    sequence: str | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    **options: Any,
) -> Any:
    """`attention` with each device at work on its own rows, heads and part of the sequence.

    XLA cannot split a TPU kernel over devices: this does, with shard_map.

    Args:
      query: `[B, T, H, K]`. key, value: `[B, T, G, K]`, or any S where `sequence` is None.
      mesh: with the axes named next, of type Auto (the operands of an Explicit one must already be
        split so); over its other axes all devices do the same.
      rows, heads: axes over which B, and H and G, are split.
      sequence: axis over which T is split, see `attention_ring`.
      segment_ids: integers `[B, T]`. lengths: integers `[B]`.
      options: the other arguments of `attention`, but neither positions nor key_segment_ids.

    Returns:
      As `attention`, split as query is.

    Raises:
      ValueError: as `attention`, or a size that its axes do not divide.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import attention_sharded
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "data")  # of type Auto
      >>> x = np.ones((2, 3, 1, 2), np.float32)
      >>> print(attention_sharded(x, x, x, mesh=mesh, rows="data").shape)
      (2, 3, 1, 2)
    """
    by_row: dict[str, jax.Array] = {}
    specs = {"segment_ids": PartitionSpec(rows, sequence), "lengths": PartitionSpec(rows)}
    for name, array in (("segment_ids", segment_ids), ("lengths", lengths)):
        if array is not None:
            by_row[name] = array
    for name, size, axes in (
        ("query's rows", query.shape[0], rows),
        ("query's length", query.shape[1], sequence),
        ("query's heads", query.shape[2], heads),
        ("key's heads", key.shape[2], heads),
    ):
        devices = _size(mesh, axes)
        if size % devices:
            raise ValueError(
                f"{name} must be a multiple of the {devices} devices of axis {axes!r}, "
                f"but they are {size}"
            )

    def local(query: jax.Array, key: jax.Array, value: jax.Array, by_row: dict) -> Any:
        if sequence is None:
            return attention(query, key, value, **by_row, **options)
        return attention_ring(query, key, value, axis_name=sequence, **by_row, **options)

    operand = PartitionSpec(rows, sequence, heads, None)
    sums = PartitionSpec(rows, sequence, heads)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(operand, operand, operand, {name: specs[name] for name in by_row}),
        out_specs=(operand, sums) if options.get("with_log_sum_exp") else operand,
        # The interpreter of kernels knows nothing of values that vary over devices.
        check_vma=not on_tpu.INTERPRET.get(),
    )(query, key, value, by_row)


def attention_ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: str,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    with_log_sum_exp: bool = False,
    **options: Any,
) -> Any:
    """`attention` of a sequence split over a mesh axis; to be called inside shard_map.

    Keys and values go round; after n steps each device's queries have met all of them:

        output = sum_j exp(log_sum_exp_j - log_sum_exp) output_j,  j the device the keys came from

    A part in the future of all queries costs its transport alone. The backward pass keeps the
    parts that came by, so a device holds the keys and values of a whole row.

    Args:
      query: `[B, T / n, H, K]`. key, value: `[B, T / n, G, K]`, the device's part, in order.
      axis_name: the mesh axis, of n devices.
      segment_ids: integers `[B, T / n]`. lengths: integers `[B]`, counted over the whole row.
      with_log_sum_exp, options: as of `attention`, but neither positions nor key_segment_ids.

    Returns:
      output `[B, T / n, H, K]`; with_log_sum_exp also `[B, T / n, H]`.

    Raises:
      ValueError, ImplementationError: as `attention`.

    Source: arXiv 2310.01889.

    Example:
      >>> import functools
      >>> import numpy as np
      >>> from jaxdistill.kernels import attention_ring
      >>> mesh, x = jax.sharding.Mesh(jax.devices()[:1], "sequence"), np.ones((1, 4, 1, 2), "f4")
      >>> part = PartitionSpec(None, "sequence")
      >>> ring = functools.partial(attention_ring, axis_name="sequence")
      >>> print(jax.shard_map(ring, mesh=mesh, in_specs=(part,) * 3, out_specs=part)(x, x, x).shape)
      (1, 4, 1, 2)
    """
    devices, here = lax.axis_size(axis_name), lax.axis_index(axis_name)
    part = query.shape[1]
    index = jnp.broadcast_to(jnp.arange(part)[None], query.shape[:2])
    round_the_ring = [(device, (device + 1) % devices) for device in range(devices)]

    def meet(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        going, running = carry
        key, value, key_segment_ids = going
        start = (here - step) % devices * part
        output, sums = attention(
            query,
            key,
            value,
            positions=index + here * part - start,
            segment_ids=segment_ids,
            key_segment_ids=key_segment_ids,
            lengths=None if lengths is None else lengths - start,
            with_log_sum_exp=True,
            **options,
        )
        going = jax.tree.map(lambda x: lax.ppermute(x, axis_name, round_the_ring), going)
        return (going, _merge(running, output.astype(jnp.float32), sums)), None

    query, key, value, index, *rest = tiles.vary_alike(
        query, key, value, index + here * 0, *(() if segment_ids is None else (segment_ids,))
    )
    segment_ids = rest[0] if rest else None
    zeros = jnp.zeros_like(query, dtype=jnp.float32)
    start = ((key, value, segment_ids), (zeros[..., 0] - jnp.inf, zeros[..., 0], zeros))
    (_, (maximum, total, output)), _ = lax.scan(meet, start, jnp.arange(devices))
    empty = total == 0
    positive = jnp.where(empty, 1.0, total)
    output = (output / positive[..., None]).astype(query.dtype)
    if not with_log_sum_exp:
        return output
    return output, jnp.where(empty, -jnp.inf, maximum + jnp.log(positive))


def _merge(running: tuple, output: jax.Array, sums: jax.Array) -> tuple:
    """Maximum, total and output of the parts met so far, with one more.

    The maximum cancels, so no gradient flows through it.
    """
    before, total, summed = running
    maximum = lax.stop_gradient(jnp.maximum(before, sums))
    finite = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    shrink, weight = jnp.exp(before - finite), jnp.exp(sums - finite)
    merged = summed * shrink[..., None] + output * weight[..., None]
    return maximum, total * shrink + weight, merged


def _size(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)
