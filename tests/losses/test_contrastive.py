"""NT-Xent and Barlow Twins: limits, symmetries, and the same numbers over four devices."""

import functools
import re

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxdistill import losses
from jaxdistill.losses import Weighted

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(2, 8, 3)).astype(np.float32)
MASK = np.array([1, 1, 0, 1, 0, 1, 1, 1], bool)
ENCODER = RNG.normal(size=(3, 3)).astype(np.float32)
TYPES = np.arange(8) % 2
nt_xent = jax.jit(losses.nt_xent)
barlow = jax.jit(losses.barlow_twins)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_nt_xent_of_orthogonal_examples(temperature: float) -> None:
    """Equal views and 2N - 2 negatives at right angles, whatever their lengths."""
    views = np.eye(4, dtype=np.float32)
    value = nt_xent(3 * views, views, temperature=temperature)
    alone = np.exp(1 / temperature)
    np.testing.assert_allclose(value, -np.log(alone / (alone + 6)), rtol=1e-5, atol=1e-6)


def test_nt_xent_of_one_example_is_0() -> None:
    """Itself is no candidate and there are no negatives."""
    np.testing.assert_allclose(nt_xent(FIRST[:1], SECOND[:1]), 0, atol=1e-6)


def test_nt_xent_does_not_see_the_order() -> None:
    value = nt_xent(FIRST, SECOND)
    np.testing.assert_allclose(nt_xent(SECOND, FIRST), value, rtol=1e-5)
    order = RNG.permutation(8)
    np.testing.assert_allclose(nt_xent(FIRST[order], SECOND[order]), value[order], rtol=1e-5)


def test_views_of_zeros_are_at_right_angles_to_all() -> None:
    run = jax.jit(jax.value_and_grad(lambda x: losses.nt_xent(x, SECOND).sum()))
    value, gradient = run(0 * FIRST)
    assert np.isfinite(value)
    assert not np.asarray(gradient).any()


def test_barlow_twins_does_not_see_scale_and_shift_of_features() -> None:
    value = barlow(FIRST, SECOND).mean()
    changed = barlow(FIRST * np.array([100, 2, 5], np.float32) + 3, SECOND).mean()
    np.testing.assert_allclose(changed, value, rtol=1e-3)


def test_barlow_twins_of_equal_and_of_constant_features() -> None:
    """What a view repeats of itself, off the diagonal alone; what never varies, 1 a feature."""
    same = barlow(FIRST, FIRST, off_diagonal_weight=0.0).mean()
    np.testing.assert_allclose(same, 0, atol=1e-6)
    twice = np.repeat(FIRST[:, :1], 2, axis=1)
    np.testing.assert_allclose(barlow(twice, twice, off_diagonal_weight=0.5).mean(), 1, rtol=1e-4)
    run = jax.jit(jax.value_and_grad(lambda x: losses.barlow_twins(x, SECOND).mean()))
    value, gradient = run(np.ones_like(FIRST))
    np.testing.assert_allclose(value, 3, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_barlow_twins_is_weighted_by_rows() -> None:
    parts = barlow(FIRST[:6], SECOND[:6]), barlow(FIRST[6:], SECOND[6:])
    assert [part.weight for part in parts] == [6, 2]
    mean = (6 * parts[0].mean() + 2 * parts[1].mean()) / 8
    np.testing.assert_allclose((parts[0] + parts[1]).mean(), mean, rtol=1e-6)


def balance(first: jax.Array, second: jax.Array, mask: jax.Array, **options) -> Weighted:
    """LoRAMoE's, of gates that the first view chooses; sample types alternate on each device."""
    gates = jax.nn.softmax(first @ np.eye(3, 4, dtype=np.float32))[:, None]
    types = TYPES[: first.shape[0]]
    return losses.localized_balance(gates, types, mask[:, None], delta=0.3, **options)


def contrast(first: jax.Array, second: jax.Array, mask: jax.Array, **options) -> Weighted:
    return losses.token_mean(losses.nt_xent(first, second, mask, **options), mask)


LOSSES = [contrast, losses.barlow_twins, balance]


def encoded(loss, encoder: jax.Array, first: jax.Array, second: jax.Array, mask, **options):
    return loss(first @ encoder, second @ encoder, mask, **options)


@functools.partial(jax.jit, static_argnums=0)
def on_one_device(loss, *arrays):
    """Mean over the kept rows, and its gradients in the encoder and the views."""
    mean = lambda *arrays: encoded(loss, *arrays).mean()  # noqa: E731 - argnums by position
    return jax.value_and_grad(mean, argnums=(0, 1, 2))(*arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def on_four_devices(loss, gradient_inside: bool, *arrays):
    """The same over a mesh of 2 x 2, with the gradient taken outside of shard_map or inside."""
    axes = ("replica", "fsdp")
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    rows, whole = PartitionSpec(axes), PartitionSpec()
    specs = (whole, rows, rows, rows)

    def share(*arrays):
        """This device's part of the mean."""
        weighted = encoded(loss, *arrays, axis_name=axes)
        return weighted.sum / lax.psum(weighted.weight, axes)

    def mean(*arrays):
        return lax.psum(share(*arrays), axes)

    def inside(*arrays):
        value, gradients = jax.value_and_grad(share, argnums=(0, 1, 2))(*arrays)
        return lax.psum(value, axes), gradients

    if gradient_inside:
        out = (whole, (whole, rows, rows))
        return jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=out)(*arrays)
    outside = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=whole)
    return jax.value_and_grad(outside, argnums=(0, 1, 2))(*arrays)


