"""Every example in a docstring runs, and importing the losses costs and touches nothing."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import jaxdistill
from jaxdistill import kernels, losses


def modules() -> list[str]:
    return [
        module.name
        for package in (jaxdistill, kernels)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.ispkg
    ]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_readme_snippet() -> None:
    """What the README tells people to type into a notebook runs as it stands."""
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(snippet, {})


def test_every_public_function_has_an_example() -> None:
    public = [getattr(losses, name) for name in losses.__all__]
    public += [getattr(losses.from_hidden, name) for name in losses.from_hidden.__all__]
    public += [getattr(kernels, name) for name in kernels.__all__]
    functions = [x for x in public if callable(x) and not isinstance(x, type)]
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []


def test_import_is_light() -> None:
    """No framework is pulled in, no device is touched, no variable is set."""
    program = (
        "import os, sys; before = dict(os.environ)\n"
        "import jax; set_by_jax = dict(os.environ)\n"
        "import jaxdistill.losses\n"
        "from jax._src import xla_bridge\n"
        "heavy = {'flax', 'optax', 'grain', 'orbax', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert dict(os.environ) == set_by_jax\n"
        "assert not xla_bridge._backends, 'a device was touched'\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
