import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from etils import epath

from jaxdistill import workdir as workdirs
from jaxdistill.workdir import Workdir, WorkdirError

CONFIG = {"steps": 3, "optimizer": {"learning_rate": 0.1, "betas": [0.9, 0.99]}}
HOLD = """
import os, sys, time
from jaxdistill import workdir
with workdir.open(sys.argv[1], experiment="experiments.toy", preset="cpu", config={"steps": 3}):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


def open_toy(path: Any, **changes: Any) -> contextlib.AbstractContextManager[Workdir]:
    details = {"experiment": "experiments.toy", "preset": "cpu", "config": CONFIG, **changes}
    return workdirs.open(path, **details)


def snapshot(path: pathlib.Path) -> dict[str, str]:
    return {str(p): p.read_text() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_names_of_the_files(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    assert isinstance(workdir.path, epath.Path)
    assert workdir.config_file == tmp_path / "config.json"
    assert workdir.metrics_file == tmp_path / "metrics.jsonl"
    assert workdir.report_file == tmp_path / "report.html"
    assert workdir.export_directory == tmp_path / "export"
    assert workdir.tensorboard("kd") == tmp_path / "tensorboard" / "kd"
    assert workdir.checkpoints("kd") == tmp_path / "checkpoints" / "kd"
    assert list(tmp_path.iterdir()) == []  # a name makes nothing


def test_a_bucket_must_be_mounted() -> None:
    sentence = "the workdir must be a local folder, but it is gs://bucket/run: mount the bucket"
    with pytest.raises(WorkdirError, match=sentence), open_toy("gs://bucket/run"):
        pass


def test_new_folder_gets_its_config(tmp_path: pathlib.Path) -> None:
    with open_toy(tmp_path / "a" / "b") as workdir:
        written = json.loads(workdir.config_file.read_text())
    assert written.pop("versions").keys() >= {"python", "jaxdistill", "jax", "numpy"}
    assert written == {"experiment": "experiments.toy", "preset": "cpu", "config": CONFIG}
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [".lock", "config.json"]


def test_same_run_resumes_with_its_files(tmp_path: pathlib.Path) -> None:
    with open_toy(tmp_path) as workdir:
        workdir.metrics_file.write_text("kept")
        before = snapshot(tmp_path)
    # The name of the preset decides nothing: the same values are the same run.
    with open_toy(tmp_path, preset="renamed", config={**CONFIG, "steps": 3.0}):
        assert snapshot(tmp_path) == before


def test_folder_that_was_left_before_its_config_is_new(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.host.123").write_text('{"half')
    with open_toy(tmp_path) as workdir:
        assert json.loads(workdir.config_file.read_text())["config"] == CONFIG


def refuse(path: pathlib.Path, error: type[Exception], sentence: str, **changes: Any) -> None:
    before = snapshot(path)
    with pytest.raises(error) as caught, open_toy(path, **changes):
        pass
    assert str(caught.value) == sentence
    assert snapshot(path) == before


def test_workdir_of_another_experiment(tmp_path: pathlib.Path) -> None:
    with open_toy(tmp_path):
        pass
    refuse(
        tmp_path,
        WorkdirError,
        f"{tmp_path} is the workdir of another run, of experiments.toy, and this is "
        "experiments.other: choose another --workdir or delete it",
        experiment="experiments.other",
    )


def test_workdir_of_another_configuration(tmp_path: pathlib.Path) -> None:
    with open_toy(tmp_path):
        pass
    refuse(
        tmp_path,
        WorkdirError,
        f"{tmp_path} was begun with another configuration (steps: 3 -> 4; "
        "optimizer.betas: [0.9, 0.99] -> absent; optimizer.name: absent -> 'sgd'): use the same "
        "values to resume, choose another --workdir, or delete it to start over",
        config={"steps": 4, "optimizer": {"learning_rate": 0.1, "name": "sgd"}},
    )


def test_folder_of_something_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    refuse(
        tmp_path,
        WorkdirError,
        f"{tmp_path} is not empty and has no config.json, so it is no workdir of an experiment: "
        "choose another --workdir",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["{", "[]", '{"experiment": "a"}', '{"config": {}}', "3"])
def test_config_of_something_else(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    refuse(
        tmp_path,
        WorkdirError,
        f"{tmp_path}/config.json is not the config.json of an experiment: "
        "choose another --workdir or delete it",
    )


def test_file_instead_of_a_folder(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for path, sentence in [
        (file, f"the workdir {file} is a file: choose another --workdir"),
        (
            file / "run",
            f"cannot write to the workdir {file}/run (Not a directory): "
            "choose a --workdir that can be written",
        ),
    ]:
        with pytest.raises((WorkdirError, PermissionError)) as caught, open_toy(path):
            pass
        assert str(caught.value) == sentence
    assert file.read_text() == "precious"


@pytest.fixture
def read_only_folder() -> Iterator[pathlib.Path]:
    """A folder that this process can list and not write, also where the tests run as root."""
    # Not tmp_path: only its owner may enter that.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield pathlib.Path(name)
        if is_root:
            os.seteuid(0)
        os.chmod(name, 0o755)


def test_read_only_folder_is_refused_before_any_work(read_only_folder: pathlib.Path) -> None:
    for path in (read_only_folder, read_only_folder / "run"):
        with pytest.raises(PermissionError) as caught, open_toy(path):
            pytest.fail("the run began")
        assert str(caught.value) == (
            f"cannot write to the workdir {path} (Permission denied): "
            "choose a --workdir that can be written"
        )


def test_read_only_workdir_is_not_resumed(read_only_folder: pathlib.Path) -> None:
    with _as_owner(read_only_folder), open_toy(read_only_folder):
        pass
    before = snapshot(read_only_folder)
    with pytest.raises(PermissionError, match="cannot write to the workdir"):
        open_toy(read_only_folder).__enter__()
    assert snapshot(read_only_folder) == before


@contextlib.contextmanager
def _as_owner(path: pathlib.Path) -> Iterator[None]:
    user = os.geteuid()
    os.seteuid(os.getuid())
    os.chmod(path, 0o755)
    yield
    os.chmod(path, 0o555)
    os.seteuid(user)


def test_two_processes_cannot_share_it_and_kill_frees_it(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(WorkdirError) as caught, open_toy(tmp_path, config={"steps": 3}):
                pass
            assert str(caught.value).startswith(f"{tmp_path} is in use by process {holder.pid} on ")
            holder.kill()
            assert holder.wait() == -signal.SIGKILL
            # A worker that outlives its killed parent does not keep the folder.
            os.kill(child, 0)
            with open_toy(tmp_path, config={"steps": 3}):
                pass
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_loser_of_a_race_sees_the_winner(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins and ends between the first look at the folder and the lock."""
    lock = fcntl.lockf

    def lock_late(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "lockf", lock)
        with open_toy(tmp_path, experiment="experiments.other"):
            pass
        lock(*arguments)

    monkeypatch.setattr(fcntl, "lockf", lock_late)
    with pytest.raises(WorkdirError, match="another run"), open_toy(tmp_path):
        pytest.fail("the run began")


def test_file_system_without_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with open_toy(tmp_path) as workdir:
        assert workdir.config_file.exists()
    assert "cannot be locked" in caplog.text


def test_other_versions_are_told(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_toy(tmp_path) as workdir:
        written = json.loads(workdir.config_file.read_text())
        written["versions"]["jax"] = "0.0.1"
        workdir.config_file.write_text(json.dumps(written))
    with open_toy(tmp_path):
        assert "jax: '0.0.1' -> " in caplog.text


def test_config_that_json_cannot_hold_writes_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError), open_toy(tmp_path, config={"steps": object()}):
        pass
    assert not (tmp_path / "config.json").exists()


def test_failed_write_leaves_the_old_file_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = epath.Path(tmp_path / "file.json")
    workdirs.write_atomically(path, "old")
    replace = os.replace

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        workdirs.write_atomically(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.json", "old")]
    monkeypatch.setattr(os, "replace", replace)
    workdirs.write_atomically(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.json", "new")]
