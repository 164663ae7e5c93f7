"""What the lean heads cost, by XLA's own account: memory, and no work for frozen operands."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jaxdistill.kernels import linear_cross_entropy, linear_divergence

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 1024, 8192, 32, 64
CHUNKS = {"chunk_tokens": 512, "chunk_vocab": 512}


def arguments(dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    shapes = (
        (TOKENS, WIDTH),
        (VOCABULARY, WIDTH),
        (TOKENS, TEACHER_WIDTH),
        (VOCABULARY, TEACHER_WIDTH),
    )
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


@functools.cache
def compile_gradient(
    operation: str, implementation: str, dtype: jnp.dtype, wanted: tuple[int, ...] = (0, 1)
) -> jax.stages.Compiled:
    options = CHUNKS | {"implementation": implementation}
    labels = jnp.zeros(TOKENS, jnp.int32)

    def mean(hidden, head, teacher_hidden, teacher_head):
        if operation == "cross_entropy":
            return linear_cross_entropy(hidden, head, labels, **options).log_prob.mean()
        models = hidden, head, teacher_hidden, teacher_head
        return linear_divergence(*models, kind=operation, **options).mean()

    return jax.jit(jax.value_and_grad(mean, wanted)).lower(*arguments(dtype)).compile()


def temporary(compiled: jax.stages.Compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        ("cross_entropy", jnp.bfloat16),
        ("forward_kl", jnp.float32),
        ("forward_kl", jnp.bfloat16),
        pytest.param("cross_entropy", jnp.float32, marks=pytest.mark.slow),
        pytest.param("reverse_kl", jnp.float32, marks=pytest.mark.slow),
        pytest.param("reverse_kl", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_value_and_gradient_need_a_tenth_of_full_logits(operation: str, dtype: jnp.dtype) -> None:
    lean = temporary(compile_gradient(operation, "xla", dtype))
    full = temporary(compile_gradient(operation, "reference", dtype))
    assert full >= 4 * TOKENS * VOCABULARY
    assert lean <= full / 10, f"{lean} bytes against {full}"


def test_frozen_head_costs_no_product() -> None:
    """The gradient of a frozen head is dead code: one matrix product fewer."""
    both = compile_gradient("forward_kl", "xla", jnp.float32)
    hidden_alone = compile_gradient("forward_kl", "xla", jnp.float32, wanted=(0,))
    # forward: both logits; backward: both logits again, the hidden's gradient, the head's.
    assert (products(both), products(hidden_alone)) == (6, 5)
    assert temporary(hidden_alone) <= temporary(both)


def products(compiled: jax.stages.Compiled) -> int:
    return compiled.as_text().count(" dot(")
