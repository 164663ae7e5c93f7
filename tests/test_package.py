"""What holds for the package as a whole: its imports, its size, its wheel."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NEW_PROCESS_IMPORTS = "from jaxdistill import losses"


def python(code: str, *, cwd: pathlib.Path, **environment: str) -> str:
    """The output of `code` in a new process that knows nothing of pytest or of this folder."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(*folders: str) -> Iterator[pathlib.Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("jaxdistill", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, by its full name."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    return found


def importers(package: str, *folders: str) -> list[str]:
    def inside(name: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    found = (path for path in sources(*folders) if any(map(inside, imports(path))))
    return [path.relative_to(ROOT).as_posix() for path in found]


# ---- Who imports what --------------------------------------------------------------------------


def test_the_import_walk_sees_all_forms(tmp_path: pathlib.Path) -> None:
    path = ROOT / "jaxdistill" / "data" / "imagined.py"  # a name only: it decides what `.` means
    file = tmp_path / "source.py"
    file.write_text("import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    import g as h\n")
    stand_in = type("", (), {"read_text": file.read_text, "relative_to": path.relative_to})()
    stand_in.name = path.name
    found = imports(stand_in)
    assert {"a.b", "jaxdistill.data.c", "jaxdistill.d", "jaxdistill.d.e", "g"} <= found


def test_kernels_import_jax_alone() -> None:
    allowed = {"jax", "jaxdistill.kernels", *sys.stdlib_module_names}
    for path in sources("kernels"):
        for name in imports(path):
            parents = {name.split(".")[0], ".".join(name.split(".")[:2])}
            assert allowed & parents, f"{path.relative_to(ROOT)} imports {name}"


def test_losses_import_arrays_and_kernels_alone() -> None:
    below = ("jax", "numpy", "jaxdistill.losses", "jaxdistill.kernels")
    for path in sources("jaxdistill/losses"):
        for name in imports(path) - {"jaxdistill"}:
            known = name.split(".")[0] in sys.stdlib_module_names
            assert known or f"{name}.".startswith(tuple(f"{package}." for package in below)), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_imports_go_down_only() -> None:
    for package in ("experiments", "tests", "kernels"):
        assert importers(package, "jaxdistill", "kernels") == []
    assert importers("tests", "experiments") == []


def test_one_file_each_knows_grain_and_orbax() -> None:
    everywhere = ("jaxdistill", "kernels", "experiments")
    assert importers("grain", *everywhere) == ["jaxdistill/data/pipeline.py"]
    assert importers("orbax", *everywhere) == ["jaxdistill/train/checkpoint.py"]


# ---- What an import does -----------------------------------------------------------------------


def all_modules() -> list[str]:
    return [module_name(path) for path in sources("jaxdistill", "kernels")]


def test_import_sets_no_environment_variable(tmp_path: pathlib.Path) -> None:
    code = f"""
import importlib, jax, json, os
before = dict(os.environ)
for name in {all_modules()}:
    importlib.import_module(name)
print(json.dumps([before, dict(os.environ)]))
"""
    before, after = json.loads(python(code, cwd=tmp_path))
    assert after == before


def test_import_touches_no_device(tmp_path: pathlib.Path) -> None:
    """With a platform that does not exist, the first touch of a device raises."""
    code = f"""
import importlib
for name in {all_modules()}:
    importlib.import_module(name)
import jax
try:
    jax.devices()
except RuntimeError:
    print("no device until now")
"""
    assert python(code, cwd=tmp_path, JAX_PLATFORMS="imagined") == "no device until now\n"


def test_import_is_quick_after_jax(tmp_path: pathlib.Path) -> None:
    """Processor seconds, which a busy machine does not stretch as it does those of the clock."""
    code = f"""
import jax, time
start = time.process_time()
import jaxdistill
{NEW_PROCESS_IMPORTS}
print(time.process_time() - start)
"""
    assert float(python(code, cwd=tmp_path)) < 2


# ---- The README's commands ---------------------------------------------------------------------


def readme_commands() -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```bash\n(.*?)\n```", readme, flags=re.DOTALL)


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = (c for c in readme_commands() if c.endswith("-m tests"))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    plain = script.replace('"', "").replace("--quiet --editable", "-e")
    lines = plain.replace("$environment", ".venv").splitlines()
    assert command.split(" && ") == [line for line in lines if re.search(r"venv |/bin/", line)][-3:]


def test_extras_that_the_readme_installs_exist() -> None:
    known = set(importlib.metadata.metadata("jaxdistill").get_all("Provides-Extra") or ())
    named = re.findall(r"'\.\[(.*?)\]'", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) >= 4
    assert {extra for names in named for extra in names.split(",")} <= known


# ---- Size --------------------------------------------------------------------------------------


def test_no_file_is_over_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources("jaxdistill", "kernels", "experiments", "tests")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


# ---- Installed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel of this tree, built from a copy: a build leaves its traces where it runs."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("jaxdistill", "kernels", "experiments", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path_factory.mktemp("wheel")
    command = ["build", "--wheel", "--no-isolation", "--outdir", str(output), str(copy)]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_nothing_else(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {"jaxdistill/py.typed"}
    for path in sources("jaxdistill", "kernels"):
        relative = path.relative_to(ROOT).as_posix()
        expected.add(f"jaxdistill/{relative}" if relative.startswith("kernels/") else relative)
    assert packed == expected


def test_installed_wheel_works_from_another_folder(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "site"
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([sys.executable, *install, wheel], check=True)
    code = f"""
import importlib, sys
import numpy as np
for name in {all_modules()}:
    importlib.import_module(name)
print(sys.modules["jaxdistill.kernels.linear_divergence"].__file__)
from jaxdistill.losses import from_hidden
hidden, head = np.ones((1, 2), np.float32), np.eye(2, dtype=np.float32)
print(from_hidden.forward_kl(hidden, head, hidden, 2 * head))
"""
    file, divergence = python(code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    expected = target / "jaxdistill" / "kernels" / "linear_divergence" / "__init__.py"
    assert pathlib.Path(file) == expected
    assert divergence == "[0.]"  # both uniform


def test_kernels_are_found_from_another_folder_in_this_environment(tmp_path: pathlib.Path) -> None:
    """The README's command installs editable: the modules are then those of this tree."""
    code = (
        "import sys, jaxdistill.kernels.linear_divergence\n"
        "for name in ('jaxdistill', 'jaxdistill.kernels.linear_divergence'):\n"
        "    print(sys.modules[name].__file__)"
    )
    package, kernel = map(pathlib.Path, python(code, cwd=tmp_path).splitlines())
    if package == ROOT / "jaxdistill" / "__init__.py":
        assert kernel == ROOT / "kernels" / "linear_divergence" / "__init__.py"
    else:
        assert kernel == package.parent / "kernels" / "linear_divergence" / "__init__.py"
