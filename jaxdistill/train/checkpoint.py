"""Checkpoints, saved while training goes on; complete or not there. The only user of orbax."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxdistill import config as configs
from jaxdistill.train.step import TrainState

_logger = logging.getLogger(__name__)


class FingerprintMismatch(ValueError):
    """The checkpoint was made from other data, frozen parameters, settings or another model."""


class CheckpointError(RuntimeError):
    """There are checkpoints, and none of them can be restored."""


class Restored(NamedTuple):
    """A checkpoint: the state on its devices and the position in the data."""

    state: TrainState
    data_state: dict[str, Any]


class Checkpointer:
    """Saves and restores the training state of one run in one folder.

    A checkpoint is written under a temporary name and renamed when complete, so a process killed
    while saving leaves the previous one as the newest.

    Args:
        directory: local folder or `gs://` address; made if absent.
        keep: how many of the newest checkpoints stay.

    >>> import optax, tempfile
    >>> from jaxdistill.train.step import init_state
    >>> state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1))
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...     checkpointer.save(state, {"next": 7}, {"data": {"seed": 0}})
    ...     checkpointer.restore(state, {"data": {"seed": 0}}).data_state
    {'next': 7}
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        path = os.fspath(directory)
        self._directory = epath.Path(path if "://" in path else os.path.abspath(path))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data_state: Mapping[str, Any], fingerprint: Mapping[str, Any]
    ) -> None:
        """Begins to save; returns once `state` may be donated, the files are written meanwhile.

        Args:
            state: saved under the name `state.step`; a step that is saved already is left alone.
            data_state: JSON-able position in the data, the same on every process.
            fingerprint: JSON-able description of what the run is made from.
        """
        step = int(state.step)
        if step in self.steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            data=ocp.args.JsonSave(dict(data_state)),
            fingerprint=ocp.args.JsonSave({**fingerprint, "state": _describe(state)}),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, target: TrainState, fingerprint: Mapping[str, Any]) -> Restored | None:
        """The newest checkpoint that can be read, or None if there is none.

        Args:
            target: a state, or a TrainState of `jax.ShapeDtypeStruct`, with the shapes, types and
                shardings to restore to; the mesh need not be the one the checkpoint was saved on.
            fingerprint: of this run; it must equal the saved one, and so must types and shapes.

        Raises:
            FingerprintMismatch: they differ; the message lists where.
            CheckpointError: there are checkpoints but all are damaged.
        """
        self.wait()
        errors: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore_step(step, target, fingerprint)
            except FingerprintMismatch:
                raise
            # Whatever orbax meets in a torn file, from a JSON error to one of the storage layer.
            except Exception as error:
                errors[step] = error
                continue
            self._set_aside(errors)
            return restored
        if errors:
            newest = max(errors)
            raise CheckpointError(
                f"none of the checkpoints {sorted(errors)} in {self._directory} can be read; step "
                f"{newest} says: {_first_line(errors[newest])}; remove the folder to start over"
            ) from errors[newest]
        return None

    def wait(self) -> None:
        """Returns when every save begun is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads; the object is not usable afterwards."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _restore_step(
        self, step: int, target: TrainState, fingerprint: Mapping[str, Any]
    ) -> Restored:
        """Restores one checkpoint; the fingerprint is compared before the arrays are read."""
        described = self._manager.restore(
            step,
            args=ocp.args.Composite(
                data=ocp.args.JsonRestore(), fingerprint=ocp.args.JsonRestore()
            ),
        )
        now = {**json.loads(json.dumps(fingerprint)), "state": _describe(target)}
        if differences := configs.diff(described.fingerprint, now):
            raise FingerprintMismatch(
                f"the checkpoint of step {step} in {self._directory} was made from something else "
                f"(saved -> now: {'; '.join(differences[:8])}{'; ...' * (len(differences) > 8)}); "
                "go on with what it was made from, or start in a new folder"
            )
        abstract = jax.tree.map(_abstract, target._asdict())
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return Restored(TrainState(**arrays.state), described.data)

    def _set_aside(self, errors: Mapping[int, Exception]) -> None:
        """Renames damaged checkpoints, which would otherwise count as the newest to keep."""
        for step, error in errors.items():
            path = self._directory / str(step)
            aside = self._directory / f"damaged-{step}"
            reason = _first_line(error)
            _logger.warning("skipped the damaged checkpoint %s, now %s: %s", path, aside, reason)
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        if errors:
            self._manager.reload()


def _first_line(error: Exception) -> str:
    """The start of what orbax says; the rest may be pages of storage options."""
    return str(error).partition("\n")[0][:300] or type(error).__name__


def _describe(state: TrainState) -> dict[str, str]:
    """Type and shape of every array by its path, to tell another model or optimizer by."""
    leaves = jax.tree_util.tree_flatten_with_path(state._asdict())[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def checksum(tree: Any) -> str:
    """A fingerprint of arrays: 64 hexadecimal digits, the same on every device layout.

    Every leaf gives sum_i mix(bits_i, i) mod 2^32, computed where the leaf lives (no copy to the
    host; integer sums do not depend on order); then SHA-256 over the leaves' paths, types, shapes
    and sums. It finds accidents, not forgeries.

    >>> checksum({"w": jnp.ones(3)}) == checksum({"w": jnp.zeros(3)})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        total = int(_mixed_sum(jnp.asarray(leaf)))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {total}\n".encode())
    return digest.hexdigest()


@jax.jit
def _mixed_sum(leaf: jax.Array) -> jax.Array:
    """uint32 []: the sum over the leaf of its bits and positions, mixed as MurmurHash3 finalises.

    The mixing is one to one, so a change of a single element always changes the sum.
    """
    unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    as_bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(as_bits, unsigned).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size % 2**32) + index
    mixed = bits ^ (position * jnp.uint32(0x9E3779B1))
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(multiplier)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)
