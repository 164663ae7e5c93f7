"""The real TPU compiler on a machine without a TPU: libtpu compiles for a topology by name.

It runs in a process of its own, for three reasons: its variables must be set before it is loaded,
it aborts the process where it gives up, and its estimates of cycles are written to files.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# The smallest topology of each generation.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# They silence the compiler's look for a real machine, and let several processes load it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MARK = "compiled: "  # what a line with a result begins with


class Program(NamedTuple):
    """What to compile: `function(devices, **arguments)` of a module returns a jax.stages.Lowered.

    It is traced as a program of one device; one of several says so by `kernels.compiling_for`.
    """

    module: str
    function: str
    arguments: dict[str, Any]


class Compiled(NamedTuple):
    """What the compiler says of a program, a chip.

    temporary: bytes of HBM beside arguments and results.
    cycles: estimated by name of the operation; empty unless asked for. Static: it follows the grid
      of a kernel, but knows no values, so a branch that hangs on one is not counted.
    """

    temporary: int
    cycles: dict[str, int]


def is_available() -> bool:
    """Whether libtpu is installed: pip install libtpu, on x86-64 Linux."""
    return importlib.util.find_spec("libtpu") is not None


def compile_all(
    generation: str,
    programs: Sequence[Program],
    *,
    with_cycles: bool = False,
    known: bool = True,
    timeout: float = 600,
) -> list[Compiled | str]:
    """Compile programs one after another; the last words of the compiler where one fails.

    Args:
      generation: a key of TOPOLOGIES.
      programs: what to compile.
      with_cycles: whether to estimate cycles. It takes as long as the grid is large, and the
        compiler then keeps operands in HBM: it has no estimate for scalars read from VMEM.
      known: whether kernels are told the generation, by `kernels.compiling_for`.
      timeout: seconds a program may take.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
    """
    if not is_available():
        raise ModuleNotFoundError(
            "libtpu must be installed to compile for a TPU ahead of time, but it is not: "
            "pip install libtpu (x86-64 Linux only)"
        )
    found: list[Compiled | str] = []
    while len(found) < len(programs):  # a process that was aborted is followed by another
        rest = programs[len(found) :]
        found += _in_one_process(generation, rest, with_cycles, known, timeout)
    return found


def _in_one_process(
    generation: str, programs: Sequence[Program], with_cycles: bool, known: bool, timeout: float
) -> list[Compiled | str]:
    """As many results as there are until the first that ends the process, its own included."""
    found: list[Compiled | str] = []
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, **ENVIRONMENT}
        if with_cycles:
            environment["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_static_llo_profile_to={directory} --xla_msa_enable=false"
            )
        arguments = json.dumps([generation, programs, known])
        command = [sys.executable, "-m", __name__, directory, arguments]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            while len(found) < len(programs):
                timer = threading.Timer(timeout, process.kill)
                timer.start()
                line = process.stdout.readline()
                timer.cancel()
                if not line:
                    break
                if line.startswith(MARK):  # else the compiler's own words
                    found.append(Compiled(*json.loads(line[len(MARK) :])))
        if len(found) < len(programs):
            errors.seek(0)
            found.append(_reason(process.returncode, errors.read()))
    return found


def _reason(code: int, errors: str) -> str:
    """The line in which a process says why it ended."""
    if code == -signal.SIGKILL:
        return "killed: out of time or of memory"
    lines = [line for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Check failed|failed:|Error: ", line)]
    return (telling or lines or [f"ended with exit code {code}"])[-1]


def _estimates(directory: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(operation, cycles) of the files written so far, which are removed."""
    for file in sorted(directory.glob("*.textproto")):
        text = file.read_text()
        name = re.search(r'hlo_op_name: "(.*?)"', text)
        cycles = re.search(r"estimated_cycles: (\d+)", text)
        if name and cycles:
            yield name[1], int(cycles[1])
        file.unlink()


def _main(directory: pathlib.Path, generation: str, programs: list, known: bool) -> None:
    """Compile the programs and print a line for each."""
    from jax.experimental import topologies

    from jaxdistill.kernels import compiling_for

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    ).devices
    for module, function, arguments in programs:
        with compiling_for(generation) if known else contextlib.nullcontext():
            lowered = getattr(importlib.import_module(module), function)(devices, **arguments)
            compiled = lowered.compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(MARK + json.dumps((temporary, dict(_estimates(directory)))), flush=True)


if __name__ == "__main__":
    _main(pathlib.Path(sys.argv[1]), *json.loads(sys.argv[2]))
