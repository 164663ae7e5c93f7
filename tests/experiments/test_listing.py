import ast
import json
import pathlib
import subprocess
import sys

import pytest

from experiments import __main__ as listing

RECIPE = '''"""Heals a pruned model.

The paper is https://arxiv.org/abs/2410.09982 and says [more]; see also arXiv 1503.02531
and again arXiv:2410.09982.
"""
import nothing_of_this_name

PRESETS: dict = {"cpu": 1, "v5e-64": 2}


def run(config, context): ...
'''


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "distill" / "deep").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "distill" / "heal.py").write_text(RECIPE)
    (tmp_path / "distill" / "deep" / "plain.py").write_text(
        "'Plain arXiv: 1503.02531v1'\nPRESETS = make()\ndef run(config, context): ...\n"
    )
    (tmp_path / "quick.py").write_text("PRESETS = {'cpu': 1}\ndef run(config, context): ...\n")
    (tmp_path / "results" / "quick.json").write_text(json.dumps({"verdict": "held"}))
    # Neither of these is a recipe.
    (tmp_path / "distill" / "__init__.py").write_text('"""A family."""')
    (tmp_path / "distill" / "helpers.py").write_text("def run(): ...\nOTHER = {'cpu': 1}\n")
    (tmp_path / "distill" / "presets.py").write_text("PRESETS = {'cpu': 1}\n")
    return tmp_path


def test_recipes_are_found_and_read(folder: pathlib.Path) -> None:
    recipes = {recipe.name: recipe for recipe in listing.find(folder)}
    assert list(recipes) == ["distill.deep.plain", "distill.heal", "quick"]
    assert recipes["distill.heal"] == listing.Recipe(
        name="distill.heal",
        family="distill",
        title="Heals a pruned model.",
        papers=("2410.09982", "1503.02531"),
        presets=("cpu", "v5e-64"),
        verdict="-",
        description=ast.get_docstring(ast.parse(RECIPE)) or "",
    )
    assert recipes["distill.deep.plain"][1:-1] == (
        "distill.deep",
        "Plain arXiv: 1503.02531v1",
        ("1503.02531",),
        (),
        "-",
    )
    assert recipes["quick"][1:-1] == ("-", "", (), ("cpu",), "held")


def test_list_is_a_table_and_tells_how_to_run(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listing.main([], folder) == 0
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    title = "Heals a pruned model."
    assert ["distill.heal", "distill", "2410.09982", "-", "cpu", title] in rows
    assert ["", "", "1503.02531", "", "v5e-64", ""] in rows
    assert ["quick", "-", "-", "held", "cpu", ""] in rows
    assert "python -m experiments.NAME" in shown


@pytest.mark.parametrize("name", ["distill.heal", "experiments.distill.heal"])
def test_one_recipe_is_told_about(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert listing.main([name], folder) == 0
    shown = capsys.readouterr().out
    assert "says [more];" in shown
    assert "python -m experiments.distill.heal" in shown


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("distill.hael", "unknown recipe 'distill.hael': did you mean distill.heal?"),
        ("heal", "unknown recipe 'heal': did you mean distill.heal?"),
        ("zzz", "unknown recipe 'zzz': choose from distill.deep.plain, distill.heal, quick"),
    ],
)
def test_unknown_recipe_is_one_sentence(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str, sentence: str
) -> None:
    assert listing.main([name], folder) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"error: {sentence}\n")


def test_command_lists_this_tree_and_imports_no_jax() -> None:
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('experiments', run_name='__main__')\n"
        "finally:\n"
        "    assert 'jax' not in sys.modules, 'jax was imported'\n"
    )
    root = pathlib.Path(listing.__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for recipe in listing.find(listing.FOLDER):
        assert recipe.name in shown


def test_every_recipe_of_this_tree_has_a_title_and_a_cpu_preset() -> None:
    for recipe in listing.find(listing.FOLDER):
        assert recipe.title, recipe.name
        assert recipe.presets[:1] == ("cpu",), recipe.name
