"""The real TPU compiler on a machine without a TPU: `libtpu` compiles for a topology by name.

It runs in a process of its own, with the variables that silence its look for a real machine.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

PROGRAM = """
import contextlib, json, sys
import jax
from jax.experimental import topologies
from jaxdistill.kernels import compiling_for
import {module} as module
name, arguments, generation = sys.argv[1], json.loads(sys.argv[2]), sys.argv[4]
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[3])
devices = topology.devices
known = compiling_for(generation, len(devices)) if generation else contextlib.nullcontext()
with known:
    compiled = getattr(module, name)(devices, **arguments).compile()
memory = compiled.memory_analysis()
print(json.dumps({{"temporary": memory.temp_size_in_bytes}}))
"""


def compile_for(
    generation: str, module: str, function: str, *, known: bool = True, **arguments: object
) -> dict:
    """Compile `module.function(devices, **arguments)`, a lowered program, for a TPU generation.

    It is traced inside `compiling_for`, so kernels know the TPU, unless `known` is False.
    Returns its temporaries in bytes a chip, "temporary". Skips where libtpu cannot be had.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (it is x86-64 Linux only): pip install libtpu")
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM.format(module=module),
            function,
            json.dumps(arguments),
            TOPOLOGIES[generation],
            generation if known else "",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])
