"""Meshes over 8 emulated devices, the rules table, and the sentences of the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxdistill.parallel.mesh import AXES, RULES, make_mesh, sharding, tree_shardings


def test_axes_have_these_names_types_and_sizes():
    mesh = make_mesh(replica=2, tensor=2)
    assert mesh.axis_names == ("replica", "fsdp", "sequence", "tensor", "expert") == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "sequence": 1, "tensor": 2, "expert": 1}
    assert make_mesh().shape["fsdp"] == 8
    assert make_mesh(fsdp=1, expert=-1).shape["expert"] == 8
    assert make_mesh(devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3, "tensor": 2}, r"multiply to 6 but there are 8 devices \(fsdp=3, tensor=2\)"),
        ({"tensor": 3}, "multiply to 3 but there are 8 devices"),
        ({"fsdp": 4}, "multiply to 4 but there are 8 devices"),
        ({"fsdp": 0}, "must be at least 1, or -1 for one of them; got fsdp=0"),
        ({"tensor": -1}, "got fsdp=-1, tensor=-1"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_arrays_are_cut_as_the_rules_say():
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    embedding = sharding(("vocab", "width"), (32, 8), mesh)
    assert tuple(embedding.spec) == ("tensor", "fsdp")
    assert embedding.shard_shape((32, 8)) == (16, 4)
    batch = sharding(("batch", "length"), (8, 6), mesh)
    assert batch.shard_shape((8, 6)) == (2, 6)
    kernel = sharding(("layers", "width", "heads", "head_dim"), (3, 8, 4, 5), mesh)
    assert kernel.shard_shape((3, 8, 4, 5)) == (3, 4, 2, 5)
    placed = jax.device_put(np.zeros((32, 8), np.float32), embedding)
    assert len(placed.sharding.device_set) == 8


def test_a_tree_of_names_becomes_a_tree_of_shardings():
    mesh = make_mesh(fsdp=4, tensor=2)
    axes = {"mlp": {"up": ("width", "mlp"), "bias": ("mlp",)}}
    arrays = {"mlp": {"up": jnp.zeros((8, 4)), "bias": jax.ShapeDtypeStruct((4,), "float32")}}
    shardings = tree_shardings(axes, arrays, mesh)
    assert tuple(shardings["mlp"]["up"].spec) == ("fsdp", "tensor")
    assert tuple(shardings["mlp"]["bias"].spec) == ("tensor",)
    whole = tree_shardings(axes, arrays, mesh, rules=RULES | {"mlp": ()})
    assert whole["mlp"]["bias"].is_fully_replicated


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("kv_heads",), (3,), "axis 'kv_heads' of size 3 does not divide over tensor=2"),
        (("batch",), (6,), "size 6 does not divide over replica=1 x fsdp=4"),
        (("widht",), (8,), "'widht' is not in the rules table: did you mean width"),
        (("width",), (8, 8), r"axis names \('width',\) do not fit the shape \(8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(names, shape, message):
    mesh = make_mesh(fsdp=4, tensor=2)
    with pytest.raises(ValueError, match=message):
        sharding(names, shape, mesh)
    array = jax.ShapeDtypeStruct(shape, "float32")
    with pytest.raises(ValueError, match=r"\['layer'\]\['w'\]: "):
        tree_shardings({"layer": {"w": names}}, {"layer": {"w": array}}, mesh)
