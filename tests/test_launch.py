import dataclasses
import logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import launch
from jaxdistill.train.preemption import Preempted

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    """Peak of the schedule."""


@dataclasses.dataclass(frozen=True)
class Toy:
    steps: int = 3  # how many
    shuffle: bool = True
    title: str = "a [bold] title"
    widths: tuple[int, ...] = (1, 2)
    trainable: tuple[str, ...] = ("layers.*", "a, b")
    cap: float | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    warmup: Optimizer | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, not {self.steps}")


PRESETS = {"cpu": Toy(), "v5e-64": Toy(steps=1000, warmup=Optimizer("sgd"), weights={"a b": 1.0})}


DESCRIPTION = "A toy.\n\nCommand: [some]\n  A line of code.\nExpected: much"


def toy(run: Any = lambda config, context: None, presets: Any = PRESETS) -> launch.Experiment:
    return launch.Experiment("experiments.rl.toy", DESCRIPTION, presets, run)


def module(run: Any) -> dict[str, Any]:
    return {
        "__spec__": types.SimpleNamespace(name="experiments.rl.toy"),
        "__doc__": "A toy.",
        "PRESETS": PRESETS,
        "run": run,
    }


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def exit_of(run: Any, *arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        launch.main(module(run), arguments)
    return caught.value.code


# ---- Command lines that are right --------------------------------------------------------------


def test_nothing_given_is_the_first_preset() -> None:
    command = launch.parse(toy(), [])
    assert command == launch.Command("cpu", "runs/rl.toy-cpu", debug=False, config=Toy())


def test_preset_and_workdir() -> None:
    command = launch.parse(toy(), ["--preset", "v5e-64"])
    assert (command.workdir, command.config) == ("runs/rl.toy-v5e-64", PRESETS["v5e-64"])
    assert launch.parse(toy(), ["--workdir=/b/x"]).workdir == "/b/x"


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ("--steps 5", {"steps": 5}),
        ("--steps=5", {"steps": 5}),
        ("--steps 5 --steps 6", {"steps": 6}),
        ("--shuffle false", {"shuffle": False}),
        ("--title=", {"title": ""}),
        ("--title=--dashes", {"title": "--dashes"}),
        ("--cap -3", {"cap": -3.0}),
        ("--cap=-inf", {"cap": float("-inf")}),
        ("--widths 3,4,5", {"widths": (3, 4, 5)}),
        ("--optimizer.learning-rate 1e-4", {"optimizer": Optimizer(learning_rate=1e-4)}),
        ("--optimizer.learning_rate 1e-4", {"optimizer": Optimizer(learning_rate=1e-4)}),
        ("--warmup.name sgd", {"warmup": Optimizer("sgd")}),
        ("--set steps=5 --set optimizer.name=sgd", {"steps": 5, "optimizer": Optimizer("sgd")}),
        ("--set steps=5 --cap 1", {"steps": 5, "cap": 1.0}),
        ("--preset v5e-64 --warmup none --steps 3 --weights {}", {}),
    ],
)
def test_options_and_set_change_the_preset(arguments: str, change: dict[str, Any]) -> None:
    assert launch.parse(toy(), arguments.split()).config == dataclasses.replace(Toy(), **change)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_option_takes_the_default_that_help_shows(preset: str) -> None:
    config = PRESETS[preset]
    other = Toy(1, False, "x", (), (), 1.0, {"b": 2.0}, Optimizer("sgd", 3.0), Optimizer())
    arguments = []
    for key, _, value, _ in configs.options(config):
        if not (key.startswith("warmup.") and config.warmup is None):
            arguments += [f"{launch._flag(key)}", launch._written(value)]
    assert launch.parse(toy(presets={"cpu": other}), arguments).config == config


# ---- Help --------------------------------------------------------------------------------------


