"""Training from the first step to the last, or on from wherever the last process stopped."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.train.checkpoint import Checkpointer, checksum
from jaxdistill.train.meter import Meter, TrainingDiverged, progress_bar
from jaxdistill.train.metrics import MetricsWriter
from jaxdistill.train.preemption import Preempted, stop_signals
from jaxdistill.train.step import (
    LossFunction,
    TrainState,
    init_state,
    make_train_step,
    merge,
    state_sharding,
)
from jaxdistill.workdir import Workdir

__all__ = ["Batches", "Preempted", "TrainConfig", "TrainingDiverged", "fit"]

_logger = logging.getLogger(__name__)


class Batches(Protocol):
    """An endless, resumable source of batches; `jaxdistill.data.pipeline.Pipeline` is one."""

    fingerprint: dict[str, Any]

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    steps: int
    """steps in all, those before a resume included"""
    seed: int = 0
    """of the random numbers in the loss"""
    accumulation: int = 1
    """microbatches a step; the gradient is that of the whole batch"""
    max_grad_norm: float | None = 1.0
    """a longer gradient is scaled down to this norm"""
    evaluate_every: int | None = None
    """steps between evaluations; there is always one after the last step"""
    checkpoint_every: int = 100
    """steps between checkpoints; there is always one after the last step"""
    keep: int = 2
    """how many of the newest checkpoints stay"""
    max_skipped: int = 10
    """so many steps in a row with a loss or gradient that is not finite end the run"""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "checkpoint_every", "keep", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1 or None: {self.evaluate_every}")


def fit(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    params: Mapping[str, Any],
    batches: Batches,
    config: TrainConfig,
    *,
    frozen: Mapping[str, Any] | None = None,
    workdir: Workdir | None = None,
    run: str = "train",
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    show_progress: bool = True,
) -> TrainState:
    """Trains `params`; with a workdir it can be killed at any moment and called again to go on.

    Args:
        loss_fn: (params, batch, key) -> (Weighted, dict of Weighted), on the merged parameters.
        optimizer: an optax transformation, usually of `make_optimizer(config, steps)`.
        params: the trainable parameters (see `partition`), on the devices where they stay.
        batches: one batch a step, for all microbatches together.
        config: how long and how.
        frozen: parameters the loss needs and nobody trains.
        workdir: where metrics, events and checkpoints go; without it nothing is written.
        run: the name of this run (arm) in the workdir.
        evaluate: (merged params, step) -> metrics; it owns its data.
        batch_sharding: how a batch's leading axis lies on the devices.
        show_progress: whether a progress bar is drawn.

    Returns:
        The state after the last step; of a finished run, at once and without training.

    Raises:
        Preempted: after SIGTERM or SIGINT, with the finished step saved. A second signal aborts.
        TrainingDiverged: `max_skipped` steps in a row were not finite.
        FingerprintMismatch: the workdir's checkpoint was made from other data, frozen parameters
            or training settings.
    """
    frozen = jax.tree.map(jnp.asarray, {} if frozen is None else dict(frozen))
    with ExitStack() as stack:
        state = init_state(params, optimizer)
        checkpointer = None
        if workdir is not None:
            checkpointer = stack.enter_context(Checkpointer(workdir.checkpoints(run), config.keep))
            fingerprint = _fingerprint(batches, frozen, config)
            state = _resume(checkpointer, state, batches, fingerprint)
        start = int(state.step)
        if start >= config.steps:
            _logger.info("%s is finished: %d of %d steps are done", run, start, config.steps)
            return state

        step = make_train_step(
            loss_fn,
            optimizer,
            seed=config.seed,
            accumulation=config.accumulation,
            max_grad_norm=config.max_grad_norm,
            state_sharding=state_sharding(state),
        )
        writer = stack.enter_context(MetricsWriter(workdir, run, start))
        bar = stack.enter_context(progress_bar(show_progress))
        task = bar.add_task(run, total=config.steps, completed=start, loss=math.nan, speed=0.0)
        meter = Meter(writer, bar, task, config.max_skipped, int(state.skipped))
        signals = stack.enter_context(stop_signals())

        for number in range(start + 1, config.steps + 1):
            batch, wait = _next_batch(batches, number, config.steps)
            state, metrics = step(state, frozen, _place(batch, batch_sharding))
            meter.push(number, metrics, _count_tokens(batch), wait)

            last = number == config.steps
            if evaluate is not None and (last or _is_due(number, config.evaluate_every)):
                meter.flush()
                writer.write(number, evaluate(merge(state.params, frozen), number))
            stopping = bool(signals)
            if last or stopping or _is_due(number, config.checkpoint_every):
                meter.flush()
                if checkpointer is not None:
                    checkpointer.save(state, batches.get_state(), fingerprint)
            if stopping:
                break
        if signals:
            raise _preempted(run, number, signals[0], checkpointer)
    return state


def _fingerprint(
    batches: Batches, frozen: Mapping[str, Any], config: TrainConfig
) -> dict[str, Any]:
    """What a resumed run must share with the one that was interrupted."""
    settings = ("seed", "accumulation", "max_grad_norm")
    return {
        "data": batches.fingerprint,
        "frozen": {"checksum": checksum(frozen)},
        "training": {name: getattr(config, name) for name in settings},
    }


def _resume(
    checkpointer: Checkpointer, state: TrainState, batches: Batches, fingerprint: Mapping[str, Any]
) -> TrainState:
    """The newest checkpoint's state, the data set to its position; `state` if there is none."""
    restored = checkpointer.restore(state, fingerprint)
    if restored is None:
        return state
    batches.set_state(restored.data_state)
    _logger.info("going on from step %d", int(restored.state.step))
    return restored.state


def _is_due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _next_batch(
    batches: Batches, number: int, steps: int
) -> tuple[Mapping[str, np.ndarray], float]:
    """The batch and the seconds it was waited for."""
    began = time.perf_counter()
    try:
        batch = next(batches)
    except StopIteration:
        raise ValueError(
            f"the data ended before step {number} of {steps}; repeat it or train for fewer steps"
        ) from None
    return batch, time.perf_counter() - began


def _place(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding | None) -> Any:
    """This process's rows as global arrays on the devices."""
    if sharding is None:
        return batch
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Tokens in the batch, without padding; 0 if it holds none."""
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"]))
    return int(np.size(batch["tokens"])) if "tokens" in batch else 0


def _preempted(
    run: str, number: int, signal_number: int, checkpointer: Checkpointer | None
) -> Preempted:
    """Waits for the save and makes the exception that ends the process."""
    if checkpointer is not None:
        checkpointer.wait()
    saved = "nothing is saved without a workdir" if checkpointer is None else "it is saved"
    preempted = Preempted(f"{run} was stopped after step {number}; {saved}", signal_number)
    _logger.warning("%s", preempted)
    return preempted
