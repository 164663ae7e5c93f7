"""Every notebook runs from top to bottom in a fresh kernel, and is stored as it ran."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def kinds_of_output(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell of code printed or drew, without the numbers."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        sorted({kind for output in cell.outputs for kind in output.get("data", {"text": None})})
        for cell in cells
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: pathlib.Path) -> None:
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    assert kinds_of_output(fresh) == kinds_of_output(stored)
    assert any("image/png" in kinds for kinds in kinds_of_output(fresh))
