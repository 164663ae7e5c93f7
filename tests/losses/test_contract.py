"""The contract of `design.md`, run over every registered loss."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdistill.losses import token_mean
from tests.losses import oracle
from tests.losses.contract import BATCH, Case, all_cases, in_float64, is_floating, public_losses

CASES = all_cases()
ROWWISE = [case for case in CASES if case.rowwise]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def objective(loss: Callable, floating: dict, whole: dict, mask: jax.Array) -> tuple:
    """Masked mean of the loss, and its values; `floating` and `whole` are inputs by position."""
    inputs = {**floating, **whole}
    values = loss(*(inputs[position] for position in range(len(inputs))))
    return token_mean(values, mask).mean(), values


class Compiled:
    """(inputs, mask) -> mean, values, gradients of the mean in all floating inputs."""

    def __init__(self, case: Case) -> None:
        self.traces = 0

        def counted(*inputs: jax.Array) -> jax.Array:
            self.traces += 1
            return case.loss(*inputs)

        self.run = jax.jit(jax.value_and_grad(functools.partial(objective, counted), has_aux=True))

    def __call__(self, inputs: list, mask: np.ndarray) -> tuple:
        (mean, values), gradients = self.run(*split(inputs), mask)
        return mean, values, gradients


compiled = functools.cache(Compiled)


def split(inputs: list) -> tuple[dict, dict]:
    floating = {i: x for i, x in enumerate(inputs) if is_floating(x)}
    return floating, {i: x for i, x in enumerate(inputs) if i not in floating}


def weights(case: Case) -> np.ndarray:
    """A random positive weight for every value of the loss."""
    shape = case.oracle(*in_float64(case.make())).shape
    return np.random.default_rng(1).uniform(0.5, 1.5, shape).astype(np.float32)


def assert_near(actual: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance * scale)


def assert_gradients(
    case: Case, gradients: dict, inputs: list[np.ndarray], mask: np.ndarray, tolerance: float
) -> None:
    """Gradients are those of the surrogate, and zeros where none is promised."""
    wide = in_float64(inputs)
    surrogate = case.frozen_surrogate(wide)

    def mean(*arguments: np.ndarray) -> float:
        return oracle.weighted_mean(surrogate(*arguments), mask)

    for position, gradient in gradients.items():
        assert gradient.dtype == inputs[position].dtype
        if position in case.differentiable:
            expected = oracle.gradient(mean, wide, position)
            scale = max(float(np.abs(expected).max()), 1e-3)
            error = np.abs(np.asarray(gradient, np.float64) - expected).max()
            assert error <= tolerance * scale, f"input {position}: {error} at scale {scale}"
        else:
            assert not np.asarray(gradient, np.float32).any(), f"input {position} has a gradient"


def test_every_loss_is_registered() -> None:
    assert {case.name.split("/")[0] for case in CASES} == public_losses()


@each(CASES)
def test_value_and_gradient(case: Case) -> None:
    inputs = case.make()
    mask = weights(case)
    mean, values, gradients = compiled(case)(inputs, mask)
    expected = case.oracle(*in_float64(inputs))
    assert values.dtype == jnp.float32
    assert values.shape == expected.shape
    assert_near(values, expected, case.tolerance)
    assert_near(mean, np.asarray(oracle.weighted_mean(expected, mask)), case.tolerance)
    assert_gradients(case, gradients, inputs, mask, 10 * case.tolerance)


@each(CASES)
def test_plain_numpy_outside_jit(case: Case) -> None:
    inputs = case.make()
    assert_near(case.loss(*inputs), case.oracle(*in_float64(inputs)), case.tolerance)


@each(CASES)
def test_bfloat16_inputs(case: Case) -> None:
    """The same rounded numbers go to the oracle: nothing is computed in bfloat16."""
    inputs = [x.astype(jnp.bfloat16) if is_floating(x) else x for x in case.make()]
    mask = weights(case)
    _, values, gradients = compiled(case)(inputs, mask)
    assert values.dtype == jnp.float32
    assert_near(values, case.oracle(*in_float64(inputs)), case.tolerance)
    assert_gradients(case, gradients, inputs, mask, tolerance=2**-7)


@each(CASES)
def test_extreme_logits(case: Case) -> None:
    inputs = case.make()
    rng = np.random.default_rng(2)
    for position in case.differentiable if case.extreme is None else case.extreme:
        signs = rng.choice([-1.0, 1.0], inputs[position].shape)
        inputs[position] = (1e4 * signs).astype(np.float32)
    _, values, gradients = compiled(case)(inputs, weights(case))
    assert np.isfinite(values).all()
    assert all(np.isfinite(x).all() for x in gradients.values())


@each(CASES)
def test_all_masked_gives_zero(case: Case) -> None:
    inputs = case.make()
    mean, _, gradients = compiled(case)(inputs, 0 * weights(case))
    assert mean == 0
    assert not any(np.asarray(x).any() for x in gradients.values())


@each(ROWWISE)
def test_masked_equals_kept_subset(case: Case) -> None:
    """Rows that are masked out change neither the mean nor get a gradient, whatever they hold."""
    inputs = case.make()
    mask = weights(case)
    kept = np.array([0, 3, 4, 6])
    dropped = np.setdiff1d(np.arange(BATCH), kept)
    mask[dropped] = 0
    mean, _, gradients = compiled(case)(inputs, mask)
    rows = [x if i in case.shared else x[kept] for i, x in enumerate(inputs)]
    expected = oracle.weighted_mean(case.oracle(*in_float64(rows)), mask[kept])
    assert_near(mean, np.asarray(expected), case.tolerance)
    for position, gradient in gradients.items():
        if position not in case.shared:
            assert not np.asarray(gradient)[dropped].any()


@each(ROWWISE)
def test_permuting_rows_permutes_values(case: Case) -> None:
    inputs = case.make()
    mask = weights(case)
    order = np.random.default_rng(3).permutation(BATCH)
    permuted = [x if i in case.shared else x[order] for i, x in enumerate(inputs)]
    _, values, gradients = compiled(case)(inputs, mask)
    _, permuted_values, permuted_gradients = compiled(case)(permuted, mask[order])
    assert_near(permuted_values, np.asarray(values)[order], case.tolerance)
    for position, gradient in gradients.items():
        expected = np.asarray(gradient) if position in case.shared else np.asarray(gradient)[order]
        assert_near(permuted_gradients[position], expected, case.tolerance)


@each(CASES)
def test_traced_once(case: Case) -> None:
    """New values are not a new program: one trace, the labels and the mask are no constants."""
    run = compiled(case)
    run(case.make(0), weights(case))
    before = run.traces
    inputs = case.make(1)
    _, values, _ = run(inputs, 0 * weights(case))
    assert run.traces == before
    assert_near(values, case.oracle(*in_float64(inputs)), case.tolerance)


@each(CASES)
def test_vmap_equals_loop(case: Case) -> None:
    sets = [case.make(seed) for seed in range(2)]
    stacked = [np.stack(arrays) for arrays in zip(*sets, strict=True)]
    expected = np.stack([case.oracle(*in_float64(inputs)) for inputs in sets])
    assert_near(jax.jit(jax.vmap(case.loss))(*stacked), expected, case.tolerance)


@each(ROWWISE)
def test_inside_shard_map(case: Case) -> None:
    """Rows on four devices: values and gradients are those of one device."""
    inputs = case.make()
    mask = weights(case)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = tuple(whole if i in case.shared else rows for i in range(len(inputs)))
    sharded = jax.shard_map(case.loss, mesh=mesh, in_specs=specs, out_specs=rows)
    run = jax.jit(jax.value_and_grad(functools.partial(objective, sharded), has_aux=True))
    (mean, values), gradients = run(*split(inputs), mask)
    expected_mean, expected_values, expected_gradients = compiled(case)(inputs, mask)
    assert_near(mean, np.asarray(expected_mean), case.tolerance)
    assert_near(values, np.asarray(expected_values), case.tolerance)
    for position, gradient in gradients.items():
        assert_near(gradient, np.asarray(expected_gradients[position]), case.tolerance)
