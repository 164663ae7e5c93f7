"""From a step's metrics on the device to a row, a moving bar and the decision to give up."""

import math
import time
from typing import Any, NamedTuple

import jax
from rich import progress

from jaxdistill.train.metrics import MetricsWriter


class TrainingDiverged(FloatingPointError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Pending(NamedTuple):
    """A step that was started and whose metrics were not read yet."""

    step: int
    metrics: dict[str, jax.Array]
    tokens: int
    input_wait: float


class Meter:
    """Reads the metrics of step n after step n + 1 was started, so that the device never waits.

    Rows get two more values: input_wait_seconds, and tokens_per_second, the wait for the next batch
    included (absent in a row that `flush` reports, since no batch is waited for then).

    Args:
        writer: takes the rows.
        bar, task: of `progress_bar`.
        max_skipped: so many skipped steps in a row raise.
        skipped: the count of skipped steps so far.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        bar: progress.Progress,
        task: progress.TaskID,
        max_skipped: int,
        skipped: int,
    ) -> None:
        self._writer, self._bar, self._task = writer, bar, task
        self._max_skipped, self._skipped = max_skipped, skipped
        self._in_a_row = 0
        self._first_bad = ""
        self._pending: Pending | None = None
        self._began = 0.0

    def push(
        self, step: int, metrics: dict[str, jax.Array], tokens: int, input_wait: float
    ) -> None:
        """Takes the metrics of a step that was just started, and reports the one before it."""
        if self._pending is not None:
            self._report(self._pending, timed=True)
        self._began = time.perf_counter()
        self._pending = Pending(step, metrics, tokens, input_wait)

    def flush(self) -> None:
        """Reports the step that is pending."""
        if self._pending is not None:
            self._report(self._pending, timed=False)
        self._pending = None
        self._writer.flush()

    def _report(self, pending: Pending, *, timed: bool) -> None:
        """Waits for the step to end, then writes its row and moves the bar."""
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        row = {"loss": values.pop("loss"), **values, "input_wait_seconds": pending.input_wait}
        shown: dict[str, Any] = {"loss": row["loss"]}
        if timed and pending.tokens:
            seconds = time.perf_counter() - self._began
            row["tokens_per_second"] = shown["speed"] = pending.tokens / seconds
        self._writer.write(pending.step, row)
        self._bar.update(self._task, completed=pending.step, **shown)
        self._check_finite(pending.step, row)

    def _check_finite(self, step: int, row: dict[str, float]) -> None:
        """Counts skipped steps in a row; raises at `max_skipped`."""
        skipped = int(row["skipped"])
        if skipped == self._skipped:
            self._in_a_row = 0
            return
        self._skipped = skipped
        self._in_a_row += 1
        if self._in_a_row == 1:
            bad = next(name for name, value in row.items() if not math.isfinite(value))
            self._first_bad = f"{bad} = {row[bad]} at step {step}"
        if self._in_a_row >= self._max_skipped:
            raise TrainingDiverged(
                f"{self._in_a_row} steps in a row were not finite and were skipped, first "
                f"{self._first_bad}; lower the learning rate or look at the data of these steps"
            )


def progress_bar(show: bool) -> progress.Progress:
    """Steps, loss, tokens per second, time passed and time left."""
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.4f}"),
        progress.TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        disable=not show,
    )