def test_help_shows_every_option_its_default_and_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        launch.main({**module(None), "__doc__": DESCRIPTION}, ["--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.replace("│", " ").split())
    assert shown.startswith(f"{DESCRIPTION}\n\nusage: python -m experiments.rl.toy ")
    assert "--preset NAME Configuration to start from: cpu, v5e-64. (default: cpu)" in words
    assert "(default: runs/rl.toy-PRESET)" in words
    assert "--set KEY=VALUE" in words
    assert "--debug" in words
    assert "--steps INT how many (default: 3)" in words
    assert "--shuffle true|false (default: true)" in words
    assert "--title TEXT (default: 'a [bold] title')" in words
    assert "--widths INT,... (default: 1,2)" in words
    assert """--trainable TEXT,... (default: '["layers.*", "a, b"]')""" in words
    assert "--cap FLOAT|none (default: none)" in words
    assert "--weights JSON (default: '{}')" in words
    assert "--optimizer.name adamw|sgd (default: adamw)" in words
    assert "--optimizer.learning-rate FLOAT Peak of the schedule. (default: 0.001)" in words
    assert "--warmup none (default: none)" in words


def test_help_shows_the_preset_that_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(None, "--preset", "v5e-64", "-h") == 0
    assert "(default: 1000)" in capsys.readouterr().out
    assert exit_of(None, "--preset", "nope", "--help") == 0
    assert "(default: 3)" in capsys.readouterr().out


def test_help_imports_no_jax(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(
        "import dataclasses, sys\n"
        "from jaxdistill import launch\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n"
        "    steps: int = 3\n"
        "    'How many.'\n"
        "PRESETS = {'cpu': Config()}\n"
        "run = print\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        launch.main(globals())\n"
        "    finally:\n"
        "        assert 'jax' not in sys.modules, 'jax was imported'\n"
    )
    command = [sys.executable, str(script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "How many. (default: 3)" in " ".join(shown.split())
    assert "usage: python -m toy " in shown


# ---- Command lines that are wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--stps 3", "unknown option --stps: did you mean --steps?"),
        ("--stps=3", "unknown option --stps: did you mean --steps?"),
        (
            "--learning-rte 3",
            "unknown option --learning-rte: did you mean --optimizer.learning-rate?",
        ),
        (
            "--optimizer.learning_rte 3",
            "unknown option --optimizer.learning_rte: did you mean --optimizer.learning-rate?",
        ),
        ("--presets cpu", "unknown option --presets: did you mean --preset?"),
        ("-x", "unknown option -x: --help lists them"),
        ("3", "unexpected argument '3': write options as --name value"),
        ("--debug true", "unexpected argument 'true': write options as --name value"),
        ("--steps", "--steps needs a value (one that begins with a dash is written --steps=-...)"),
        ("--steps --cap 3", "--steps needs a value ("),
        ("--cap 3 --set", "--set needs a value ("),
        ("--optimizer.learning_rate", "--optimizer.learning_rate needs a value ("),
        ("--preset laptop", "unknown preset 'laptop': choose from cpu, v5e-64"),
        ("--preset v5e64", "unknown preset 'v5e64': did you mean v5e-64?"),
        ("--steps x", "steps must be an integer, not 'x'"),
        ("--shuffle maybe", "shuffle must be true or false, not 'maybe'"),
        ("--optimizer.learning-rate x", "optimizer.learning_rate must be a number, not 'x'"),
        ("--optimizer.name adam", "optimizer.name must be one of 'adamw', 'sgd', not 'adam': did "),
        ("--set stps=3", "unknown key 'stps': did you mean steps?"),
        ("--set steps", "an override is written key=value, not 'steps'"),
        ("--set steps=1 --steps 3", "steps is given by --set and by --steps: keep one of them"),
        ("--steps 0", "steps must be positive, not 0"),
    ],
)
def test_wrong_command_line_is_one_sentence(
    arguments: str, sentence: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(None, *arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {sentence}")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_refused_workdir_is_one_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.main(module(lambda *_: None), [])
    capsys.readouterr()
    assert exit_of(None, "--steps", "4") == 2
    assert capsys.readouterr().err == (
        "error: runs/rl.toy-cpu was begun with another configuration (steps: 3 -> 4): use the "
        "same values to resume, choose another --workdir, or delete it to start over\n"
    )


# ---- Running -----------------------------------------------------------------------------------


def test_run_gets_its_configuration_and_context(tmp_path: pathlib.Path) -> None:
    calls = []

    def run(config: Toy, context: launch.Context) -> None:
        assert context.workdir.config_file.exists()
        calls.append((config, context.preset, context.workdir.path, context.console.print))

    launch.main(module(run), ["--preset", "v5e-64", "--cap", "2", "--workdir", "w"])
    config, preset, path, _ = calls[0]
    assert config == dataclasses.replace(PRESETS["v5e-64"], cap=2.0)
    assert (preset, path) == ("v5e-64", pathlib.Path("w"))
    assert (tmp_path / "w" / "config.json").exists()


def refuse(config: Toy, context: launch.Context) -> None:
    raise ValueError("seven layers cannot be dropped from six: drop fewer")


def test_refusal_of_our_own_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    own = _ours(refuse)
    assert exit_of(own) == 1
    assert capsys.readouterr().err == (
        "error: seven layers cannot be dropped from six: drop fewer (--debug shows where)\n"
    )
    with pytest.raises(ValueError, match="seven layers"):
        launch.main(module(own), ["--debug"])


def _ours(function: Any) -> Any:
    """The function as if it stood in an experiment module."""
    return types.FunctionType(function.__code__, {**globals(), "__name__": "experiments.toy"})


def missing(config: Toy, context: launch.Context) -> None:
    raise FileNotFoundError("weights.gguf is in none of three places: set JAXDISTILL_DATA")


def broken_library(config: Toy, context: launch.Context) -> None:
    np.linalg.cholesky(np.zeros((2, 3)))


def broken_c_function(config: Toy, context: launch.Context) -> None:
    np.zeros(2).reshape(3, 3)


def broken_ourselves(config: Toy, context: launch.Context) -> None:
    raise KeyError("head")


def test_missing_file_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(_ours(missing)) == 1
    assert capsys.readouterr().err.startswith("error: weights.gguf is in none of three places")


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (broken_library, np.linalg.LinAlgError),
        (broken_c_function, ValueError),
        (broken_ourselves, KeyError),
    ],
)
def test_bugs_keep_their_traceback(run: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        launch.main(module(_ours(run)), [])


def test_refusal_of_another_library_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="seven layers"):
        launch.main(module(refuse), [])  # `refuse` stands in this test module, not in ours


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Toy, context: launch.Context) -> None:
        raise KeyboardInterrupt

    assert exit_of(run) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_preempted(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Toy, context: launch.Context) -> None:
        raise Preempted("kd was stopped after step 3", signal.SIGTERM)

    assert exit_of(run) == 143
    printed = capsys.readouterr().err
    assert printed.startswith("kd was stopped after step 3")
    assert printed.endswith(": the same command goes on from there\n")


def test_logging_shows_ours_and_hushes_others(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Toy, context: launch.Context) -> None:
        import absl.logging

        logging.getLogger("jaxdistill.train").info("ours at info")
        logging.getLogger("experiments.toy").info("recipe at [bold] info")
        logging.getLogger("jaxdistill.train").debug("ours at debug")
        logging.getLogger("somebody").info("theirs at info")
        logging.getLogger("somebody").warning("theirs at warning")
        logging.getLogger("orbax.checkpoint").setLevel(logging.DEBUG)
        logging.getLogger("orbax.checkpoint").warning("orbax at warning")
        absl.logging.info("absl at info")
        absl.logging.warning("absl at warning")
        absl.logging.error("absl at error")

    launch.main(module(run), [])
    printed = capsys.readouterr()
    for shown in ("ours at info", "recipe at [bold] info", "theirs at warning", "absl at error"):
        assert shown in printed.out
    assert "experiments.rl.toy, preset cpu, in runs/rl.toy-cpu" in printed.out
    for hidden in ("ours at debug", "theirs at info", "orbax at", "absl at info", "absl at warn"):
        assert hidden not in printed.out + printed.err


def test_killed_and_started_again_from_the_command_line(tmp_path: pathlib.Path) -> None:
    """A real process: the last lines of a module, kill -9 while it runs, the same command again."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "toy.py").write_text(
        "import dataclasses, time\n"
        "from jaxdistill import launch\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n"
        "    steps: int = 3\n"
        "PRESETS = {'cpu': Config()}\n"
        "def run(config, context):\n"
        "    log = context.workdir.metrics_file\n"
        "    seen = log.exists()\n"
        "    log.write_text('x')\n"
        "    print('resumed' if seen else 'begun', flush=True)\n"
        "    time.sleep(0 if seen else 60)\n"
        "if __name__ == '__main__':\n"
        "    launch.main(globals())\n"
    )
    command = shlex.split(f"{sys.executable} -m experiments.toy --steps 4")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "begun" not in (line := process.stdout.readline()):
            assert line, "the experiment ended before it began"
        process.kill()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "resumed" in again.stdout
    assert "in runs/toy-cpu" in again.stdout
