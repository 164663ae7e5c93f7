"""Saving and restoring: other meshes, other data, damaged files, donated buffers."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxdistill.losses import Weighted
from jaxdistill.parallel.mesh import make_mesh, sharding
from jaxdistill.train.checkpoint import (
    Checkpointer,
    CheckpointError,
    FingerprintMismatch,
    checksum,
)
from jaxdistill.train.step import TrainState, init_state, make_train_step

FINGERPRINT = {"data": {"seed": 0, "batch_size": 4}, "frozen": {"checksum": "abc"}}
OPTIMIZER = optax.adamw(1e-2)


def make_state(step=0, scale=1.0, size=100):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(scale * rng.normal(size=(size, 8)), jnp.float32)}
    state = init_state(params, OPTIMIZER)
    return state._replace(step=jnp.asarray(step, jnp.int32))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_what_is_restored_is_what_was_saved(tmp_path):
    state = make_state(step=3)
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(state, {"next_batch": 3, "nested": {"a": [1, 2]}}, FINGERPRINT)
    with Checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.restore(make_state(), FINGERPRINT)
    assert isinstance(restored.state, TrainState)
    assert_same(restored.state, state)
    assert restored.data_state == {"next_batch": 3, "nested": {"a": [1, 2]}}


def test_nothing_to_restore_is_none_and_the_newest_are_kept(tmp_path):
    with Checkpointer(epath.Path(tmp_path) / "run", keep=2) as checkpointer:
        assert checkpointer.restore(make_state(), FINGERPRINT) is None
        for step in (1, 2, 3):
            checkpointer.save(make_state(step, scale=step), {"next": step}, FINGERPRINT)
        checkpointer.wait()
        assert checkpointer.steps() == [2, 3]
        checkpointer.save(make_state(3, scale=99), {"next": 99}, FINGERPRINT)
        assert checkpointer.restore(make_state(), FINGERPRINT).data_state == {"next": 3}


def test_a_relative_directory_is_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as checkpointer:
        checkpointer.save(make_state(1), {}, FINGERPRINT)
    assert (tmp_path / "run" / "1").is_dir()


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    # The save returns early; the step then writes over the buffers that are being saved.
    loss_fn = lambda p, batch, key: (Weighted(jnp.sum(p["w"] ** 2), jnp.float32(1)), {})  # noqa: E731
    step = make_train_step(loss_fn, OPTIMIZER, seed=0)
    state = make_state(size=20_000)
    saved = {}
    with Checkpointer(tmp_path, keep=4) as checkpointer:
        for _ in range(4):
            state, _ = step(state, {}, {})
            saved[int(state.step)] = checksum(state)
            checkpointer.save(state, {}, FINGERPRINT)
        for number in sorted(saved, reverse=True):
            restored = checkpointer.restore(state, FINGERPRINT)
            assert checksum(restored.state) == saved[number]
            checkpointer.wait()
            shutil.rmtree(tmp_path / str(number))
            checkpointer._manager.reload()


@pytest.mark.parametrize("devices", [1, 8])
def test_saved_on_4_devices_restored_on_others(tmp_path, devices):
    def placed(count):
        mesh = make_mesh(fsdp=count, devices=jax.devices()[:count])
        rows = sharding(("width", "mlp"), (16, 8), mesh)
        params = {"w": np.arange(128, dtype=np.float32).reshape(16, 8)}
        return init_state(jax.device_put(params, {"w": rows}), OPTIMIZER), rows

    state, _ = placed(4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, {}, FINGERPRINT)
        target, rows = placed(devices)
        target = jax.tree.map(lambda x: x + 1, target)
        restored = checkpointer.restore(target, FINGERPRINT).state
    assert_same(restored, state)
    for tree in (restored.params, optax.tree.get(restored.opt_state, "mu")):
        assert tree["w"].sharding == rows
    assert len(restored.step.sharding.device_set) == devices


def test_an_abstract_target_will_do(tmp_path):
    state = make_state(1)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, {}, FINGERPRINT)
        assert_same(checkpointer.restore(abstract, FINGERPRINT).state, state)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"data": {"seed": 1, "batch_size": 4}}, r"data\.seed: 0 -> 1"),
        ({"data": {"seed": 0, "batch_size": 8}}, r"data\.batch_size: 4 -> 8"),
        ({"frozen": {"checksum": "def"}}, r"frozen\.checksum: '?abc'? -> '?def'?"),
    ],
)
def test_another_fingerprint_is_refused_and_the_differences_shown(tmp_path, changed, shown):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(1), {}, FINGERPRINT)
        with pytest.raises(FingerprintMismatch, match=shown):
            checkpointer.restore(make_state(), FINGERPRINT | changed)
        assert checkpointer.restore(make_state(), FINGERPRINT) is not None


def test_tuples_in_a_fingerprint_are_no_difference(tmp_path):
    fingerprint = {"data": {"sources": ("a", "b")}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(1), {}, fingerprint)
        assert checkpointer.restore(make_state(), fingerprint) is not None


def remove_the_arrays(path):
    shutil.rmtree(path / "state" / "ocdbt.process_0")


def truncate_every_file(path):
    for file in (path / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_the_json(path):
    (path / "data" / "metadata").write_text("")


# When one array cannot be read, orbax leaves the readers of the others to the garbage collector.
ABANDONED_READERS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DAMAGES = [remove_the_arrays, truncate_every_file, empty_the_json]


@ABANDONED_READERS
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, damage, caplog):
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step in (1, 2):
            checkpointer.save(make_state(step, scale=step), {"next": step}, FINGERPRINT)
    damage(tmp_path / "2")
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        with caplog.at_level(logging.WARNING, "jaxdistill"):
            restored = checkpointer.restore(make_state(), FINGERPRINT)
        assert restored.data_state == {"next": 1}
        assert_same(restored.state, make_state(1, scale=1))
        assert "skipped the damaged checkpoint" in caplog.text
        assert (tmp_path / "damaged-2").is_dir()
        # The step can be saved again, and it is the one that is kept.
        checkpointer.save(make_state(2, scale=2), {"next": 2}, FINGERPRINT)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.restore(make_state(), FINGERPRINT).data_state == {"next": 2}


@ABANDONED_READERS
def test_if_none_can_be_read_nothing_is_touched_and_the_error_says_why(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(make_state(step), {}, FINGERPRINT)
    for step in (1, 2):
        truncate_every_file(tmp_path / str(step))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2\] .* step 2 says"),
    ):
        checkpointer.restore(make_state(), FINGERPRINT)
    assert {"1", "2"} <= {path.name for path in tmp_path.iterdir()}


def test_another_model_or_optimizer_is_refused_with_the_shapes(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(1), {}, FINGERPRINT)
        shapes = r"state\.params/w: '?float32\[100, 8\]'? -> '?float32\[99, 8\]"
        with pytest.raises(FingerprintMismatch, match=shapes):
            checkpointer.restore(make_state(size=99), FINGERPRINT)
        other = init_state(make_state().params, optax.sgd(0.1, momentum=0.9))
        with pytest.raises(FingerprintMismatch, match="opt_state/0/mu/w"):
            checkpointer.restore(other, FINGERPRINT)
        assert checkpointer.restore(make_state(), FINGERPRINT) is not None


def test_half_written_checkpoints_are_not_seen(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(1), {}, FINGERPRINT)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)


def test_checksum_sees_values_positions_types_shapes_and_names():
    base = {"w": jnp.arange(6.0), "b": jnp.zeros(2, jnp.bfloat16)}
    others = [
        {"w": jnp.arange(6.0).at[3].set(3.0000002), "b": base["b"]},
        {"w": jnp.arange(6.0)[::-1], "b": base["b"]},
        {"w": jnp.arange(6.0).reshape(2, 3), "b": base["b"]},
        {"w": jnp.arange(6.0), "b": jnp.zeros(2, jnp.float16)},
        {"w": jnp.arange(6.0), "c": base["b"]},
        {"w": -base["w"], "b": base["b"]},
        {"w": base["w"]},
        {},
    ]
    sums = [checksum(tree) for tree in (base, *others)]
    assert len(set(sums)) == len(sums)
    assert checksum(jax.tree.map(np.asarray, base)) == sums[0]


def test_checksum_is_the_same_on_every_mesh_and_for_every_type():
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    expected = checksum({"w": values})
    for count in (2, 8):
        mesh = make_mesh(fsdp=count, devices=jax.devices()[:count])
        placed = jax.device_put(values, sharding(("width", "mlp"), values.shape, mesh))
        assert checksum({"w": placed}) == expected
    for dtype in (jnp.bool_, jnp.int8, jnp.uint8, jnp.int32, jnp.float16, jnp.float8_e4m3fn):
        a, b = jnp.zeros(5, dtype), jnp.zeros(5, dtype).at[4].set(jnp.ones((), dtype))
        assert checksum(a) != checksum(b)
