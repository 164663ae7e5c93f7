"""The matrix of `design.md`: what shipped wrong elsewhere, on every lean head.

{aligned, V + 1, prime V} x {logit std 0.3, 3, 30} x {float32, bfloat16} x {no mask, random, a row
masked, all masked} x {value, gradient, gradient type} x {jit, shard_map on 4 devices}, against
float64. Chunks of 5 tokens and 16 columns divide nothing.
"""

import functools
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jaxdistill.kernels import linear_cross_entropy, linear_divergence

from tests.kernels import oracle

SHAPE = (8, 3)
WIDTH, TEACHER_WIDTH = 8, 6
TEMPERATURE = 1.3
CHUNKS = {"chunk_tokens": 5, "chunk_vocab": 16, "implementation": "xla"}
VOCABULARIES = (64, 65, 67)
SHARES = {"jensen_shannon": 0.3, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
# Saturated, their gradients are what is left of numbers that cancel.
BOUNDED = ("jensen_shannon", "skew_reverse_kl", "total_variation")
OPERATIONS = (
    "cross_entropy",
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
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


def values_of(operation: str, *arrays: jax.Array) -> jax.Array:
    student_hidden, student_head, teacher_hidden, teacher_head, labels = arrays
    if operation == "cross_entropy":
        student = student_hidden, student_head
        return -linear_cross_entropy(*student, labels, temperature=TEMPERATURE, **CHUNKS).log_prob
    student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
    options = {"share": SHARES.get(operation), "temperature": TEMPERATURE}
    return linear_divergence(*student, *teacher, kind=operation, **options, **CHUNKS)


def run(operation: str, axis: str | None, *arrays: jax.Array) -> tuple:
    """Values, and gradients of the masked mean over all devices of `axis`."""
    student_hidden, student_head, *rest, mask = arrays

    def mean(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = values_of(operation, hidden, head, *rest)
        total, weight = jnp.sum(values * mask), jnp.sum(mask)
        if axis is not None:
            total, weight = jax.lax.psum((total, weight), axis)
        return total / jnp.maximum(weight, 1.0), values

    gradients, values = jax.grad(mean, argnums=(0, 1), has_aux=True)(student_hidden, student_head)
    return values, gradients


def on_four_devices(operation: str) -> Callable:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        functools.partial(run, operation, "data"),
        mesh=mesh,
        in_specs=(rows, whole, rows, whole, rows, rows),
        out_specs=(rows, (rows, whole)),
    )


def expected(operation: str, arrays: tuple[np.ndarray, ...], mask: np.ndarray) -> tuple:
    """Values, gradients, and what the errors of the gradients are relative to."""
    weights = mask.reshape(-1) / max(mask.sum(), 1.0)
    flat = [x.astype(np.float64) for x in arrays[:4]]
    student_hidden, student_head, teacher_hidden, teacher_head = flat
    student = student_hidden.reshape(-1, WIDTH), student_head
    if operation == "cross_entropy":
        cotangents = -weights, np.zeros_like(weights), np.zeros_like(weights)
        labels = arrays[4].reshape(-1)
        (log_prob, _, _), gradients = oracle.cross_entropy(
            *student, labels, cotangents, TEMPERATURE
        )
        return -log_prob, gradients, [np.abs(x).max() for x in gradients]
    teacher = teacher_hidden.reshape(-1, TEACHER_WIDTH), teacher_head
    share = SHARES.get(operation)
    values, gradients, scales = oracle.divergence(
        operation, student, teacher, weights, TEMPERATURE, share=share
    )
    relative_to = scales if operation in BOUNDED else gradients
    return values, gradients, [np.abs(x).max() for x in relative_to]


def places() -> list:
    """(vocab_size, place); a compilation costs a second, so what repeats on devices is slow."""
    pairs = itertools.product(VOCABULARIES, ("jit", "shard_map"))
    by_default = {(vocab_size, "jit") for vocab_size in VOCABULARIES} | {(67, "shard_map")}
    return [
        pytest.param(*pair, marks=() if pair in by_default else pytest.mark.slow) for pair in pairs
    ]


@pytest.mark.parametrize(("vocab_size", "place"), places())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_against_float64(operation: str, vocab_size: int, dtype: jnp.dtype, place: str) -> None:
    """float32 must be as good as float32 logits allow; bfloat16 differs in the gradient alone."""
    function = functools.partial(run, operation, None)
    compiled = jax.jit(function if place == "jit" else on_four_devices(operation))
    gradient_tolerance = 2**-7 if dtype == jnp.bfloat16 else 2e-5
    for std in (0.3, 3.0, 30.0):
        arrays = make(std, vocab_size, dtype)
        for name, mask in masks().items():
            values, gradients = compiled(*arrays, mask)
            true_values, true_gradients, scales = expected(operation, arrays, mask)
            error = np.abs(np.asarray(values, np.float64).reshape(-1) - true_values).max()
            assert error < 2e-6 * (1 + 5 * std), f"std {std}, mask {name}: {error} nats"
            for gradient, true, scale in zip(gradients, true_gradients, scales, strict=True):
                assert gradient.dtype == dtype
                wide = np.asarray(gradient, np.float64).reshape(true.shape)
                error = np.abs(wide - true).max()
                assert error <= gradient_tolerance * scale, f"std {std}, mask {name}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_product_accumulates_in_float32(operation: str) -> None:
    """XLA:CPU may keep digits that bfloat16 drops, so the program says it, not the numbers."""
    arrays = make(3.0, 67, jnp.bfloat16)
    program = str(jax.make_jaxpr(functools.partial(run, operation, None))(*arrays, masks()["none"]))
    types = re.findall(r":(\w+)\[[^\]]*\] = dot_general", program)
    assert len(types) >= 4
    assert set(types) == {"f32"}
