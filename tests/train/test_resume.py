"""Killed at any moment and started again, a run ends as if nothing had happened, bit for bit."""

import json
import random
import subprocess
import sys
import time

import pytest

from jaxdistill.train.metrics import read_metrics
from jaxdistill.workdir import Workdir
from tests.train import tiny_run


def start(path, *death):
    command = [sys.executable, "-m", "tests.train.tiny_run", str(path), *death]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def history(path):
    """All rows without what depends on the clock; `batch` in them is the order of the data."""
    clock = {"tokens_per_second", "input_wait_seconds"}
    rows = read_metrics(Workdir(path).metrics_file)
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    state = tiny_run.run(Workdir(path))
    rows = history(path)
    assert [row["batch"] for row in rows if "batch" in row] == list(range(1, 17))
    assert [row["step"] for row in rows if "evaluated_at" in row] == [5, 10, 15, 16]
    return tiny_run.hashes(state), rows


def test_a_run_stopped_and_then_killed_inside_a_save_is_the_run_that_was_not(
    tmp_path, uninterrupted
):
    process = start(tmp_path, "SIGTERM@6")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert "stopped after step 6; it is saved (SIGTERM)" in error
    checkpoints = tmp_path / "checkpoints/tiny"
    assert (checkpoints / "6").is_dir()
    process = start(tmp_path, "rename@12")
    _, error = process.communicate(timeout=300)
    assert process.returncode == -9, error
    assert (checkpoints / "12.orbax-checkpoint-tmp").is_dir()
    assert not (checkpoints / "12").exists()
    state = tiny_run.run(Workdir(tmp_path))
    assert (tiny_run.hashes(state), history(tmp_path)) == uninterrupted


PHASES = ("mkdir@{step}", "mkdir@state", "mkdir@data", "rename@state", "rename@{step}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_ended_at_random_steps_is_the_run_that_was_not(tmp_path, uninterrupted, seed):
    """Between any two checkpoints one end at a random step and one inside the save that follows."""
    rng = random.Random(seed)
    signals = rng.sample(["SIGTERM", "SIGKILL"] * 2, 4)
    for before, name in zip(range(0, 16, 4), signals, strict=True):
        save = rng.choice(PHASES).format(step=before + 4)
        for death in (f"{name}@{before + rng.randint(1, 3)}", save):
            process = start(tmp_path, death)
            _, error = process.communicate(timeout=300)
            # What did not happen would prove nothing.
            assert process.returncode == (143 if death.startswith("SIGTERM") else -9), error
    for _ in range(3):
        process = start(tmp_path)
        time.sleep(rng.uniform(0, 8))
        process.kill()
        process.communicate()
    process = start(tmp_path)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    final = json.loads((tmp_path / "final.json").read_text())
    assert (final, history(tmp_path)) == uninterrupted
