"""Options of the linear cross-entropy head, lean and reference, against the float64 oracle."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import linear_cross_entropy

from tests.kernels import oracle

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 4, 8)).astype(np.float32)
HEAD = RNG.normal(size=(67, 8)).astype(np.float32)
LABELS = RNG.integers(0, 61, (3, 4))
COTANGENTS = tuple(RNG.normal(size=(3, 4)).astype(np.float32) for _ in range(3))
OPTIONS = {"temperature": 1.3, "vocab_size": 61, "soft_cap": 5.0, "with_entropy": True}


@functools.cache
def compiled(**options: object) -> Callable:
    """(hidden, head) -> the three outputs and the gradients of hidden and head."""

    def function(hidden: jax.Array, head: jax.Array) -> tuple:
        out = linear_cross_entropy(hidden, head, LABELS, **OPTIONS, **options)
        return out.log_prob, out.log_sum_exp, out.entropy

    @jax.jit
    def run(hidden: jax.Array, head: jax.Array) -> tuple:
        outputs, pull = jax.vjp(function, hidden, head)
        return outputs, pull(COTANGENTS)

    return run


@pytest.mark.parametrize(
    ("chunk_tokens", "chunk_vocab", "layout"),
    [(None, None, "vd"), (5, 16, "vd"), (5, 16, "dv"), (1, 61, "dv"), (64, 7, "vd")],
)
def test_lean_equals_oracle(chunk_tokens: int | None, chunk_vocab: int | None, layout: str) -> None:
    """Cap, temperature, padding, all three outputs; no sizes of chunks or layout change them."""
    run = compiled(chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab, head_layout=layout)
    outputs, (to_hidden, to_head) = run(HIDDEN, HEAD if layout == "vd" else HEAD.T)
    assert_equals_oracle(outputs, to_hidden, to_head if layout == "vd" else to_head.T)


def test_reference_equals_oracle() -> None:
    outputs, gradients = compiled(implementation="reference")(HIDDEN, HEAD)
    assert_equals_oracle(outputs, *gradients)


def assert_equals_oracle(outputs: tuple, to_hidden: jax.Array, to_head: jax.Array) -> None:
    expected, (true_hidden, true_head) = oracle.cross_entropy(
        HIDDEN.reshape(-1, 8).astype(np.float64),
        HEAD[:61].astype(np.float64),
        LABELS.reshape(-1),
        tuple(x.reshape(-1).astype(np.float64) for x in COTANGENTS),
        temperature=1.3,
        soft_cap=5.0,
    )
    for actual, true in zip(outputs, expected, strict=True):
        assert actual.shape == (3, 4)
        np.testing.assert_allclose(actual.reshape(-1), true, atol=5e-6)
    np.testing.assert_allclose(to_hidden.reshape(-1, 8), true_hidden, atol=1e-5)
    np.testing.assert_allclose(to_head[:61], true_head, atol=1e-5)
    np.testing.assert_array_equal(to_head[61:], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_tokens": 5, "chunk_vocab": 16, "head_layout": "vd"},
        {"implementation": "reference"},
    ],
    ids=["xla", "reference"],
)
def test_padded_columns_are_never_touched(options: dict) -> None:
    """NaN in the padding reaches neither the value nor a gradient."""
    poisoned = HEAD.copy()
    poisoned[61:] = np.nan
    run = compiled(**options)
    jax.tree.map(np.testing.assert_array_equal, run(HIDDEN, poisoned), run(HIDDEN, HEAD))


def test_entropy_of_a_sharp_distribution_keeps_its_digits() -> None:
    """Large logits: log-sum-exp minus mean logit would lose all digits of a small entropy."""
    hidden = np.ones((1, 1), np.float32)
    head = np.array([[1000.0], [990.0], [989.0]], np.float32)
    out = linear_cross_entropy(hidden, head, np.array([0]), with_entropy=True)
    (_, _, entropy), _ = oracle.cross_entropy(
        hidden.astype(np.float64), head.astype(np.float64), np.array([0]), (np.zeros(1),) * 3
    )
    np.testing.assert_allclose(out.entropy, entropy, rtol=1e-5)


def test_types_of_hidden_and_head_may_differ() -> None:
    """bfloat16 states with a float32 head: products in float32, gradients in each one's type."""
    hidden = HIDDEN.astype(jnp.bfloat16)
    run = compiled(chunk_tokens=None, chunk_vocab=None, head_layout="vd")
    outputs, (to_hidden, to_head) = run(hidden, HEAD)
    widened, (_, true_head) = run(hidden.astype(np.float32), HEAD)
    assert (to_hidden.dtype, to_head.dtype) == (jnp.bfloat16, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, outputs, widened)
    np.testing.assert_array_equal(to_head, true_head)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_label_out_of_range_under_jit_is_nan_there_alone(implementation: str) -> None:
    """Not the value of some other label; a mask removes it with its gradient."""
    labels = LABELS.copy()
    labels[0] = [-1, -100, 61, 1000]
    mask = np.ones((3, 4), bool)
    mask[0] = False

    @jax.jit
    def run(hidden: jax.Array, labels: jax.Array) -> tuple:
        def total(hidden: jax.Array) -> tuple:
            out = linear_cross_entropy(
                hidden, HEAD, labels, vocab_size=61, implementation=implementation
            )
            return jnp.sum(jnp.where(mask, out.log_prob, 0.0)), out.log_prob

        return jax.grad(total, has_aux=True)(hidden)

    gradient, log_prob = run(HIDDEN, labels)
    np.testing.assert_array_equal(np.isnan(log_prob), ~mask)
    assert np.isfinite(gradient).all()
    assert not gradient[0].any()


@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    out = linear_cross_entropy(np.ones((*shape, 8), np.float32), HEAD, np.zeros(shape, int))
    assert out.log_prob.shape == out.log_sum_exp.shape == shape
    assert out.entropy is None
