"""The quickstart: its story on a tiny teacher, killed and resumed, and on the real model (slow)."""

import dataclasses
import html.parser
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from experiments import quickstart
from experiments.lab.measure import Model, quality
from jaxdistill import config as configs
from jaxdistill import launch
from jaxdistill.convert import huggingface
from jaxdistill.data import pipeline, tokenizers
from jaxdistill.models import decoder
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
            "COLUMNS": "200",
            # What one process compiled the next ones load: nearly all the time goes there.
            "JAX_COMPILATION_CACHE_DIR": str(path.parent.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def outcome(path: pathlib.Path) -> tuple:
    """All that must not depend on how often a run was killed: results, losses, exported weights."""
    results = results_of(path)
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
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed.decode()
    (path.parent / "printed").write_bytes(printed)
    return path


def results_of(path: pathlib.Path) -> dict:
    return json.loads((path / "results.json").read_text())


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
    results = results_of(finished)
    assert list(results) == ["teacher", "pruned", "healed by CE", "healed by KD"]
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
    teacher, _ = tiny_quickstart.teacher()
    layer = sum(np.prod(x.shape[1:]) for x in _leaves(teacher.params["layers"]))
    lost = results["teacher"]["parameters"] - results["pruned"]["parameters"]
    assert lost == tiny_quickstart.CONFIG.dropped_layers * layer
    before, after = results["pruned"], results["healed by KD"]
    assert after["kl_to_teacher"] < before["kl_to_teacher"]


def test_prints_the_table_the_verdict_and_a_sample_of_each(finished) -> None:
    printed = (finished.parent / "printed").read_text()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    for name, row in results_of(finished).items():
        perplexity, kl, speed = (row[c] for c in ("perplexity", "kl_to_teacher", TIMED[0]))
        size = f"{row['parameters'] / 1e6:.1f}M"
        assert [name, f"{perplexity:.2f}", f"{kl:z.3f}", size, f"{speed:.1f}"] in lines
        assert f"{name} answers {row['sample']!r}" in printed
    for title, _ in quickstart.COLUMNS.values():
        assert title in printed
    assert f"asked {tiny_quickstart.CONFIG.prompt!r}, it answers" in printed
    assert "the distilled student's KL to the teacher is" in printed


@pytest.mark.parametrize(
    ("kd", "words"),
    [
        ((0.5, 44.0), "50.0% lower and its held-out perplexity 10.0% higher"),
        ((1.25, 30.0), "25.0% higher and its held-out perplexity 25.0% lower"),
    ],
)
def test_verdict_says_whatever_came_out(kd, words) -> None:
    rows = [dict(zip(("kl_to_teacher", "perplexity"), pair, strict=True)) for pair in ((1, 40), kd)]
    named = dict(zip(quickstart.ARMS.values(), rows, strict=True))
    assert words in quickstart.verdict(named)


def test_the_export_is_the_student_of_the_table(finished, monkeypatch, tmp_path) -> None:
    config, params = huggingface.load(finished / "export")
    files = tiny_quickstart.texts(tmp_path)
    monkeypatch.setattr(quickstart.sources, "resolve", files.__getitem__)
    teacher, tokenizer = tiny_quickstart.teacher()
    text = quickstart.load_text(tiny_quickstart.CONFIG, tokenizer)
    batches = quickstart.held_out_batches(text, tiny_quickstart.CONFIG, config.vocab_size)
    found = quality(Model(params, config), teacher, batches)
    row = results_of(finished)["healed by KD"]
    assert tuple(found) == pytest.approx((row["perplexity"], row["kl_to_teacher"]), rel=1e-5)


@pytest.mark.parity
def test_transformers_loads_the_export(finished) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    export = finished / "export"
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    text = "what is this, and how?"
    tokens = tokenizers.load(export).encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    assert theirs.encode(text, add_special_tokens=False) == tokens
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits.numpy()
    config, params = huggingface.load(export)
    hidden = decoder.apply(params, np.array([tokens], np.int32), config).hidden
    np.testing.assert_allclose(decoder.logits(params, hidden, config), expected, atol=1e-4)


def test_prunes_the_block_that_changes_nothing() -> None:
    teacher, tokenizer = tiny_quickstart.teacher()
    params = jax.tree.map(np.array, teacher.params)
    for branch in (params["layers"]["attention"]["output"], params["layers"]["mlp"]["down"]):
        branch["kernel"][1:3] = 0
    texts = pipeline.tokenize(["some words", "a b. c?", "and others"], tokenizer)
    config = dataclasses.replace(tiny_quickstart.CONFIG, dropped_layers=2)
    first, student = quickstart.prune(Model(params, teacher.config), texts, config)
    assert first == 1
    assert student.config.num_layers == teacher.config.num_layers - 2
    kept = jax.tree.map(lambda leaf: leaf[[0, 3, 4]], params["layers"])
    chex.assert_trees_all_equal(student.params["layers"], kept)


def test_both_arms_saw_the_same_tokens(finished) -> None:
    weights = {
        arm: [r["weight"] for r in read_metrics(finished / "metrics.jsonl", arm) if "loss" in r]
        for arm in quickstart.ARMS
    }
    assert len(weights["ce"]) == tiny_quickstart.CONFIG.steps
    assert weights["ce"] == weights["kd"]
    # Which decides the batches and their order, by what tests/data/test_pipeline.py proves.
    checkpoints = finished / "checkpoints"
    saved = {
        arm: (checkpoints / arm / str(tiny_quickstart.CONFIG.steps) / "fingerprint/metadata")
        for arm in quickstart.ARMS
    }
    data = {arm: json.loads(path.read_text())["data"] for arm, path in saved.items()}
    assert data["ce"] == data["kd"]
    assert {"content", "seed", "batch_size", "sources", "tokenizer"} <= data["kd"].keys()


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
    for text in ("healed by KD", "held-out perplexity", tiny_quickstart.CONFIG.prompt, "<svg"):
        assert text in page
    assert "src=" not in page
    assert "<link" not in page


@pytest.mark.parametrize(
    "marker",
    [
        "checkpoints/ce",
        "checkpoints/kd",
        pytest.param("config.json", marks=pytest.mark.slow),
        pytest.param("results.json", marks=pytest.mark.slow),
        pytest.param("checkpoints/kd/2", marks=pytest.mark.slow),
        pytest.param("export", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(finished, tmp_path, marker) -> None:
    """kill -9 as soon as this path appears, then once more to the end: the same run."""
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


def test_help_shows_every_option_with_its_default(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit, match=r"^0$"):
        launch.main(vars(quickstart), ["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(quickstart.__doc__.strip())
    assert "usage: python -m experiments.quickstart" in shown
    words = " ".join(shown.replace("│", " ").split())
    for key, _, value, help in configs.options(quickstart.Config()):
        assert help, f"{key} has no words of help"
        told = words.split(f" --{key.replace('_', '-')} ")[1].split(" --")[0]
        assert help in told
        assert f"(default: {shlex.quote(launch._written(value))})" in told


def test_the_tokenizer_of_another_model_is_refused(monkeypatch) -> None:
    model, tokenizer = tiny_quickstart.teacher()
    other = dataclasses.replace(model.config, vocab_size=512)
    monkeypatch.setattr(quickstart.sources, "resolve", lambda name: name)
    monkeypatch.setattr(quickstart.gguf, "load", lambda path: (other, model.params))
    monkeypatch.setattr(quickstart.gguf, "load_tokenizer", lambda path: tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 32 tokens but the model's vocabulary"):
        quickstart.load_teacher(quickstart.Config())


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
    results = results_of(path)
    assert "Paris" in results["teacher"]["sample"]
    assert results["healed by KD"]["kl_to_teacher"] < results["healed by CE"]["kl_to_teacher"]
    config, _ = huggingface.load(path / "export")
    assert config.num_layers == 24


def _leaves(tree: dict) -> list[np.ndarray]:
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]
