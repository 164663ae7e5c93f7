"""Rows on disk: exact values, rewinding on resume, torn lines, several runs."""

import builtins
import json
import logging
import math

import numpy as np
import pytest

from jaxdistill.train.metrics import MetricsWriter, read_metrics
from jaxdistill.workdir import Workdir


def write(workdir, run, steps, resume_step=0):
    with MetricsWriter(workdir, run, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 3})


def steps_of(workdir, run):
    return [row["step"] for row in read_metrics(workdir.metrics_file, run)]


def test_values_keep_every_digit_and_the_file_stays_standard_json(tmp_path):
    workdir = Workdir(tmp_path)
    values = {"third": float(np.float32(1 / 3)), "tiny": 5e-324, "nan": math.nan}
    values |= {"up": math.inf, "down": -math.inf}
    with MetricsWriter(workdir, "kd") as writer:
        writer.write(1, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not standard JSON")

    row = json.loads(workdir.metrics_file.read_text(), parse_constant=refuse)
    assert (row["nan"], row["up"], row["down"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = read_metrics(workdir.metrics_file)
    assert math.isnan(read.pop("nan"))
    del values["nan"]
    assert read == {"run": "kd", "step": 1} | values


def test_resuming_drops_later_rows_of_this_run_and_no_others(tmp_path):
    workdir = Workdir(tmp_path)
    write(workdir, "ce", range(1, 6))
    write(workdir, "kd", range(1, 8))
    write(workdir, "kd", range(5, 7), resume_step=4)
    assert steps_of(workdir, "ce") == [1, 2, 3, 4, 5]
    assert steps_of(workdir, "kd") == [1, 2, 3, 4, 5, 6]
    write(workdir, "kd", [1])
    assert steps_of(workdir, "kd") == [1]
    assert steps_of(workdir, "ce") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", ['{"run": "kd", "st', '{"run": "kd", "step": 4, "loss": 1.', "{"])
def test_a_torn_last_line_is_repaired(tmp_path, torn):
    workdir = Workdir(tmp_path)
    write(workdir, "kd", [1, 2, 3])
    with workdir.metrics_file.open("a") as file:
        file.write(torn)
    assert steps_of(workdir, "kd") == [1, 2, 3]
    write(workdir, "kd", [4], resume_step=3)
    assert steps_of(workdir, "kd") == [1, 2, 3, 4]
    assert len(workdir.metrics_file.read_text().splitlines()) == 4


def test_a_last_row_without_its_line_end_is_kept(tmp_path):
    workdir = Workdir(tmp_path)
    write(workdir, "kd", [1, 2])
    workdir.metrics_file.write_text(workdir.metrics_file.read_text().rstrip("\n"))
    write(workdir, "kd", [3], resume_step=2)
    assert steps_of(workdir, "kd") == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error_and_the_file_is_left_alone(tmp_path):
    workdir = Workdir(tmp_path)
    text = '{"run": "kd", "step": 1}\nnot json\n{"run": "kd", "step": 3}\n'
    workdir.metrics_file.write_text(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .* got 'not json'"):
        MetricsWriter(workdir, "kd", 1)
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(workdir.metrics_file)
    assert workdir.metrics_file.read_text() == text


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricsWriter(workdir, "kd") as writer:
        writer.write(1, {"loss": 1.0})
        assert steps_of(workdir, "kd") == [1]


def event_scalars(workdir, run):
    """(step, value) of every scalar event and the purges, read with tensorboardX's own protobuf."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, purges = [], []
    for path in sorted(workdir.tensorboard(run).iterdir(), key=lambda path: path.name):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            if event.HasField("session_log"):
                purges.append(event.step)
            scalars += [(event.step, value.simple_value) for value in event.summary.value]
    return scalars, purges


def test_tensorboard_events_are_purged_from_the_restored_step_on(tmp_path):
    workdir = Workdir(tmp_path)
    write(workdir, "kd", [1, 2, 3])
    scalars, purges = event_scalars(workdir, "kd")
    assert [step for step, _ in scalars] == [1, 2, 3]
    np.testing.assert_allclose([value for _, value in scalars], [1 / 3, 2 / 3, 1], rtol=1e-6)
    assert purges == []
    write(Workdir(tmp_path / "second"), "kd", [3], resume_step=2)
    assert event_scalars(Workdir(tmp_path / "second"), "kd")[1] == [3]


def test_without_tensorboardx_there_is_one_line_in_the_log(tmp_path, monkeypatch, caplog):
    real_import = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    workdir = Workdir(tmp_path)
    with caplog.at_level(logging.INFO, "jaxdistill"):
        write(workdir, "kd", [1, 2])
    assert caplog.text.count("install jaxdistill[report]") == 1
    assert steps_of(workdir, "kd") == [1, 2]
    assert not workdir.tensorboard("kd").exists()
