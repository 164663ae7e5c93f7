"""Options of the linear cross-entropy head, in every implementation, against the float64 oracle."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import linear_cross_entropy, on_tpu

from tests.kernels import oracle

RNG = np.random.default_rng(0)
SHAPE, VOCABULARY, PADDED = (3, 13), 261, 400
HIDDEN = RNG.normal(size=(*SHAPE, 8)).astype(np.float32)
HEAD = RNG.normal(size=(PADDED, 8)).astype(np.float32)
LABELS = RNG.integers(0, VOCABULARY, SHAPE)
COTANGENTS = tuple(RNG.normal(size=SHAPE).astype(np.float32) for _ in range(3))
OPTIONS = {"temperature": 1.3, "vocab_size": VOCABULARY, "soft_cap": 5.0, "with_entropy": True}
# Blocks that divide neither 39 tokens nor 261 columns; the last one of "pallas" is padding alone.
IMPLEMENTATIONS = {
    "pallas": {"implementation": "pallas", "chunk_tokens": 16, "chunk_vocab": 128},
    "xla": {"implementation": "xla", "chunk_tokens": 5, "chunk_vocab": 16},
    "reference": {"implementation": "reference"},
}
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    token = on_tpu.INTERPRET.set(True)
    yield
    on_tpu.INTERPRET.reset(token)


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


@pytest.mark.parametrize("layout", ["vd", "dv"])
@each_implementation
def test_equals_oracle(implementation: str, layout: str) -> None:
    """Cap, temperature, padding and all three outputs, whichever way the head lies."""
    run = compiled(**IMPLEMENTATIONS[implementation], head_layout=layout)
    outputs, (to_hidden, to_head) = run(HIDDEN, HEAD if layout == "vd" else HEAD.T)
    assert_equals_oracle(outputs, to_hidden, to_head if layout == "vd" else to_head.T)


@pytest.mark.parametrize(
    ("implementation", "chunk_tokens", "chunk_vocab"),
    [
        ("xla", None, None),
        ("xla", 1, 261),
        ("xla", 64, 70),
        ("pallas", None, None),
        ("pallas", 64, 384),
        ("pallas", None, 128),
    ],
)
def test_sizes_of_chunks_change_nothing(
    implementation: str, chunk_tokens: int | None, chunk_vocab: int | None
) -> None:
    sizes = {"chunk_tokens": chunk_tokens, "chunk_vocab": chunk_vocab}
    outputs, gradients = compiled(implementation=implementation, **sizes)(HIDDEN, HEAD)
    assert_equals_oracle(outputs, *gradients)


def assert_equals_oracle(outputs: tuple, to_hidden: jax.Array, to_head: jax.Array) -> None:
    expected, (true_hidden, true_head) = oracle.cross_entropy(
        HIDDEN.reshape(-1, 8).astype(np.float64),
        HEAD[:VOCABULARY].astype(np.float64),
        LABELS.reshape(-1),
        tuple(x.reshape(-1).astype(np.float64) for x in COTANGENTS),
        temperature=1.3,
        soft_cap=5.0,
    )
    for actual, true in zip(outputs, expected, strict=True):
        assert actual.shape == SHAPE
        np.testing.assert_allclose(actual.reshape(-1), true, atol=5e-6)
    np.testing.assert_allclose(to_hidden.reshape(-1, 8), true_hidden, atol=1e-5)
    np.testing.assert_allclose(to_head[:VOCABULARY], true_head, atol=1e-5)
    np.testing.assert_array_equal(to_head[VOCABULARY:], 0)


@pytest.mark.parametrize("layout", ["vd", "dv"])
@each_implementation
def test_padded_columns_are_never_touched(implementation: str, layout: str) -> None:
    """NaN in the padding reaches neither the value nor a gradient."""
    poisoned = HEAD.copy()
    poisoned[VOCABULARY:] = np.nan
    run = compiled(**IMPLEMENTATIONS[implementation], head_layout=layout)
    heads = (HEAD, poisoned) if layout == "vd" else (HEAD.T, poisoned.T)
    jax.tree.map(np.testing.assert_array_equal, *(run(HIDDEN, head) for head in heads))


@each_implementation
def test_nan_in_a_state_stays_at_its_position(implementation: str) -> None:
    """It is not lost: all its values are NaN, as its gradient is."""
    hidden = HIDDEN.copy()
    hidden[1, 2] = np.nan
    outputs, (to_hidden, _) = compiled(**IMPLEMENTATIONS[implementation])(hidden, HEAD)
    where = np.zeros(SHAPE, bool)
    where[1, 2] = True
    for values in (*outputs, to_hidden[..., 0]):
        np.testing.assert_array_equal(np.isnan(values), where)


@each_implementation
def test_entropy_of_a_sharp_distribution_keeps_its_digits(implementation: str) -> None:
    """Large logits: log-sum-exp minus mean logit would lose all digits of a small entropy."""
    hidden = np.ones((1, 1), np.float32)
    head = np.array([[1000.0], [990.0], [989.0]], np.float32)
    options = {"with_entropy": True, "implementation": implementation}
    out = linear_cross_entropy(hidden, head, np.array([0]), **options)
    (_, _, entropy), _ = oracle.cross_entropy(
        hidden.astype(np.float64), head.astype(np.float64), np.array([0]), (np.zeros(1),) * 3
    )
    np.testing.assert_allclose(out.entropy, entropy, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_types_of_hidden_and_head_may_differ(implementation: str) -> None:
    """bfloat16 states with a float32 head: products in float32, gradients in each one's type."""
    hidden = HIDDEN.astype(jnp.bfloat16)
    run = compiled(**IMPLEMENTATIONS[implementation])
    outputs, (to_hidden, to_head) = run(hidden, HEAD)
    widened, (_, true_head) = run(hidden.astype(np.float32), HEAD)
    assert (to_hidden.dtype, to_head.dtype) == (jnp.bfloat16, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, outputs, widened)
    np.testing.assert_array_equal(to_head, true_head)


