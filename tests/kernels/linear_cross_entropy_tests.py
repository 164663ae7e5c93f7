"""What every implementation of the cross-entropy head must do: a class, subclassed for each."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import linear_cross_entropy, on_tpu

from tests.kernels import matrix, oracle, several_labels_tests

RNG = np.random.default_rng(0)
SHAPE, VOCABULARY, PADDED = (3, 13), 261, 400
HIDDEN = RNG.normal(size=(*SHAPE, 8)).astype(np.float32)
HEAD = RNG.normal(size=(PADDED, 8)).astype(np.float32)
LABELS = RNG.integers(0, VOCABULARY, SHAPE)
COTANGENTS = tuple(RNG.normal(size=SHAPE).astype(np.float32) for _ in range(3))
OPTIONS = {"temperature": 1.3, "vocab_size": VOCABULARY, "soft_cap": 5.0, "with_entropy": True}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compiled(**options: Any) -> Callable:
    """(hidden, head) -> the three outputs and the gradients of hidden and head."""
    return _compiled(on_tpu.INTERPRET.get(), **options)


@functools.cache
def _compiled(_interpret: Any, **options: Any) -> Callable:
    def function(hidden: jax.Array, head: jax.Array) -> tuple:
        out = linear_cross_entropy(hidden, head, LABELS, **OPTIONS, **options)
        return out.log_prob, out.log_sum_exp, out.entropy

    @jax.jit
    def run(hidden: jax.Array, head: jax.Array) -> tuple:
        outputs, pull = jax.vjp(function, hidden, head)
        return outputs, pull(COTANGENTS)

    return run


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


def matrix_values(options: dict, *arrays: jax.Array) -> jax.Array:
    hidden, head, _, _, labels = arrays
    options = options | {"temperature": matrix.TEMPERATURE}
    return -linear_cross_entropy(hidden, head, labels, **options).log_prob


def matrix_expected(arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    student, _ = matrix.flat_models(arrays)
    cotangents = -weights, np.zeros_like(weights), np.zeros_like(weights)
    labels = arrays[4].reshape(-1)
    (log_prob, _, _), gradients = oracle.cross_entropy(
        *student, labels, cotangents, matrix.TEMPERATURE
    )
    return -log_prob, gradients, gradients


class LinearCrossEntropyTests(several_labels_tests.SeveralLabelsTests):
    """Outputs and the gradients of hidden and head through all of them, against float64.

    vocabularies: aligned, V + 1 and prime, for this implementation's chunks.
    products: how many matrix products value and gradients take at least.
    """

    vocabularies: ClassVar[tuple[int, ...]] = matrix.VOCABULARIES
    products: ClassVar[int] = 4

    def by_default(self, vocab_size: int, place: str, dtype: str) -> bool:
        """Which cases of the matrix are not slow: a compilation takes a second."""
        return place == "jit" or vocab_size == self.vocabularies[-1]

    def several_by_default(self, vocab_size: int, place: str, dtype: str) -> bool:
        """The same of several labels."""
        return False

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases = list(itertools.product(self.vocabularies, ("jit", "shard_map"), DTYPES))
        for prefix, by_default in (("", self.by_default), ("several_", self.several_by_default)):
            names = [f"{prefix}{x}" for x in ("vocab_size", "place", "dtype")]
            if names[0] not in metafunc.fixturenames:
                continue
            params = [
                pytest.param(
                    *case[:2],
                    DTYPES[case[2]],
                    marks=() if by_default(*case) else pytest.mark.slow,
                    id="-".join(map(str, case)),
                )
                for case in cases
            ]
            metafunc.parametrize(names, params)

    def test_matrix(self, vocab_size: int, place: str, dtype: jnp.dtype) -> None:
        values = functools.partial(matrix_values, self.options)
        matrix.assert_against_float64(values, matrix_expected, vocab_size, dtype, place)

    @pytest.mark.parametrize("labels", ["one", "several"])
    def test_every_product_accumulates_in_float32(self, labels: str) -> None:
        """A CPU may keep digits that bfloat16 drops, so the program says it, not the numbers."""
        make = matrix.make(3.0, self.vocabularies[-1], jnp.bfloat16)
        of = matrix_values if labels == "one" else several_labels_tests.matrix_values
        function = functools.partial(matrix.run, functools.partial(of, self.options), None)
        program = str(jax.make_jaxpr(function)(*make, matrix.masks()["none"]))
        types = re.findall(r":(\w+)\[[^\]]*\] = dot_general", program)
        assert len(types) >= self.products
        assert set(types) == {"f32"}

    @pytest.mark.parametrize("layout", ["vd", "dv"])
    def test_equals_oracle(self, layout: str) -> None:
        """Cap, temperature, padding and all three outputs, whichever way the head lies."""
        run = compiled(**self.options, head_layout=layout)
        outputs, (to_hidden, to_head) = run(HIDDEN, HEAD if layout == "vd" else HEAD.T)
        assert_equals_oracle(outputs, to_hidden, to_head if layout == "vd" else to_head.T)

    @pytest.mark.parametrize("layout", ["vd", "dv"])
    def test_padded_columns_are_never_touched(self, layout: str) -> None:
        """NaN in the padding reaches neither the value nor a gradient."""
        poisoned = HEAD.copy()
        poisoned[VOCABULARY:] = np.nan
        run = compiled(**self.options, head_layout=layout)
        heads = (HEAD, poisoned) if layout == "vd" else (HEAD.T, poisoned.T)
        jax.tree.map(np.testing.assert_array_equal, *(run(HIDDEN, head) for head in heads))

    def test_nan_in_a_state_stays_at_its_position(self) -> None:
        """It is not lost: all its values are NaN, as its gradient is."""
        hidden = HIDDEN.copy()
        hidden[1, 2] = np.nan
        outputs, (to_hidden, _) = compiled(**self.options, head_layout="vd")(hidden, HEAD)
        where = np.zeros(SHAPE, bool)
        where[1, 2] = True
        for values in (*outputs, to_hidden[..., 0]):
            np.testing.assert_array_equal(np.isnan(values), where)

    def test_entropy_of_a_sharp_distribution_keeps_its_digits(self) -> None:
        """Large logits: log-sum-exp minus mean logit would lose all digits of a small entropy."""
        hidden = np.ones((1, 1), np.float32)
        head = np.array([[1000.0], [990.0], [989.0]], np.float32)
        options = {"with_entropy": True, "implementation": self.implementation}
        out = linear_cross_entropy(hidden, head, np.array([0]), **options)
        (_, _, entropy), _ = oracle.cross_entropy(
            hidden.astype(np.float64), head.astype(np.float64), np.array([0]), (np.zeros(1),) * 3
        )
        np.testing.assert_allclose(out.entropy, entropy, rtol=1e-5)

    def test_types_of_hidden_and_head_may_differ(self) -> None:
        """bfloat16 states with a float32 head: products in float32, gradients in each's type."""
        hidden = HIDDEN.astype(jnp.bfloat16)
        run = compiled(**self.options, head_layout="vd")
        outputs, (to_hidden, to_head) = run(hidden, HEAD)
        widened, (_, true_head) = run(hidden.astype(np.float32), HEAD)
        assert (to_hidden.dtype, to_head.dtype) == (jnp.bfloat16, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, outputs, widened)
        np.testing.assert_array_equal(to_head, true_head)

    def test_label_out_of_range_under_jit_is_nan_there_alone(self) -> None:
        """Not the value of some other label; a mask removes it with its gradient."""
        labels = LABELS.copy()
        labels[0, :5] = [-1, -100, VOCABULARY, PADDED - 1, 1000]
        mask = np.ones(SHAPE, bool)
        mask[0, :5] = False
        options = self.options | {"vocab_size": VOCABULARY}

        @jax.jit
        def run(hidden: jax.Array, labels: jax.Array) -> tuple:
            def total(hidden: jax.Array) -> tuple:
                out = linear_cross_entropy(hidden, HEAD, labels, **options)
                return jnp.sum(jnp.where(mask, out.log_prob, 0.0)), out.log_prob

            return jax.grad(total, has_aux=True)(hidden)

        gradient, log_prob = run(HIDDEN, labels)
        np.testing.assert_array_equal(np.isnan(log_prob), ~mask)
        assert np.isfinite(gradient).all()
        assert not gradient[0, :5].any()

    @pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
    def test_any_leading_shape(self, shape: tuple[int, ...]) -> None:
        def log_prob(hidden: jax.Array) -> jax.Array:
            labels = np.zeros(shape, int)
            out = linear_cross_entropy(hidden, HEAD, labels, implementation=self.implementation)
            assert out.log_prob.shape == out.log_sum_exp.shape == shape
            assert out.entropy is None
            return out.log_prob.sum()

        hidden = np.ones((*shape, 8), np.float32)
        assert jax.grad(log_prob)(hidden).shape == hidden.shape

    def test_vmap_equals_a_loop(self) -> None:
        """Over states and heads, as an ensemble has them."""
        heads = np.stack([HEAD, 2 * HEAD, -HEAD])
        options = self.options | {"vocab_size": VOCABULARY}

        def log_prob(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return linear_cross_entropy(hidden, head, LABELS[0], **options).log_prob

        gradient = jax.jit(jax.grad(lambda *x: log_prob(*x).sum(), argnums=(0, 1)))
        together = jax.jit(jax.vmap(gradient))(HIDDEN, heads)
        one_by_one = [gradient(*x) for x in zip(HIDDEN, heads, strict=True)]
        for batched, single in zip(together, zip(*one_by_one, strict=True), strict=True):
            np.testing.assert_allclose(batched, np.stack(single), atol=2e-6)

    def test_traced_once_whatever_the_values(self) -> None:
        """Temperature and labels are operands: neither is compiled for."""
        traces = []

        @jax.jit
        def run(temperature: jax.Array, labels: jax.Array) -> jax.Array:
            traces.append(1)
            options = self.options | {"temperature": temperature}
            return linear_cross_entropy(HIDDEN[0], HEAD, labels, **options).log_prob

        values = [run(np.float32(x), LABELS[y]) for x, y in ((0.5, 0), (2.0, 0), (2.0, 1))]
        assert len(traces) == 1
        assert not np.allclose(values[0], values[1])
        assert not np.allclose(values[1], values[2])
