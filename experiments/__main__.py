"""`python -m experiments` lists the recipes; `python -m experiments NAME` tells about one.

A recipe is a module in this folder that defines `PRESETS` and `run`. Modules are read, never
imported, so the list is there at once and a recipe that needs more than is installed is listed too.
"""

import ast
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import rich.console
import rich.markup
import rich.table

from jaxdistill import config

FOLDER = pathlib.Path(__file__).parent


class Recipe(NamedTuple):
    """What the list shows of one experiment module."""

    name: str
    family: str
    title: str
    papers: tuple[str, ...]
    presets: tuple[str, ...]
    verdict: str
    description: str


def find(folder: pathlib.Path) -> list[Recipe]:
    """The recipes under `folder`, sorted by name."""
    recipes = (_read(path, folder) for path in sorted(folder.rglob("*.py")))
    return [recipe for recipe in recipes if recipe is not None]


def main(arguments: Sequence[str], folder: pathlib.Path = FOLDER) -> int:
    """List all recipes, or tell about the one that `arguments` name; returns the exit code."""
    recipes = {recipe.name: recipe for recipe in find(folder)}
    console = rich.console.Console()
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(_table(list(recipes.values())))
        console.print("About one: python -m experiments NAME")
        console.print("Run one:   python -m experiments.NAME --preset PRESET (--help: its options)")
        return 0
    name = arguments[0].removeprefix("experiments.")
    if name not in recipes:
        print(f"error: unknown recipe {name!r}: {config.suggest(name, recipes)}", file=sys.stderr)
        return 2
    console.print(rich.markup.escape(recipes[name].description))
    console.print(f"\nRun it: python -m experiments.{name} (--help: its options)")
    return 0


def _read(path: pathlib.Path, folder: pathlib.Path) -> Recipe | None:
    """The recipe in the file `path`; None if it holds none."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    presets = _presets(tree)
    if presets is None or "run" not in functions:
        return None
    parts = path.relative_to(folder).with_suffix("").parts
    name, description = ".".join(parts), ast.get_docstring(tree) or ""
    papers = re.findall(r"arxiv(?:\.org/abs/|:?\s*)(\d{4}\.\d{4,5})", description, re.IGNORECASE)
    return Recipe(
        name=name,
        family=".".join(parts[:-1]) or "-",
        title=description.partition("\n")[0],
        papers=tuple(dict.fromkeys(papers)),
        presets=presets,
        verdict=_verdict(folder / "results" / f"{name}.json"),
        description=description,
    )


def _presets(tree: ast.Module) -> tuple[str, ...] | None:
    """The keys of the dictionary `PRESETS` of a module; None if it has no PRESETS."""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "PRESETS" for target in targets):
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))
    return None


def _verdict(results: pathlib.Path) -> str:
    return json.loads(results.read_text(encoding="utf-8"))["verdict"] if results.exists() else "-"


def _table(recipes: Sequence[Recipe]) -> rich.table.Table:
    table = rich.table.Table()
    for column in ("recipe", "family", "arXiv", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("presets")
    table.add_column("what it does")
    for recipe in recipes:
        name, family, title, papers, presets, verdict, _ = recipe
        cells = (name, family, "\n".join(papers) or "-", verdict, "\n".join(presets), title)
        table.add_row(*map(rich.markup.escape, cells))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
