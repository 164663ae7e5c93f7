"""The folder of one run: what is where in it, and whether a command may start or resume there."""

import builtins
import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from jaxdistill import config as configs

_PACKAGES = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_logger = logging.getLogger(__name__)


class WorkdirError(ValueError):
    """A folder in which this run may not work; the sentence says why and what to do."""


class Workdir:
    """The files of a run. A run has one or more arms ("ce", "kd"), by name.

    >>> Workdir("runs/quickstart-cpu").checkpoints("kd").as_posix()
    'runs/quickstart-cpu/checkpoints/kd'
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)

    def __repr__(self) -> str:
        return f"Workdir({os.fspath(self.path)!r})"

    @property
    def config_file(self) -> epath.Path:
        """The configuration, written once when the run begins."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> epath.Path:
        """One JSON object a line, of all arms."""
        return self.path / "metrics.jsonl"

    @property
    def report_file(self) -> epath.Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def export_directory(self) -> epath.Path:
        """The final model in the Hugging Face layout."""
        return self.path / "export"

    def tensorboard(self, run: str) -> epath.Path:
        """The folder of TensorBoard events of one arm."""
        return self.path / "tensorboard" / run

    def checkpoints(self, run: str) -> epath.Path:
        """The folder of checkpoints of one arm."""
        return self.path / "checkpoints" / run


@contextlib.contextmanager
def open(
    path: epath.PathLike, *, experiment: str, preset: str, config: Mapping[str, Any]
) -> Iterator[Workdir]:
    """Begin or resume a run in `path`, and keep other processes out of it until the block ends.

    Args:
        path: a local folder; a bucket must be mounted.
        experiment: the name of the experiment module, as `experiments.quickstart`.
        preset: the preset's name, written down for the reader; it does not decide resuming.
        config: the configuration as nested dictionaries (`config.to_dict`).
    Raises: WorkdirError if the folder is not local, of another run or configuration, no workdir or
        in use; PermissionError if it cannot be written. Nothing in it is changed then.
    """
    if "://" in os.fspath(path):
        raise WorkdirError(
            f"the workdir must be a local folder, but it is {os.fspath(path)}: mount the bucket, "
            "as gcsfuse does, and give the folder it is mounted at"
        )
    workdir = Workdir(path)
    started = {"experiment": experiment, "preset": preset, "config": dict(config)}
    _check_same_run(workdir, started)
    _check_writable(workdir.path)
    with _lock(workdir.path):
        # Another process may have begun here between the first look and the lock.
        if previous := _check_same_run(workdir, started):
            _warn_of_versions(previous.get("versions", {}))
            _logger.info("resuming in %s", workdir.path)
        else:
            write_atomically(
                workdir.config_file, json.dumps({**started, "versions": _versions()}, indent=2)
            )
        yield workdir


def write_atomically(path: epath.Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, never sees half of it."""
    temporary = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_same_run(workdir: Workdir, started: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says if this run may resume; None in a new or empty folder; else raises."""
    path = workdir.path
    if not path.exists():
        return None
    if not path.is_dir():
        raise WorkdirError(f"the workdir {path} is a file: choose another --workdir")
    if not workdir.config_file.exists():
        # Names with a dot are ours (lock, temporary file) or the system's: they hold no work.
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise WorkdirError(
                f"{path} is not empty and has no config.json, so it is no workdir of an "
                "experiment: choose another --workdir"
            )
        return None
    previous = _read_config(workdir.config_file)
    if previous["experiment"] != started["experiment"]:
        raise WorkdirError(
            f"{path} is the workdir of another run, of {previous['experiment']}, and this is "
            f"{started['experiment']}: choose another --workdir or delete it"
        )
    if changes := configs.diff(previous["config"], json.loads(json.dumps(started["config"]))):
        raise WorkdirError(
            f"{path} was begun with another configuration ({'; '.join(changes)}): use the same "
            "values to resume, choose another --workdir, or delete it to start over"
        )
    return previous


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return {**content, "experiment": content["experiment"], "config": dict(content["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(
            f"{path} is not the config.json of an experiment: choose another --workdir or delete it"
        ) from error


def _check_writable(path: epath.Path) -> None:
    probe = path / f".probe.{socket.gethostname()}.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"cannot write to the workdir {path} ({error.strerror or error}): "
            "choose a --workdir that can be written"
        ) from error


@contextlib.contextmanager
def _lock(path: epath.Path) -> Iterator[None]:
    """An exclusive lock that the system drops when this process ends, however it ends.

    A record lock (`lockf`) and not `flock`: data workers forked from this process must not keep
    the folder locked after it was killed.
    """
    with builtins.open(path / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise WorkdirError(
                f"{path} is in use by {file.read() or 'another process'}: wait for it, end it, or "
                "choose another --workdir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            _logger.warning("%s cannot be locked (%s): run one job at a time there", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _versions() -> dict[str, str]:
    """Versions without importing the packages; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _warn_of_versions(previous: Mapping[str, str]) -> None:
    if changes := configs.diff(previous, _versions()):
        _logger.warning(
            "the run was begun with other versions (%s), so the rest of it may not be bitwise "
            "what it would have been",
            "; ".join(changes),
        )