@each_implementation
def test_label_out_of_range_under_jit_is_nan_there_alone(implementation: str) -> None:
    """Not the value of some other label; a mask removes it with its gradient."""
    labels = LABELS.copy()
    labels[0, :5] = [-1, -100, VOCABULARY, PADDED - 1, 1000]
    mask = np.ones(SHAPE, bool)
    mask[0, :5] = False

    @jax.jit
    def run(hidden: jax.Array, labels: jax.Array) -> tuple:
        def total(hidden: jax.Array) -> tuple:
            out = linear_cross_entropy(
                hidden, HEAD, labels, vocab_size=VOCABULARY, **IMPLEMENTATIONS[implementation]
            )
            return jnp.sum(jnp.where(mask, out.log_prob, 0.0)), out.log_prob

        return jax.grad(total, has_aux=True)(hidden)

    gradient, log_prob = run(HIDDEN, labels)
    np.testing.assert_array_equal(np.isnan(log_prob), ~mask)
    assert np.isfinite(gradient).all()
    assert not gradient[0, :5].any()


@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
@each_implementation
def test_any_leading_shape(implementation: str, shape: tuple[int, ...]) -> None:
    def log_prob(hidden: jax.Array) -> jax.Array:
        labels = np.zeros(shape, int)
        out = linear_cross_entropy(hidden, HEAD, labels, implementation=implementation)
        assert out.log_prob.shape == out.log_sum_exp.shape == shape
        assert out.entropy is None
        return out.log_prob.sum()

    hidden = np.ones((*shape, 8), np.float32)
    assert jax.grad(log_prob)(hidden).shape == hidden.shape


@each_implementation
def test_vmap_equals_a_loop(implementation: str) -> None:
    """Over states and heads, as an ensemble has them."""
    heads = np.stack([HEAD, 2 * HEAD, -HEAD])

    def log_prob(hidden: jax.Array, head: jax.Array) -> jax.Array:
        labels = LABELS[0]
        options = IMPLEMENTATIONS[implementation] | {"vocab_size": VOCABULARY}
        return linear_cross_entropy(hidden, head, labels, **options).log_prob

    gradient = jax.jit(jax.grad(lambda *x: log_prob(*x).sum(), argnums=(0, 1)))
    together = jax.jit(jax.vmap(gradient))(HIDDEN, heads)
    one_by_one = [gradient(*x) for x in zip(HIDDEN, heads, strict=True)]
    for batched, single in zip(together, zip(*one_by_one, strict=True), strict=True):
        np.testing.assert_allclose(batched, np.stack(single), atol=2e-6)
