"""Programs under the real TPU compiler; skips where libtpu cannot be had."""

import pytest

from jaxdistill.parallel import ahead_of_time
from jaxdistill.parallel.ahead_of_time import TOPOLOGIES, Compiled, Program

__all__ = ["TOPOLOGIES", "compile_for"]


def compile_for(
    generation: str, module: str, function: str, *, known: bool = True, **arguments: object
) -> Compiled:
    """Compile `module.function(devices, **arguments)`, a lowered program, for a TPU generation.

    Unless `known`, its kernels are not told which one.
    """
    if not ahead_of_time.is_available():
        pytest.skip("libtpu is not installed (it is x86-64 Linux only): pip install libtpu")
    program = Program(module, function, arguments)
    (found,) = ahead_of_time.compile_all(generation, [program], known=known)
    assert isinstance(found, Compiled), found
    return found
