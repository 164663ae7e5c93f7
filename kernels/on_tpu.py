"""What the TPU kernels share: where they may be lowered, how tests interpret them, outputs."""

import contextlib
import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from jax.interpreters import batching, mlir
from jaxdistill.kernels import generation
from jaxdistill.kernels.dispatch import ImplementationError

# What pallas_call takes as `interpret`; tests set it, before they trace, to run kernels on a CPU:
# True, or pltpu.InterpretParams(...) for memory full of NaN and a look for races.
INTERPRET: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=False)


def require_tpu(operand: jax.Array) -> jax.Array:
    """The operand itself, in a program that can be lowered for a TPU alone.

    Only lowering knows the platform: a program for a TPU may be compiled where there is none.

    Raises:
      ImplementationError: the program is lowered for another platform.
    """
    return _require_tpu.bind(operand)


_require_tpu = core.Primitive("require_tpu")
_require_tpu.def_impl(lambda operand: jax.jit(_require_tpu.bind)(operand))
_require_tpu.def_abstract_eval(lambda operand: operand)
batching.defvectorized(_require_tpu)


def _refuse(context: mlir.LoweringRuleContext, *_: object) -> NoReturn:
    platforms = context.module_context.platforms
    raise ImplementationError(
        f"implementation 'pallas' is lowered for a TPU, but this program is lowered for "
        f"{', '.join(platforms)}: choose 'xla' or 'auto'"
    )


mlir.register_lowering(_require_tpu, _refuse)
mlir.register_lowering(_require_tpu, lambda _, operand: [operand], platform="tpu")


def is_default() -> bool:
    """Whether a call that asks for no implementation is for a TPU that can take a kernel.

    XLA splits a program over devices, but no kernel in it: there, the call is inside shard_map.
    """
    target = generation.target()
    if target is None:
        return False
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    inside = bool(axis_types) and all(x == jax.sharding.AxisType.Manual for x in axis_types)
    return inside or target.num_devices == 1


def compiler_params(*dimension_semantics: Any) -> pltpu.CompilerParams:
    """Those of a kernel whose blocks were chosen to fit `generation.vmem_limit`."""
    return pltpu.CompilerParams(
        dimension_semantics=dimension_semantics, vmem_limit_bytes=generation.vmem_limit()
    )


def best_first(
    implementations: Mapping[str, Callable[..., Any]], check: Callable[[], object]
) -> dict[str, Callable[..., Any]]:
    """The implementations, the one "auto" takes first.

    That is "pallas" for a TPU where `check`, which raises ImplementationError if the kernel cannot
    serve, does not; else "xla".
    """
    best = "xla"
    if is_default():
        with contextlib.suppress(ImplementationError):
            check()
            best = "pallas"
    names = sorted(implementations, key=lambda name: name != best)
    return {name: implementations[name] for name in names}


def output(
    shape: Sequence[int], dtype: jax.typing.DTypeLike, like: jax.Array
) -> jax.ShapeDtypeStruct:
    """An output of a kernel that varies over the axes of shard_map over which `like` varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def pad_rows(array: jax.Array, multiple: int) -> jax.Array:
    """[N, *rest] with zeros up to a whole number of blocks, at least one."""
    missing = -array.shape[0] % multiple if array.shape[0] else multiple
    if not missing:
        return array
    return lax.pad(
        array, jnp.zeros((), array.dtype), [(0, missing, 0)] + [(0, 0, 0)] * (array.ndim - 1)
    )
