"""Devices as a mesh of five named axes, and the table that lays parameters out on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill import config as configs

AXES = ("replica", "fsdp", "sequence", "tensor", "expert")

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis name -> the mesh axes it is cut over, none to keep it whole."""

RULES: Rules = {
    "batch": ("replica", "fsdp"),
    "length": ("sequence",),
    "layers": (),
    "vocab": ("tensor",),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
}


def make_mesh(
    *,
    replica: int = 1,
    fsdp: int = -1,
    sequence: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes replica, fsdp, sequence, tensor and expert, in this order.

    All axes are of type Auto: the compiler propagates shardings from arguments and constraints.
    It is said on purpose, since the default of `jax.make_mesh` (Explicit) makes them part of
    array types, which single-device code does not expect.

    Args:
        replica, fsdp, sequence, tensor, expert: axis sizes; one of them may be -1, which takes
            the devices that the others leave.
        devices: all devices if None.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.

    >>> make_mesh(devices=jax.devices()[:1]).shape["fsdp"]
    1
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (replica, fsdp, sequence, tensor, expert), strict=True))
    wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    free = [name for name, size in sizes.items() if size == -1]
    if wrong or len(free) > 1:
        given = ", ".join(wrong) or ", ".join(f"{name}=-1" for name in free)
        raise ValueError(f"axis sizes must be at least 1, or -1 for one of them; got {given}")
    product = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % product == 0:
        sizes[free[0]] = len(devices) // product
    elif product != len(devices):
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise ValueError(
            f"axis sizes multiply to {product} but there are {len(devices)} devices ({wanted}); "
            "change them so that the product is the number of devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def sharding(
    logical_axes: Sequence[str], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES
) -> NamedSharding:
    """How an array with these logical axes lies on the mesh.

    Args:
        logical_axes: one name an axis, as ("vocab", "width").
        shape: of the array.
        mesh: of `make_mesh`.
        rules: the table from logical to mesh axes.

    Raises:
        ValueError: an unknown name, a name too many or too few, or a size that does not divide.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> tuple(sharding(("vocab", "width"), (32, 8), mesh).spec)
    ('tensor', 'fsdp')
    """
    if len(logical_axes) != len(shape):
        raise ValueError(f"axis names {tuple(logical_axes)} do not fit the shape {tuple(shape)}")
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name not in rules:
            hint = configs.suggest(name, rules)
            raise ValueError(f"the logical axis {name!r} is not in the rules table: {hint}")
        parts = math.prod(mesh.shape[axis] for axis in rules[name])
        if size % parts:
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in rules[name])
            raise ValueError(
                f"the axis {name!r} of size {size} does not divide over {over}; "
                "choose other mesh sizes or rules that keep it whole"
            )
        entries.append(rules[name][0] if len(rules[name]) == 1 else rules[name] or None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def tree_shardings(axes: Any, arrays: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The tree of shardings for a tree of arrays.

    Args:
        axes: a tuple of logical axis names at each leaf (`decoder.logical_axes`).
        arrays: arrays or abstract arrays, the same tree.

    Raises:
        ValueError: as `sharding`, with the path of the leaf in front.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> arrays = {"w": jax.ShapeDtypeStruct((4,), "float32")}
    >>> tuple(tree_shardings({"w": ("width",)}, arrays, mesh)["w"].spec)
    ('fsdp',)
    """

    def leaf(path: tuple, array: Any, names: tuple[str, ...]) -> NamedSharding:
        try:
            return sharding(names, array.shape, mesh, rules)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from error

    return jax.tree_util.tree_map_with_path(leaf, arrays, axes)
