"""What every cross-entropy head must do with K labels a token and the log-probability of the rest.

`LinearCrossEntropyTests` has these tests too.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jaxdistill.kernels import linear_cross_entropy

from tests.kernels import matrix, oracle

RNG = np.random.default_rng(0)
SHAPE, K, VOCABULARY, PADDED = (4, 6), 5, 130, 264
HIDDEN = RNG.normal(size=(*SHAPE, 8)).astype(np.float32)
HEAD = RNG.normal(size=(PADDED, 8)).astype(np.float32)
HEAD[VOCABULARY:] = np.nan
LABELS = RNG.integers(0, VOCABULARY, (*SHAPE, K))
LABELS[..., 3] = LABELS[..., 0]  # a label that stands twice
COTANGENTS = tuple(
    RNG.normal(size=shape).astype(np.float32) for shape in ((*SHAPE, K), SHAPE, SHAPE, SHAPE)
)
OPTIONS = {"temperature": 1.3, "soft_cap": 5.0, "with_entropy": True, "with_rest": True}
DATA, TENSOR = PartitionSpec("data"), PartitionSpec("tensor")
WEIGHTS = np.array([0.2, -0.1, 0.3, 0.1], np.float32)


def run(options: dict, *arrays: jax.Array) -> tuple:
    """The four outputs, and the gradients of hidden and head."""
    hidden, head, labels, *cotangents = arrays
    outputs, pull = jax.vjp(
        lambda *models: tuple(linear_cross_entropy(*models, labels, **OPTIONS, **options)),
        hidden,
        head,
    )
    return outputs, pull(tuple(cotangents))


def split(options: dict, data: int, tensor: int) -> Callable:
    """`run` on a head split over devices."""
    devices = jax.devices()[: data * tensor]
    axes = ("data", "tensor"), (AxisType.Auto,) * 2
    mesh = jax.make_mesh((data, tensor), *axes, devices=devices)
    function = functools.partial(run, options | {"axis_name": "tensor"})
    in_specs, out_specs = (DATA, TENSOR, *[DATA] * 5), (DATA, (DATA, TENSOR))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def with_float64(labels: np.ndarray = LABELS) -> tuple:
    """What `run` must give, in float64; the padding of the head has gradient 0."""
    outputs, (to_hidden, to_head) = oracle.several_labels(
        HIDDEN.reshape(-1, 8).astype(np.float64),
        HEAD[:VOCABULARY].astype(np.float64),
        labels.reshape(-1, labels.shape[-1]),
        tuple(x.reshape(-1, *x.shape[2:]).astype(np.float64) for x in COTANGENTS),
        temperature=1.3,
        soft_cap=5.0,
    )
    padding = np.zeros((PADDED - VOCABULARY, 8))
    shaped = tuple(x.reshape(*SHAPE, *x.shape[1:]) for x in outputs)
    return shaped, (to_hidden.reshape(HIDDEN.shape), np.concatenate([to_head, padding]))


def assert_close(found: tuple, expected: tuple, atol: float = 1e-5) -> None:
    for actual, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert actual.shape == true.shape
        np.testing.assert_allclose(actual, true, atol=atol)


def labels_of(labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """Four a token, the first twice."""
    offsets = jnp.reshape(jnp.array([0, 7, 31, 0]), (1,) * labels.ndim + (4,))
    return (labels[..., None] + offsets) % vocab_size


def matrix_values(options: dict, *arrays: jax.Array) -> jax.Array:
    hidden, head, _, _, labels = arrays
    several = labels_of(labels, head.shape[0])
    options = {"with_rest": True, "temperature": matrix.TEMPERATURE} | options
    out = linear_cross_entropy(hidden, head, several, **options)
    return out.log_prob @ WEIGHTS + 0.3 * out.rest


def matrix_expected(arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    student, _ = matrix.flat_models(arrays)
    labels = np.asarray(labels_of(arrays[4].reshape(-1), len(student[1])))
    cotangents = weights[:, None] * WEIGHTS, 0 * weights, 0 * weights, 0.3 * weights
    (log_prob, _, _, rest), gradients = oracle.several_labels(
        *student, labels, cotangents, matrix.TEMPERATURE
    )
    return log_prob @ WEIGHTS + 0.3 * rest, gradients, gradients


class SeveralLabelsTests:
    """implementation, chunks: the arguments that name an implementation and its chunks."""

    implementation: ClassVar[str]
    chunks: ClassVar[dict[str, int]]

    @property
    def options(self) -> dict[str, Any]:
        return {"implementation": self.implementation, **self.chunks}

    def test_several_labels_in_the_matrix(
        self, several_vocab_size: int, several_place: str, several_dtype: jnp.dtype
    ) -> None:
        values = functools.partial(matrix_values, self.options)
        case = several_vocab_size, several_dtype, several_place
        matrix.assert_against_float64(values, matrix_expected, *case)

    @pytest.mark.parametrize("layout", ["vd", "dv"])
    def test_several_labels_equal_oracle(self, layout: str) -> None:
        """All outputs, cap, temperature, NaN in the padding, a label twice, both layouts."""
        options = self.options | {"head_layout": layout, "vocab_size": VOCABULARY}
        head = HEAD if layout == "vd" else HEAD.T
        outputs, (to_hidden, to_head) = jax.jit(functools.partial(run, options))(
            HIDDEN, head, LABELS, *COTANGENTS
        )
        to_head = to_head if layout == "vd" else to_head.T
        assert_close((outputs, (to_hidden, to_head)), with_float64())

    def test_the_rest_where_the_labels_have_all_the_mass(self) -> None:
        """1 - sum p is 0 in float32; the rest is 4 e^-40, and its gradient that of 4 columns."""
        hidden = np.ones((1, 1), np.float32)
        head = np.array([[0.0], [0.0], [-40.0], [-40.0], [-40.0], [-40.0]], np.float32)
        options = self.options | {"with_rest": True}
        value, gradient = jax.value_and_grad(
            lambda head: linear_cross_entropy(hidden, head, np.array([[0, 1]]), **options).rest[0]
        )(head)
        np.testing.assert_allclose(value, np.log(4) - 40 - np.log(2), rtol=1e-6)
        np.testing.assert_allclose(gradient[:, 0], [-0.5, -0.5, *[0.25] * 4], rtol=1e-5)

    def test_no_column_is_left(self) -> None:
        """-inf, and no gradient where a constant is; the log-probabilities sum to 1."""
        labels = np.broadcast_to(np.random.default_rng(1).permutation(20), (*SHAPE, 20))
        options = self.options | {"with_rest": True}

        def total(hidden: jax.Array) -> tuple[jax.Array, tuple]:
            out = linear_cross_entropy(hidden, HEAD[:20], labels, **options)
            return jnp.sum(jnp.where(jnp.isinf(out.rest), 0.0, out.rest)), (out.rest, out.log_prob)

        gradient, (rest, log_prob) = jax.jit(jax.grad(total, has_aux=True))(HIDDEN)
        np.testing.assert_array_equal(rest, -np.inf)
        np.testing.assert_allclose(np.exp(log_prob).sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(gradient, 0)

    def test_one_of_several_out_of_range_is_nan_in_its_place_alone(self) -> None:
        """It takes nothing from the rest, and a mask removes it with its gradient."""
        labels = LABELS.copy()
        labels[0, 0] = [-1, 7, VOCABULARY, PADDED + 9, -VOCABULARY]
        options = OPTIONS | self.options | {"vocab_size": VOCABULARY}

        @jax.jit
        def run(hidden: jax.Array, labels: jax.Array) -> tuple:
            def total(hidden: jax.Array) -> tuple[jax.Array, tuple]:
                out = linear_cross_entropy(hidden, HEAD, labels, **options)
                known = jnp.where(jnp.isnan(out.log_prob), 0.0, out.log_prob)
                return known.sum() + out.rest.sum(), (out.log_prob, out.rest)

            return jax.grad(total, has_aux=True)(hidden)

        gradient, (log_prob, rest) = run(HIDDEN, labels)
        outside = np.zeros((*SHAPE, K), bool)
        outside[0, 0] = [True, False, True, True, True]
        np.testing.assert_array_equal(np.isnan(log_prob), outside)
        np.testing.assert_allclose(rest[0, 0], np.log1p(-np.exp(log_prob[0, 0, 1])), rtol=1e-5)
        assert np.isfinite(gradient).all()

    def test_one_label_in_a_dimension_of_its_own(self) -> None:
        options = {"implementation": self.implementation, "vocab_size": VOCABULARY}
        plain = linear_cross_entropy(HIDDEN, HEAD, LABELS[..., 0], **options)
        found = linear_cross_entropy(HIDDEN, HEAD, LABELS[..., :1], **options)
        np.testing.assert_array_equal(found.log_prob, plain.log_prob[..., None])
        assert found.rest is None

    @pytest.mark.slow
    def test_vmap_of_several_labels_equals_a_loop(self) -> None:
        heads = np.stack([HEAD, 2 * HEAD, -HEAD, HEAD])[:, :VOCABULARY]
        function = jax.jit(functools.partial(run, self.options))
        arrays = HIDDEN, heads, LABELS, *COTANGENTS
        together = jax.jit(jax.vmap(function))(*arrays)
        one_by_one = [function(*x) for x in zip(*arrays, strict=True)]
        assert_close(together, jax.tree.map(lambda *x: np.stack(x), *one_by_one), atol=2e-6)

    @pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
    def test_several_labels_of_any_leading_shape(self, shape: tuple[int, ...]) -> None:
        hidden, labels = np.ones((*shape, 8), np.float32), np.zeros((*shape, 2), int)
        options = {"with_rest": True, "implementation": self.implementation}
        out = linear_cross_entropy(hidden, HEAD[:9], labels, **options)
        assert out.log_prob.shape == (*shape, 2)
        assert out.log_sum_exp.shape == out.rest.shape == shape

    @pytest.mark.parametrize(
        ("data", "tensor"), [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)]
    )
    def test_split_equals_whole(self, data: int, tensor: int) -> None:
        """130 of 264 columns: one device has some that do not count, others none that do."""
        options = self.options | {"vocab_size": VOCABULARY}
        found = split(options, data, tensor)(HIDDEN, HEAD, LABELS, *COTANGENTS)
        assert_close(found, with_float64())

    def test_split_where_devices_have_no_rest(self) -> None:
        """Token 0: all but one column are labels; token 1: all are, one more is out of range."""
        labels = np.broadcast_to(np.arange(8), (*SHAPE, 8)).copy()
        labels[0, 0, 7], labels[0, 2, 7] = 0, 100
        cotangents = np.ones((*SHAPE, 8), np.float32), *COTANGENTS[1:]
        (log_prob, _, _, rest), gradients = split(self.options, 1, 4)(
            HIDDEN, HEAD[:8], labels, *cotangents
        )
        whole = functools.partial(run, {"implementation": "reference"})
        (true_log_prob, _, _, true_rest), true_gradients = jax.jit(whole)(
            HIDDEN, HEAD[:8], labels, *cotangents
        )
        assert np.isfinite(rest[0, [0, 2]]).all()
        assert np.isinf(rest).sum() == rest.size - 2
        assert np.isnan(log_prob).sum() == 1
        assert_close((log_prob, rest, gradients), (true_log_prob, true_rest, true_gradients))
