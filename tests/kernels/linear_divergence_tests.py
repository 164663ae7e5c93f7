"""What every implementation of the divergence head must do: a class, subclassed for each."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import linear_divergence

from tests.kernels import matrix, oracle

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
# In the matrix; a fixed mixture's gradient is not that of its value.
MATRIX_KINDS = tuple(x for x in KINDS if not x.endswith("fixed_mixture"))
# Saturated, their gradients are what is left of numbers that cancel.
BOUNDED = ("jensen_shannon", "skew_reverse_kl", "total_variation")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
each_kind = pytest.mark.parametrize("kind", KINDS)

Model = tuple[np.ndarray, np.ndarray]  # hidden and head


class Models(NamedTuple):
    """Student and teacher of which `columns` count, and the cotangent of the values."""

    student: Model
    teacher: Model
    cotangent: np.ndarray
    columns: int


def small() -> Models:
    rng = np.random.default_rng(0)
    student = rng.normal(size=(3, 4, 8)), rng.normal(size=(67, 8))
    teacher = rng.normal(size=(3, 4, 6)), rng.normal(size=(64, 6))
    cotangent = rng.normal(size=(3, 4)).astype(np.float32)
    models = (tuple(x.astype(np.float32) for x in model) for model in (student, teacher))
    return Models(*models, cotangent, columns=61)


def wide() -> Models:
    """Widths that a kernel may read in two parts; blocks of 16 and 128 divide no other size."""
    rng = np.random.default_rng(0)
    student = rng.normal(size=(3, 7, 256)).astype(np.float32) / 16, rng.normal(size=(307, 256))
    teacher = rng.normal(size=(3, 7, 512)).astype(np.float32) / 16, rng.normal(size=(300, 512))
    cotangent = rng.normal(size=(3, 7)).astype(np.float32)
    models = (tuple(x.astype(np.float32) for x in model) for model in (student, teacher))
    return Models(*models, cotangent, columns=290)


SMALL, WIDE = small(), wide()


def compiled(kind: str, models: Models = SMALL, **options: Any) -> Callable:
    """(student's and teacher's hidden and head) -> values, and the gradients in all four."""

    def function(*arrays: jax.Array) -> jax.Array:
        return linear_divergence(
            *arrays,
            kind=kind,
            share=KINDS[kind],
            temperature=1.3,
            vocab_size=models.columns,
            student_soft_cap=5.0,
            teacher_soft_cap=4.0,
            **options,
        )

    @jax.jit
    def run(*arrays: jax.Array) -> tuple:
        values, pull = jax.vjp(function, *arrays)
        return values, pull(models.cotangent)

    return run


def flat(model: Model, columns: int) -> Model:
    hidden, head = (x.astype(np.float64) for x in model)
    return hidden.reshape(-1, hidden.shape[-1]), head[:columns]


def assert_equals_oracle(
    kind: str, values: jax.Array, gradients: tuple, models: Models = SMALL
) -> None:
    columns = models.columns
    both = flat(models.student, columns), flat(models.teacher, columns)
    cotangent = models.cotangent.reshape(-1).astype(np.float64)
    expected, true, scales = oracle.divergence(kind, *both, cotangent, 1.3, (5.0, 4.0), KINDS[kind])
    np.testing.assert_allclose(values.reshape(-1), expected, atol=3e-6)
    width = both[0][0].shape[-1]
    found = gradients[0].reshape(-1, width), gradients[1][:columns]
    for gradient, wanted, scale in zip(found, true, scales, strict=True):
        assert np.abs(gradient - wanted).max() <= 1e-5 * min(1, scale.max())
    for nothing in (gradients[1][columns:], gradients[2], gradients[3]):
        np.testing.assert_array_equal(nothing, 0)


def check_against_oracle(kind: str, models: Models, layout: str, **options: Any) -> None:
    """Caps, temperature, two paddings, either way the heads lie."""
    arrays = *models.student, *models.teacher
    run = compiled(kind, models, head_layout=layout, **options)
    if layout == "vd":
        return assert_equals_oracle(kind, *run(*arrays), models)
    values, gradients = run(arrays[0], arrays[1].T, arrays[2], arrays[3].T)
    gradients = gradients[0], gradients[1].T, gradients[2], gradients[3].T
    return assert_equals_oracle(kind, values, gradients, models)


def matrix_values(kind: str, options: dict, *arrays: jax.Array) -> jax.Array:
    options = options | {"share": KINDS[kind], "temperature": matrix.TEMPERATURE}
    return linear_divergence(*arrays[:4], kind=kind, **options)


def matrix_expected(kind: str, arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    models = matrix.flat_models(arrays)
    values, gradients, scales = oracle.divergence(
        kind, *models, weights, matrix.TEMPERATURE, share=KINDS[kind]
    )
    return values, gradients, scales if kind in BOUNDED else gradients


def finite_difference(kind: str, at: int, direction: np.ndarray) -> float:
    """Central difference in float64 of the cotangent's product with the values."""

    def total(step: float) -> float:
        arrays = [x.astype(np.float64) for x in (*SMALL.student, *SMALL.teacher)]
        arrays[at] = arrays[at] + step * direction
        models = [flat(x, SMALL.columns) for x in (tuple(arrays[:2]), tuple(arrays[2:]))]
        cotangent = SMALL.cotangent.reshape(-1).astype(np.float64)
        values, *_ = oracle.divergence(kind, *models, cotangent, 1.3, (5.0, 4.0), KINDS[kind])
        return float(values @ cotangent)

    return (total(1e-5) - total(-1e-5)) / 2e-5


