"""Options of the linear divergence head, lean and reference, against the float64 oracle."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import linear_divergence

from tests.kernels import oracle

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(3, 4, 8)).astype(np.float32), RNG.normal(size=(67, 8)).astype(np.float32)
TEACHER = RNG.normal(size=(3, 4, 6)).astype(np.float32), RNG.normal(size=(64, 6)).astype(np.float32)
COTANGENT = RNG.normal(size=(3, 4)).astype(np.float32)
CAPS = {"student_soft_cap": 5.0, "teacher_soft_cap": 4.0}
KINDS = {
    "forward_kl": None,
    "reverse_kl": None,
    "symmetric_kl": None,
    "jensen_shannon": 0.3,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "skew_reverse_kl_fixed_mixture": 0.1,
    "total_variation": None,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def compiled(kind: str, **options: object) -> Callable:
    """(student's and teacher's hidden and head) -> values, and the gradients in all four."""

    def function(*arrays: jax.Array) -> jax.Array:
        return linear_divergence(
            *arrays,
            kind=kind,
            share=KINDS[kind],
            temperature=1.3,
            vocab_size=61,
            **CAPS,
            **options,
        )

    @jax.jit
    def run(*arrays: jax.Array) -> tuple:
        values, pull = jax.vjp(function, *arrays)
        return values, pull(COTANGENT)

    return run


def assert_equals_oracle(kind: str, values: jax.Array, gradients: tuple) -> None:
    def flat(model: tuple) -> tuple:
        hidden, head = (x.astype(np.float64) for x in model)
        return hidden.reshape(-1, hidden.shape[-1]), head[:61]

    cotangent = COTANGENT.reshape(-1).astype(np.float64)
    expected, (to_hidden, to_head), _ = oracle.divergence(
        kind, flat(STUDENT), flat(TEACHER), cotangent, 1.3, (5.0, 4.0), KINDS[kind]
    )
    np.testing.assert_allclose(values.reshape(-1), expected, atol=5e-6)
    np.testing.assert_allclose(gradients[0].reshape(-1, 8), to_hidden, atol=1e-5)
    np.testing.assert_allclose(gradients[1][:61], to_head, atol=1e-5)
    for nothing in (gradients[1][61:], gradients[2], gradients[3]):
        np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize(
    ("chunk_tokens", "chunk_vocab", "layout"),
    [(None, None, "vd"), (5, 16, "vd"), (5, 16, "dv")],
)
@each_kind
def test_lean_equals_oracle(
    kind: str, chunk_tokens: int | None, chunk_vocab: int | None, layout: str
) -> None:
    """Caps, temperature, two paddings; no sizes of chunks or layout change the result."""
    run = compiled(kind, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab, head_layout=layout)
    (hidden, head), (teacher_hidden, teacher_head) = STUDENT, TEACHER
    if layout == "dv":
        head, teacher_head = head.T, teacher_head.T
    values, gradients = run(hidden, head, teacher_hidden, teacher_head)
    if layout == "dv":
        gradients = gradients[0], gradients[1].T, gradients[2], gradients[3]
    assert_equals_oracle(kind, values, gradients)


@each_kind
def test_reference_equals_oracle(kind: str) -> None:
    values, gradients = compiled(kind, implementation="reference")(*STUDENT, *TEACHER)
    assert_equals_oracle(kind, values, gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_tokens": 5, "chunk_vocab": 16, "head_layout": "vd"},
        {"implementation": "reference"},
    ],
    ids=["xla", "reference"],
)
def test_padded_columns_are_never_touched(options: dict) -> None:
    """NaN in either padding reaches neither the value nor a gradient."""

    def poisoned(model: tuple) -> tuple:
        head = model[1].copy()
        head[61:] = np.nan
        return model[0], head

    run = compiled("reverse_kl", **options)
    dirty = run(*poisoned(STUDENT), *poisoned(TEACHER))
    jax.tree.map(np.testing.assert_array_equal, dirty, run(*STUDENT, *TEACHER))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@each_kind
def test_small_divergence_keeps_its_digits(kind: str, dtype: jnp.dtype) -> None:
    """Near 1e-3 where logits are near 30: sums in bfloat16 would give 0."""
    rng = np.random.default_rng(1)
    hidden = (rng.normal(size=(6, 16)) + 1).astype(dtype)
    teacher_head = (rng.normal(size=(257, 16)) * 0.5 + 2).astype(dtype)
    student_head = (teacher_head + rng.normal(size=(257, 16)) * 0.01).astype(dtype)
    values = linear_divergence(
        hidden, student_head, hidden, teacher_head, kind=kind, share=KINDS[kind], chunk_vocab=50
    )
    wide = [x.astype(np.float64) for x in (hidden, student_head, teacher_head)]
    models = (wide[0], wide[1]), (wide[0], wide[2])
    expected, *_ = oracle.divergence(kind, *models, np.zeros(6), share=KINDS[kind])
    assert 5e-5 < expected.min() < expected.max() < 4e-2
    np.testing.assert_allclose(values, expected, atol=3e-6)


@each_kind
def test_same_model_gives_zero(kind: str) -> None:
    values = linear_divergence(*STUDENT, *STUDENT, kind=kind, share=KINDS[kind], chunk_vocab=16)
    np.testing.assert_allclose(values, 0, atol=2e-7)


def finite_difference(kind: str, at: int, direction: np.ndarray) -> float:
    """Central difference in float64 of the cotangent's product with the values."""

    def total(step: float) -> float:
        arrays = [x.astype(np.float64) for x in (*STUDENT, *TEACHER)]
        arrays[at] = arrays[at] + step * direction
        models = [
            (hidden.reshape(-1, hidden.shape[-1]), head[:61])
            for hidden, head in (arrays[:2], arrays[2:])
        ]
        cotangent = COTANGENT.reshape(-1).astype(np.float64)
        values, *_ = oracle.divergence(kind, *models, cotangent, 1.3, (5.0, 4.0), KINDS[kind])
        return float(values @ cotangent)

    return (total(1e-5) - total(-1e-5)) / 2e-5


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@each_kind
def test_both_models_trained(kind: str, implementation: str) -> None:
    """All four gradients against finite differences; a fixed mixture gives the teacher none."""
    chunks = {"chunk_tokens": 5, "chunk_vocab": 16} if implementation == "xla" else {}
    run = compiled(kind, teacher_gradient=True, implementation=implementation, **chunks)
    values, gradients = run(*STUDENT, *TEACHER)
    nothing = np.zeros((67, 8)), np.zeros((64, 6))
    student_alone = gradients[0], gradients[1], *nothing
    assert_equals_oracle(kind, values, student_alone)
    fixed = kind.endswith("fixed_mixture")
    for at, gradient in enumerate(gradients):
        direction = np.random.default_rng(at).normal(size=gradient.shape)
        found = float(np.sum(np.asarray(gradient, np.float64) * direction))
        if fixed and at >= 2:
            np.testing.assert_array_equal(gradient, 0)
        elif not fixed:
            assert found == pytest.approx(finite_difference(kind, at, direction), abs=3e-5)
            assert abs(found) > 1e-3


def test_no_gradient_into_temperature_or_share() -> None:
    def total(temperature: jax.Array, share: jax.Array) -> jax.Array:
        options = {"kind": "skew_reverse_kl", "temperature": temperature, "share": share}
        return linear_divergence(*STUDENT, *TEACHER, vocab_size=61, **options).sum()

    assert jax.grad(total, argnums=(0, 1))(jnp.float32(2.0), jnp.float32(0.1)) == (0, 0)