@pytest.mark.parametrize("gradient_inside", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_four_devices_equal_one(loss, gradient_inside: bool) -> None:
    """Value and gradient of the whole batch, with rows that do not exist on two of the devices."""
    arrays = ENCODER, FIRST, SECOND, MASK
    value, gradients = on_one_device(loss, *arrays)
    found, found_gradients = on_four_devices(loss, gradient_inside, *arrays)
    assert value > 0.01
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for actual, expected in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_dropped_rows_are_as_if_cut_off_though_they_hold_nan(loss) -> None:
    first, second = FIRST.copy(), SECOND.copy()
    first[~MASK] = second[~MASK] = np.nan
    identity = np.eye(3, dtype=np.float32)
    value, gradients = on_one_device(loss, identity, first, second, MASK)
    cut = on_one_device(loss, identity, FIRST[MASK], SECOND[MASK], np.ones(6, bool))
    np.testing.assert_allclose(value, cut[0], rtol=1e-5)
    for actual, expected in zip(gradients[1:], cut[1][1:], strict=True):
        np.testing.assert_allclose(np.asarray(actual)[MASK], expected, atol=1e-6)
        assert not np.asarray(actual)[~MASK].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_in_the_batch(loss) -> None:
    value, gradients = on_one_device(loss, ENCODER, FIRST, SECOND, 0 * MASK)
    assert value == 0
    assert not any(np.asarray(x).any() for x in gradients)


def test_negatives_of_other_devices_get_a_gradient() -> None:
    """Of the loss of the first row alone, in a view that lives on the last device."""
    mask = np.arange(8) == 0
    first_row = lambda first, second, keep, **options: losses.token_mean(  # noqa: E731
        losses.nt_xent(first, second, **options), keep
    )
    gradients = on_four_devices(first_row, False, ENCODER, FIRST, SECOND, mask)[1]
    assert (np.abs(np.asarray(gradients[2])[7]) > 1e-6).any()


INVALID = [
    (
        lambda: losses.nt_xent(FIRST, SECOND[:5]),
        "second must have the shape of first, (8, 3), but its shape is (5, 3)",
    ),
    (
        lambda: losses.nt_xent(FIRST[0], SECOND[0]),
        "first must be floating with shape [N, D], but it is float32 with shape (3,)",
    ),
    (
        lambda: losses.nt_xent(FIRST, SECOND, temperature=0.0),
        "temperature must be finite and above 0, but it is 0.0",
    ),
    (
        lambda: losses.nt_xent(FIRST, SECOND, MASK[:3]),
        "mask must have shape (8,), but its shape is (3,)",
    ),
    (
        lambda: losses.barlow_twins(FIRST, SECOND.astype(int)),
        "second must be floating with shape [N, D], but it is int",
    ),
    (
        lambda: losses.barlow_twins(FIRST, SECOND, off_diagonal_weight=-1.0),
        "off_diagonal_weight must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.barlow_twins(FIRST, SECOND, MASK[:, None]),
        "mask must have shape (8,), but its shape is (8, 1)",
    ),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
