"""Metrics of a run: rows of one JSON Lines file, and TensorBoard events beside it."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxdistill.workdir import Workdir, write_atomically

_logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows {"run": ..., "step": ..., name: value, ...} to the workdir's metrics.jsonl.

    Values keep every digit. JSON has no number for the non-finite ones: they are written as the
    strings "NaN", "Infinity" and "-Infinity", which `float` and `read_metrics` understand.
    Several runs may share the file one after the other; only process 0 writes.

    Args:
        workdir: the run's folder; None writes nothing.
        run: the name of this run (arm).
        resume_step: the step training goes on from. Rows of this run beyond it are dropped, and so
            is a last line torn by a kill; rows of other runs stay as they are.

    Raises:
        ValueError: a line other than the last is not a row; the message gives file and line.
    """

    def __init__(self, workdir: Workdir | None, run: str, resume_step: int = 0) -> None:
        self._run = run
        self._file: Any = None
        self._events: Any = None
        if workdir is None or jax.process_index() != 0:
            return
        _rewind(workdir.metrics_file, run, resume_step)
        self._file = workdir.metrics_file.open("a")
        self._events = _event_writer(workdir.tensorboard(run), resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row and flushes it to the system."""
        if self._file is None:
            return
        row = {"run": self._run, "step": step} | {k: _encode(float(v)) for k, v in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Makes the TensorBoard events visible; rows of the file are flushed as they come."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: epath.PathLike, run: str | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file in order, of one run or of all; a torn last line is left out.

    Raises:
        ValueError: a line other than the last is not a row; the message gives file and line.
    """
    rows = [json.loads(line) for line in _complete_lines(epath.Path(path))]
    return [
        {key: value if key == "run" else _decode(value) for key, value in row.items()}
        for row in rows
        if run is None or row["run"] == run
    ]


def _rewind(path: epath.Path, run: str, resume_step: int) -> None:
    """Rewrites the file without the rows that training is going to write again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = []
    for line in _complete_lines(path):
        row = json.loads(line)
        if row["run"] != run or row["step"] <= resume_step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def _complete_lines(path: epath.Path) -> list[str]:
    """The lines that are rows; the last may be torn, an earlier one may not."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if not _is_row(line):
            if number == len(lines):
                return lines[:-1]
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with run and step, got "
                f"{line[:80]!r}; repair or remove the line"
            )
    return lines


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and isinstance(row.get("run"), str) and "step" in row


def _encode(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _event_writer(directory: epath.Path, resume_step: int) -> Any:
    """A TensorBoard writer, or None (said once) without the `report` extra."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        _logger.info("no TensorBoard events: install jaxdistill[report] to have them")
        return None
    purge_step = resume_step + 1 if resume_step else None
    return SummaryWriter(str(directory), purge_step=purge_step)
