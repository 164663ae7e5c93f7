"""The quickstart: its story on a tiny teacher, killed and resumed, and on the real model (slow)."""

import html.parser
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from experiments import quickstart
from jaxdistill import config as configs
from jaxdistill.convert import huggingface
from jaxdistill.train.metrics import read_metrics
from tests.experiments import tiny_quickstart

ROOT = pathlib.Path(__file__).parents[2]
TIMED = ("tokens_per_second",)


def start(path: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.tiny_quickstart", str(path)],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # What one process compiled the next ones load: nearly all the time goes there.
            "JAX_COMPILATION_CACHE_DIR": str(path.parent.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def outcome(path: pathlib.Path) -> tuple:
    """All that must not depend on how often a run was killed: results, losses, exported weights."""
    results = json.loads((path / "results.json").read_text())
    metrics = [
        {key: value for key, value in row.items() if "second" not in key}
        for row in read_metrics(path / "metrics.jsonl")
    ]
    for row in results.values():
        for name in TIMED:
            row.pop(name)
    return results, metrics, (path / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("quickstart") / "run"
    process = start(path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return path


def test_workdir_holds_what_the_design_names(finished) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "checkpoints",
        "config.json",
        "export",
        "metrics.jsonl",
        "report.html",
        "results.json",
        "tensorboard",
    }
    assert list((finished / "tensorboard" / "kd").iterdir())
    exported = {path.name for path in (finished / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported


def test_table_rows(finished) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["teacher", "pruned", "healed by CE", "healed by KD"]
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
    teacher, _ = tiny_quickstart.teacher()
    layer = sum(np.prod(x.shape[1:]) for x in _leaves(teacher.params["layers"]))
    lost = results["teacher"]["parameters"] - results["pruned"]["parameters"]
    assert lost == tiny_quickstart.CONFIG.dropped_layers * layer
    before, after = results["pruned"], results["healed by KD"]
    assert after["kl_to_teacher"] < before["kl_to_teacher"]


def test_both_arms_saw_the_same_tokens(finished) -> None:
    weights = {
        arm: [r["weight"] for r in read_metrics(finished / "metrics.jsonl", arm) if "loss" in r]
        for arm in quickstart.ARMS
    }
    assert len(weights["ce"]) == tiny_quickstart.CONFIG.steps
    assert weights["ce"] == weights["kd"]


def test_only_the_layers_and_the_final_norm_are_trained(finished) -> None:
    teacher, _ = tiny_quickstart.teacher()
    config, exported = huggingface.load(finished / "export")
    assert config.num_layers == teacher.config.num_layers - tiny_quickstart.CONFIG.dropped_layers
    np.testing.assert_array_equal(
        exported["embed"]["embedding"], np.asarray(teacher.params["embed"]["embedding"])
    )
    assert not np.array_equal(
        exported["final_norm"]["scale"], np.asarray(teacher.params["final_norm"]["scale"])
    )


def test_report_is_one_file_with_the_table(finished) -> None:
    page = (finished / "report.html").read_text()
    html.parser.HTMLParser().feed(page)
    for text in ("healed by KD", "held-out perplexity", "what is this?", "<svg"):
        assert text in page
    assert "src=" not in page
    assert "<link" not in page


@pytest.mark.parametrize("marker", ["checkpoints/ce", "checkpoints/kd"])
def test_killed_and_started_again(finished, tmp_path, marker) -> None:
    """kill -9 as soon as an arm's folder appears, then once more to the end: the same run."""
    path = tmp_path / "run"
    process = start(path)
    deadline = time.monotonic() + 240
    while not (path / marker).exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = start(path)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors.decode()
    assert outcome(path) == outcome(finished)


def test_held_out_documents_are_never_trained_on(monkeypatch, tmp_path) -> None:
    shared = "the same words."
    (tmp_path / "train").write_text(f"one\n{shared}\n")
    (tmp_path / "held").write_text(f"The  SAME words.\ntwo\n{shared}\n")
    files = {"lee-background": tmp_path / "train", "lee-evaluation": tmp_path / "held"}
    monkeypatch.setattr(quickstart.sources, "resolve", files.__getitem__)
    _, tokenizer = tiny_quickstart.teacher()
    text = quickstart.load_text(quickstart.Config(), tokenizer)
    assert [tokenizer.decode(example.tokens[:-1]) for example in text.held_out] == ["two"]


def test_official_weights_of_the_hub(monkeypatch, tmp_path) -> None:
    """The same answer to `load_teacher` from a folder in the hub's layout."""
    model, tokenizer = tiny_quickstart.teacher()
    huggingface.export(tmp_path, model.config, model.params, tokenizer)
    monkeypatch.setattr(quickstart.hub, "fetch_hub", lambda repo, name, revision: tmp_path / name)
    loaded, loaded_tokenizer = quickstart.load_teacher(quickstart.Config(weights="hub"))
    chex.assert_trees_all_equal(loaded.params, model.params)
    assert loaded_tokenizer.encode("what is this?") == tokenizer.encode("what is this?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=2", "warmup_steps is 2 but the run has 2 steps"),
        ("dropped_layers=0", "dropped_layers must be at least 1, got 0"),
    ],
)
def test_impossible_configurations_stop_at_once(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        configs.apply_overrides(quickstart.Config(), [change])


@pytest.mark.slow
def test_real_model_smoke(tmp_path) -> None:
    """SmolLM2 through every stage; killed once in the middle, resumed, and it must be Paris."""
    path = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.quickstart", "--preset", "smoke"]
    command += ["--workdir", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (path / "checkpoints" / "kd").exists():
        assert process.poll() is None
        time.sleep(0.5)
    process.kill()
    process.wait()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((path / "results.json").read_text())
    assert "Paris" in results["teacher"]["sample"]
    assert results["healed by KD"]["kl_to_teacher"] < results["healed by CE"]["kl_to_teacher"]
    config, _ = huggingface.load(path / "export")
    assert config.num_layers == 24


def _leaves(tree: dict) -> list[np.ndarray]:
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]
