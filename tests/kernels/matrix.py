"""The matrix of `design.md`: what shipped wrong elsewhere, for every function of two heads.

{aligned, V + 1, prime V} x {logit std 0.3, 3, 30} x {float32, bfloat16} x {no mask, random, a row
masked, all masked} x {value, gradient, gradient type} x {jit, shard_map on 4 devices}, against
float64.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

SHAPE = (8, 3)
WIDTH, TEACHER_WIDTH = 8, 6
TEMPERATURE = 1.3
VOCABULARIES = (64, 65, 67)

each_dtype = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"]
)


def each_place() -> pytest.MarkDecorator:
    """(vocab_size, place); a compilation costs a second, so what repeats on devices is slow."""
    pairs = itertools.product(VOCABULARIES, ("jit", "shard_map"))
    by_default = {(vocab_size, "jit") for vocab_size in VOCABULARIES} | {(67, "shard_map")}
    return pytest.mark.parametrize(
        ("vocab_size", "place"),
        [pytest.param(*x, marks=() if x in by_default else pytest.mark.slow) for x in pairs],
    )


def each_place_and_dtype() -> pytest.MarkDecorator:
    """(vocab_size, place, dtype), of which four, with each value among them, are not slow."""
    few = {(64, "jit", "float32"), (65, "jit", "float32")}
    few |= {(67, "jit", "bfloat16"), (67, "shard_map", "float32")}
    cases = itertools.product(VOCABULARIES, ("jit", "shard_map"), ("float32", "bfloat16"))
    return pytest.mark.parametrize(
        ("vocab_size", "place", "dtype"),
        [pytest.param(*x, marks=() if x in few else pytest.mark.slow) for x in cases],
    )


def make(std: float, vocab_size: int, dtype: jnp.dtype) -> tuple[np.ndarray, ...]:
    """Student and teacher (hidden, head) with logits of this std, and labels."""
    rng = np.random.default_rng(int(10 * std) + vocab_size)

    def model(width: int) -> tuple[np.ndarray, np.ndarray]:
        hidden = rng.normal(size=(*SHAPE, width)) * std / np.sqrt(width)
        return hidden.astype(dtype), rng.normal(size=(vocab_size, width)).astype(dtype)

    return *model(WIDTH), *model(TEACHER_WIDTH), rng.integers(0, vocab_size, SHAPE)


def masks() -> dict[str, np.ndarray]:
    full = np.ones(SHAPE, np.float32)
    random = (np.random.default_rng(0).random(SHAPE) < 0.6).astype(np.float32)
    row = full.copy()
    row[2] = 0
    return {"none": full, "random": random, "row": row, "all": 0 * full}


def run(values_of: Callable, axis: str | None, *arrays: jax.Array) -> tuple:
    """Values, and gradients of the masked mean over all devices of `axis`."""
    student_hidden, student_head, *rest, mask = arrays

    def mean(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = values_of(hidden, head, *rest)
        total, weight = jnp.sum(values * mask), jnp.sum(mask)
        if axis is not None:
            total, weight = jax.lax.psum((total, weight), axis)
        return total / jnp.maximum(weight, 1.0), values

    gradients, values = jax.grad(mean, argnums=(0, 1), has_aux=True)(student_hidden, student_head)
    return values, gradients


def on_four_devices(values_of: Callable) -> Callable:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        functools.partial(run, values_of, "data"),
        mesh=mesh,
        in_specs=(rows, whole, rows, whole, rows, rows),
        out_specs=(rows, (rows, whole)),
    )


def flat_models(arrays: tuple[np.ndarray, ...]) -> tuple[tuple, tuple]:
    """(hidden [N, D], head) of student and teacher, in float64."""
    student_hidden, student_head, teacher_hidden, teacher_head = (
        x.astype(np.float64) for x in arrays[:4]
    )
    student = student_hidden.reshape(-1, WIDTH), student_head
    return student, (teacher_hidden.reshape(-1, TEACHER_WIDTH), teacher_head)


def assert_against_float64(
    values_of: Callable, expected: Callable, vocab_size: int, dtype: jnp.dtype, place: str
) -> None:
    """float32 must be as good as float32 logits allow; bfloat16 differs in the gradient alone.

    `expected(arrays, weights [N])` gives values, gradients of sum(weights * values), and what the
    errors of the gradients are relative to.
    """
    function = functools.partial(run, values_of, None)
    compiled = jax.jit(function if place == "jit" else on_four_devices(values_of))
    gradient_tolerance = 2**-7 if dtype == jnp.bfloat16 else 2e-5
    for std in (0.3, 3.0, 30.0):
        arrays = make(std, vocab_size, dtype)
        for name, mask in masks().items():
            values, gradients = compiled(*arrays, mask)
            weights = mask.reshape(-1) / max(mask.sum(), 1.0)
            true_values, true_gradients, relative_to = expected(arrays, weights)
            error = np.abs(np.asarray(values, np.float64).reshape(-1) - true_values).max()
            assert error < 2e-6 * (1 + 5 * std), f"std {std}, mask {name}: {error} nats"
            for gradient, true, scale in zip(gradients, true_gradients, relative_to, strict=True):
                assert gradient.dtype == dtype
                wide = np.asarray(gradient, np.float64).reshape(true.shape)
                error = np.abs(wide - true).max()
                assert error <= gradient_tolerance * np.abs(scale).max(), f"std {std}, mask {name}"
