"""The TPU compiler in a process of its own: what it says, and what happens where it gives up."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from jaxdistill.kernels import generation

from jaxdistill.parallel import ahead_of_time
from jaxdistill.parallel.ahead_of_time import Compiled, Program

needs_libtpu = pytest.mark.skipif(
    not ahead_of_time.is_available(), reason="libtpu is not installed (it is x86-64 Linux only)"
)


def lower_product(devices: list[jax.Device], size: int) -> jax.stages.Lowered:
    assert generation.target() == ("v5e", 1)
    place = SingleDeviceSharding(devices[0])
    square = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=place)
    return jax.jit(lambda a, b: a @ b).lower(square, square)


def lower_slowly(devices: list[jax.Device]) -> jax.stages.Lowered:
    time.sleep(600)
    return lower_product(devices, 128)


def lower_nothing(devices: list[jax.Device]) -> jax.stages.Lowered:
    raise ValueError("nothing to lower")


def programs(*arguments: tuple[str, dict]) -> list[Program]:
    return [Program(__name__, *x) for x in arguments]


@needs_libtpu
def test_a_failure_stands_in_its_place_and_the_rest_goes_on() -> None:
    """8 times the work is about 8 times the cycles."""
    found = ahead_of_time.compile_all(
        "v5e",
        programs(
            ("lower_product", {"size": 1024}),
            ("lower_nothing", {}),
            ("lower_product", {"size": 2048}),
        ),
        with_cycles=True,
    )
    small, failed, large = found
    assert isinstance(failed, str)
    assert failed == "ValueError: nothing to lower"
    assert isinstance(small, Compiled)
    assert isinstance(large, Compiled)
    ratio = sum(large.cycles.values()) / sum(small.cycles.values())
    assert 6 < ratio < 9
    # 4 units of 128 x 128 multiply and add in a cycle.
    assert sum(large.cycles.values()) > 2 * 2048**3 / (2 * 4 * 128 * 128)


@needs_libtpu
def test_a_program_has_so_much_time() -> None:
    (found,) = ahead_of_time.compile_all("v5e", programs(("lower_slowly", {})), timeout=1)
    assert found == "killed: out of time or of memory"


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "is_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="libtpu must be installed to compile for a TPU"):
        ahead_of_time.compile_all("v5e", [])
