"""Which TPU a program is for, and the fast memory of its core that a kernel may take."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

MIB = 2**20
# By the generation's name: how its devices call themselves, and VMEM of a core.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
PHYSICAL_VMEM_BYTES = {
    "v4": 16 * MIB,
    "v5e": 128 * MIB,
    "v5p": 64 * MIB,
    "v6e": 128 * MIB,
    "tpu7x": 64 * MIB,
}


class Speed(NamedTuple):
    """Of a chip, a second: bfloat16 operations, and bytes from HBM."""

    operations: float
    bytes: float


SPEEDS = {
    "v4": Speed(275e12, 1228e9),
    "v5e": Speed(197e12, 819e9),
    "v5p": Speed(459e12, 2765e9),
    "v6e": Speed(918e12, 1640e9),
    "tpu7x": Speed(2307e12, 7380e9),
}
# What the compiler gives a kernel that does not ask for more, on every generation.
SCOPED_VMEM_BYTES = 16 * MIB


class Target(NamedTuple):
    """A generation (None: one this list does not know) and the devices a program is split over."""

    generation: str | None
    num_devices: int


_TARGET = jax.make_user_context(None)  # among the keys of jit's cache, unlike a context variable


@contextlib.contextmanager
def compiling_for(generation: str, num_devices: int = 1) -> Iterator[None]:
    """What is traced inside is for so many TPUs of a generation, whatever this machine has.

    implementation="auto" then takes what it would take there, in blocks that suit that TPU. To
    compile a program ahead of time, trace it inside.

    Raises:
      ValueError: an unknown generation.

    Example:
      >>> from jaxdistill.kernels import compiling_for
      >>> with compiling_for("v5e", num_devices=16):
      ...     pass  # jax.jit(step).lower(*arguments).compile()
    """
    if generation not in PHYSICAL_VMEM_BYTES:
        known = ", ".join(PHYSICAL_VMEM_BYTES)
        raise ValueError(f"generation must be one of {known}, but it is {generation!r}")
    with _TARGET(Target(generation, num_devices)):
        yield


def target() -> Target | None:
    """That of `compiling_for`, or of the default backend; None where neither is a TPU."""
    if _TARGET.value is not None:
        return _TARGET.value
    if jax.default_backend() != "tpu":
        return None
    return Target(_KINDS.get(jax.devices()[0].device_kind), jax.device_count())


def vmem_limit() -> int:
    """Bytes of VMEM to ask for: most of what the core has, or what any core gives unasked."""
    chosen = target()
    if chosen is None or chosen.generation is None:
        return SCOPED_VMEM_BYTES
    return max(PHYSICAL_VMEM_BYTES[chosen.generation] * 3 // 4, SCOPED_VMEM_BYTES)


def speed() -> Speed:
    """Of the TPU a program is for; of one this list does not know, or none, that of a v5e."""
    chosen = target()
    return SPEEDS[(chosen and chosen.generation) or "v5e"]
