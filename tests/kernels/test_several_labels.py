"""Several labels a token: finite differences, what it costs, and what it refuses.

What every implementation must do is in `several_labels_tests.py`.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads
from jaxdistill.kernels import linear_cross_entropy

from tests.kernels.several_labels_tests import COTANGENTS, HEAD, HIDDEN, LABELS, OPTIONS, PADDED


def test_finite_differences() -> None:
    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        options = OPTIONS | {"implementation": "xla", "chunk_tokens": 5, "chunk_vocab": 16}
        out = linear_cross_entropy(hidden, head, LABELS[0] % 20, **options)
        parts = zip(out, COTANGENTS, strict=True)
        return sum(jnp.vdot(x, cotangent[0]) for x, cotangent in parts)

    check_grads(jax.jit(total), (HIDDEN[0], HEAD[:20]), 1, ["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_memory_is_that_of_a_tile() -> None:
    """1,024 tokens of 8,192 columns and 64 labels, by XLA's account."""
    shapes = (1024, 32), (8192, 32)
    models = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    labels = jax.ShapeDtypeStruct((1024, 64), jnp.int32)

    def temporary(**options: object) -> int:
        def mean(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
            out = linear_cross_entropy(hidden, head, labels, with_rest=True, **options)
            return out.log_prob.mean() + out.rest.mean()

        compiled = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*models, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    lean = temporary(implementation="xla", chunk_tokens=512, chunk_vocab=512)
    full = temporary(implementation="reference")
    assert full >= 4 * 1024 * 8192
    assert lean <= full / 10, f"{lean} bytes against {full}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": LABELS[..., 0], "with_rest": True},
            "labels must have shape (4, 6) and one more dimension for with_rest, but the shape is",
        ),
        ({"labels": LABELS[..., :0]}, "labels must have K at least 1, but the shape is (4, 6, 0)"),
        ({"labels": LABELS[:3]}, "labels must have shape (4, 6, 5), but the shape is (3, 6, 5)"),
        ({"labels": LABELS + PADDED}, "labels must lie in [0, 264), but"),
        ({"labels": LABELS[None]}, "labels must have shape (4, 6), but the shape is (1, 4, 6, 5)"),
    ],
)
def test_says_what_is_wrong(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(HIDDEN, HEAD, **change)
