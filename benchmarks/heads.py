"""What the lean heads need against full logits: memory by XLA's own account, and processor time.

    python -m benchmarks.heads           # memory at 8,192 x 151,936, compiled, not run
    python -m benchmarks.heads --time    # also run 1,024 x 49,152 (a few minutes on 2 cores)

Times are processor seconds of the whole process, over those of the bare matrix products the pass
cannot do without, measured in the same run. A pass that trains both hidden and head multiplies six
times (two logits, the same two again, two gradients), with a frozen head five times.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxdistill.kernels import linear_cross_entropy, linear_divergence

GIB = 2**30


def cross_entropy(implementation: str, hidden: jax.Array, head: jax.Array) -> jax.Array:
    labels = jnp.arange(hidden.shape[0])
    return -linear_cross_entropy(
        hidden, head, labels, implementation=implementation
    ).log_prob.mean()


def divergence(kind: str, implementation: str, *models: jax.Array) -> jax.Array:
    return linear_divergence(*models, kind=kind, implementation=implementation).mean()


def passes(implementation: str) -> dict[str, tuple[Callable, int]]:
    """Value-and-gradient functions by name, and how many arrays each takes."""
    ce = functools.partial(cross_entropy, implementation)
    forward, reverse = (
        functools.partial(divergence, kind, implementation) for kind in ("forward_kl", "reverse_kl")
    )
    return {
        "cross-entropy": (jax.value_and_grad(ce, (0, 1)), 2),
        "cross-entropy, head frozen": (jax.value_and_grad(ce), 2),
        "forward KL": (jax.value_and_grad(forward, (0, 1)), 4),
        "forward KL, head frozen": (jax.value_and_grad(forward), 4),
        "reverse KL": (jax.value_and_grad(reverse, (0, 1)), 4),
    }


def temporary_gib(function: Callable, shapes: tuple, dtype: jnp.dtype) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert analysis is not None, "this backend gives no account of its memory"
    return analysis.temp_size_in_bytes / GIB


def print_memory(tokens: int, vocabulary: int, widths: tuple[int, int]) -> None:
    student, teacher = widths
    shapes = (tokens, student), (vocabulary, student), (tokens, teacher), (vocabulary, teacher)
    print(f"temporaries, GiB: {tokens} tokens x {vocabulary}, widths {widths}, bfloat16")
    print(f"{'value and gradient':30}{'lean':>8}{'full':>8}{'ratio':>8}")
    full_passes = passes("reference")
    for name, (function, count) in passes("xla").items():
        lean = temporary_gib(function, shapes[:count], jnp.bfloat16)
        full = temporary_gib(full_passes[name][0], shapes[:count], jnp.bfloat16)
        print(f"{name:30}{lean:8.2f}{full:8.2f}{lean / full:8.3f}", flush=True)


def processor_seconds(function: Callable, *arguments: jax.Array, repeats: int = 3) -> float:
    """The least of a few runs, compilation left out."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.process_time() - start)
    return min(seconds)


def print_times(tokens: int, vocabulary: int, width: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (tokens, width), (vocabulary, width), (tokens, width), (vocabulary, width)
    arrays = [
        jax.random.normal(key, shape) * scale
        for key, shape, scale in zip(keys, shapes, (1.0, 0.05, 1.0, 0.05), strict=True)
    ]
    product = processor_seconds(lambda a, b: a @ b.T, *arrays[:2])
    products = {"cross-entropy": 4, "cross-entropy, head frozen": 3}
    products |= {"forward KL": 6, "forward KL, head frozen": 5, "reverse KL": 6}
    print(f"\nprocessor seconds: {tokens} tokens x {vocabulary}, width {width}, float32")
    print(f"one product: {product:.2f}")
    print(f"{'value and gradient':30}{'lean':>8}{'full':>8}{'lean / its products':>22}")
    full_passes = passes("reference")
    for name, (function, count) in passes("xla").items():
        lean = processor_seconds(function, *arrays[:count])
        full = processor_seconds(full_passes[name][0], *arrays[:count])
        floor = products[name] * product
        print(f"{name:30}{lean:8.2f}{full:8.2f}{lean / floor:22.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="also run, not only compile")
    options = parser.parse_args()
    print_memory(8192, 151_936, (2048, 4096))
    if options.time:
        print_times(1024, 49_152, 576)


if __name__ == "__main__":
    main()