class LinearDivergenceTests:
    """Values and gradients of every kind against float64.

    implementation, chunks: the arguments that name an implementation and its chunks.
    vocabularies: aligned, V + 1 and prime, for these chunks.
    models: which ones are compared with the oracle.
    few, layouts: the kinds and layouts that run by default where each takes a compilation.
    """

    implementation: ClassVar[str]
    chunks: ClassVar[dict[str, int]]
    vocabularies: ClassVar[tuple[int, ...]] = matrix.VOCABULARIES
    products: ClassVar[int] = 4
    models: ClassVar[Models] = SMALL
    few: ClassVar[tuple[str, ...]] = tuple(KINDS)
    layouts: ClassVar[tuple[str, ...]] = ("vd", "dv")

    @property
    def options(self) -> dict[str, Any]:
        return {"implementation": self.implementation, **self.chunks}

    def by_default(self, kind: str, vocab_size: int, place: str, dtype: str) -> bool:
        """Which cases of the matrix are not slow: a compilation takes a second."""
        return place == "jit" or vocab_size == self.vocabularies[-1]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        def slow_unless(condition: bool) -> Any:
            return () if condition else pytest.mark.slow

        if "vocab_size" in metafunc.fixturenames:
            names = "kind", "vocab_size", "place", "dtype"
            cases = itertools.product(MATRIX_KINDS, self.vocabularies, ("jit", "shard_map"), DTYPES)
            params = [
                pytest.param(
                    *case[:3],
                    DTYPES[case[3]],
                    marks=slow_unless(self.by_default(*case)),
                    id="-".join(map(str, case)),
                )
                for case in cases
            ]
            metafunc.parametrize(names, params)
        elif "kind" in metafunc.fixturenames:
            kinds = [pytest.param(x, marks=slow_unless(x in self.few)) for x in KINDS]
            metafunc.parametrize("kind", kinds)
        if "layout" in metafunc.fixturenames:
            layouts = [pytest.param(x, marks=slow_unless(x in self.layouts)) for x in ("vd", "dv")]
            metafunc.parametrize("layout", layouts)

    def test_matrix(self, kind: str, vocab_size: int, place: str, dtype: jnp.dtype) -> None:
        values = functools.partial(matrix_values, kind, self.options)
        expected = functools.partial(matrix_expected, kind)
        matrix.assert_against_float64(values, expected, vocab_size, dtype, place)

    def test_every_product_accumulates_in_float32(self, kind: str) -> None:
        """A CPU may keep digits that bfloat16 drops, so the program says it, not the numbers."""
        make = matrix.make(3.0, self.vocabularies[-1], jnp.bfloat16)
        values = functools.partial(matrix_values, kind, self.options)
        function = functools.partial(matrix.run, values, None)
        program = str(jax.make_jaxpr(function)(*make, matrix.masks()["none"]))
        types = re.findall(r":(\w+)\[[^\]]*\] = dot_general", program)
        assert len(types) >= self.products
        assert set(types) == {"f32"}

    def test_equals_oracle(self, kind: str, layout: str) -> None:
        check_against_oracle(kind, self.models, layout, **self.options)

    def test_padded_columns_are_never_touched(self) -> None:
        """NaN in either padding reaches neither the value nor a gradient."""

        def poisoned(model: Model) -> Model:
            head = model[1].copy()
            head[SMALL.columns :] = np.nan
            return model[0], head

        student, teacher = SMALL.student, SMALL.teacher
        run = compiled("reverse_kl", head_layout="vd", **self.options)
        dirty = run(*poisoned(student), *poisoned(teacher))
        jax.tree.map(np.testing.assert_array_equal, dirty, run(*student, *teacher))

    @pytest.mark.parametrize("of", DTYPES)
    def test_small_divergence_keeps_its_digits(self, kind: str, of: str) -> None:
        """Near 1e-3 where logits are near 30: sums in bfloat16 would give 0."""
        rng = np.random.default_rng(1)
        hidden = (rng.normal(size=(6, 16)) + 1).astype(DTYPES[of])
        teacher_head = (rng.normal(size=(257, 16)) * 0.5 + 2).astype(DTYPES[of])
        student_head = (teacher_head + rng.normal(size=(257, 16)) * 0.01).astype(DTYPES[of])
        options = {"kind": kind, "share": KINDS[kind]} | self.options
        values = linear_divergence(hidden, student_head, hidden, teacher_head, **options)
        wide = [x.astype(np.float64) for x in (hidden, student_head, teacher_head)]
        models = (wide[0], wide[1]), (wide[0], wide[2])
        expected, *_ = oracle.divergence(kind, *models, np.zeros(6), share=KINDS[kind])
        assert 5e-5 < expected.min() < expected.max() < 4e-2
        np.testing.assert_allclose(values, expected, atol=3e-6)

    def test_same_model_gives_zero(self, kind: str) -> None:
        options = {"kind": kind, "share": KINDS[kind]} | self.options
        values = linear_divergence(*SMALL.student, *SMALL.student, **options)
        np.testing.assert_allclose(values, 0, atol=2e-7)

    def test_both_models_trained(self, kind: str) -> None:
        """All four gradients by finite differences; a fixed mixture gives the teacher none."""
        run = compiled(kind, teacher_gradient=True, **self.options)
        values, gradients = run(*SMALL.student, *SMALL.teacher)
        nothing = np.zeros((67, 8)), np.zeros((64, 6))
        assert_equals_oracle(kind, values, (gradients[0], gradients[1], *nothing))
        fixed = kind.endswith("fixed_mixture")
        for at, gradient in enumerate(gradients):
            direction = np.random.default_rng(at).normal(size=gradient.shape)
            found = float(np.sum(np.asarray(gradient, np.float64) * direction))
            if fixed and at >= 2:
                np.testing.assert_array_equal(gradient, 0)
            elif not fixed:
                assert found == pytest.approx(finite_difference(kind, at, direction), abs=3e-5)
                assert abs(found) > 1e-3

    def test_no_gradient_into_temperature_or_share(self) -> None:
        def total(temperature: jax.Array, share: jax.Array) -> jax.Array:
            options = {"kind": "skew_reverse_kl", "temperature": temperature, "share": share}
            options |= self.options | {"vocab_size": SMALL.columns}
            return linear_divergence(*SMALL.student, *SMALL.teacher, **options).sum()

        assert jax.grad(total, argnums=(0, 1))(jnp.float32(2.0), jnp.float32(0.1)) == (0, 0)

    @pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
    def test_any_leading_shape(self, shape: tuple[int, ...]) -> None:
        """Chunks of the implementation's own choice; no token, a token, fewer than a chunk."""
        hidden = np.ones((*shape, 8), np.float32)
        head = np.random.default_rng(2).normal(size=(5, 8)).astype(np.float32)

        def total(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            options = {"implementation": self.implementation}
            values = linear_divergence(hidden, head, hidden, head[::-1], **options)
            return values.sum(), values

        gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
        assert values.shape == shape
        assert [x.shape for x in gradients] == [hidden.shape, head.shape]
        assert all(np.isfinite(x).all() for x in gradients)
        assert (np.asarray(values) > 0).all()

    def test_types_may_differ(self) -> None:
        """bfloat16 student states with a float32 head, a teacher in bfloat16."""
        hidden, head = WIDE.student[0].astype(jnp.bfloat16), WIDE.student[1]
        arrays = hidden, head, *(x.astype(jnp.bfloat16) for x in WIDE.teacher)
        values, gradients = compiled("forward_kl", WIDE, **self.options)(*arrays)
        reference = compiled("forward_kl", WIDE, implementation="reference")
        expected, true = reference(*arrays)
        np.testing.assert_allclose(values, expected, atol=3e-6)
        assert [x.dtype for x in gradients[:2]] == [jnp.bfloat16, jnp.float32]
        np.testing.assert_allclose(gradients[1], true[1], atol=1e-6)

    def test_under_vmap(self) -> None:
        """A batch of heads, as of an ensemble of teachers."""
        models = self.models
        heads = np.stack([models.teacher[1], models.teacher[1][::-1]])
        options = self.options | {"vocab_size": models.columns}

        def of(head: jax.Array) -> jax.Array:
            return linear_divergence(*models.student, models.teacher[0], head, **options)

        np.testing.assert_allclose(jax.vmap(of)(heads), [of(x) for x in heads], atol=1e-6)
