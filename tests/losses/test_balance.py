"""Where LoRAMoE's balance is at its minimum, and what counts as a sample."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import softmax

RNG = np.random.default_rng(0)
GATES = softmax(RNG.normal(size=(4, 5, 6))).astype(np.float32)
TYPES = np.array([1, 0, 1, 0])
FORMS = pytest.mark.parametrize("form", ["squared_mean", "mean"])
balance = jax.jit(
    losses.localized_balance, static_argnames=("delta", "form", "average_tokens", "axis_name")
)


@FORMS
def test_minimum_is_inverse_to_the_marks(form: str) -> None:
    """Six experts, delta 0.3: the marked half gets 0.117 each, the other 0.217."""
    first_marked = np.repeat([1 / 1.3, 1 / 0.7], 3) / (3 / 1.3 + 3 / 0.7)
    gates = np.stack([first_marked, first_marked[::-1]])[:, None].astype(np.float32)
    np.testing.assert_allclose(gates[0, 0, [0, 5]], [0.117, 0.217], atol=5e-4)
    least = balance(gates, np.array([1, 0]), delta=0.3, form=form).mean()
    np.testing.assert_allclose(least, 0, atol=1e-6)
    assert balance(gates, np.array([0, 1]), delta=0.3, form=form).mean() > 0.05


def test_delta_0_does_not_see_types() -> None:
    values = [balance(GATES, types, delta=0.0).mean() for types in (TYPES, 1 - TYPES, 0 * TYPES)]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    np.testing.assert_allclose(balance(0 * GATES + 1 / 6, TYPES, delta=0.0).mean(), 0, atol=1e-6)


def test_squared_mean_does_not_see_length() -> None:
    """Every token twice doubles Z: variance over squared mean stays, over the mean doubles."""
    twice = np.concatenate([GATES, GATES], axis=1)
    for form, ratio in (("squared_mean", 1), ("mean", 2)):
        long, short = (balance(x, TYPES, form=form).mean() for x in (twice, GATES))
        np.testing.assert_allclose(long, ratio * short, rtol=1e-5)


def test_averaged_tokens_do_not_see_the_length_of_a_sample() -> None:
    mask = np.ones((4, 5), bool)
    mask[1:, 1:] = False
    gates = np.repeat(GATES[:, :1], 5, axis=1)
    averaged = balance(gates, TYPES, mask, average_tokens=True).mean()
    np.testing.assert_allclose(averaged, balance(GATES[:, :1], TYPES).mean(), rtol=1e-5)
    assert abs(averaged - balance(gates, TYPES, mask).mean()) > 0.1


@FORMS
def test_padding_and_empty_samples_are_as_if_cut_off_though_they_hold_nan(form: str) -> None:
    mask = np.ones((4, 5), bool)
    mask[:, 3:] = mask[2] = False
    gates = np.where(mask[..., None], GATES, np.nan)
    run = jax.jit(
        jax.value_and_grad(
            lambda gates, *rest: losses.localized_balance(gates, *rest, form=form).mean()
        )
    )
    value, gradient = run(gates, TYPES, mask)
    kept = np.array([0, 1, 3])
    expected, cut = run(GATES[kept, :3], TYPES[kept])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[kept, :3], cut, atol=1e-6)
    assert not np.asarray(gradient)[~mask].any()
    assert balance(GATES, TYPES, mask).weight == 3
    assert balance(GATES, TYPES, 0 * mask, form=form).mean() == 0


@pytest.mark.parametrize("average_tokens", [False, True])
def test_packed_equals_unpacked(average_tokens: bool) -> None:
    """Samples of 5, 2 and 4 tokens, the prompt of the last masked, in two rows with padding."""
    options = {"delta": 0.3, "average_tokens": average_tokens}
    lengths, prompts, types = (5, 2, 4), (0, 0, 2), np.array([1, 1, 0])
    mask = np.array([[p <= t < n for t in range(5)] for n, p in zip(lengths, prompts, strict=True)])
    packed = np.full((2, 7, 6), np.nan, np.float32)
    ids, packed_types, packed_mask = np.zeros((3, 2, 7), int)
    for sample, row, start in ((0, 0, 0), (1, 0, 5), (2, 1, 0)):
        place = (row, slice(start, start + lengths[sample]))
        packed[place] = GATES[sample, : lengths[sample]]
        ids[place], packed_types[place] = sample + 1, types[sample]
        packed_mask[place] = mask[sample, : lengths[sample]]
    expected = balance(GATES[:3], types, mask, **options)
    found = balance(packed, packed_types, packed_mask, ids, **options)
    assert found.weight == expected.weight == 3
    np.testing.assert_allclose(found.sum, expected.sum, rtol=1e-5)
    gradient = jax.jit(
        jax.grad(
            lambda gates: losses.localized_balance(
                gates, packed_types, packed_mask, ids, **options
            ).mean()
        )
    )(packed)
    np.testing.assert_array_equal(np.asarray(gradient).any(-1), packed_mask)


call = functools.partial(losses.localized_balance, GATES)
INVALID = [
    (lambda: call(TYPES, delta=1.5), "delta must lie in [0.0, 1.0], but it is 1.5"),
    (
        lambda: call(TYPES, form="variance"),
        "form must be one of 'squared_mean', 'mean', but it is 'variance'",
    ),
    (
        lambda: losses.localized_balance(GATES[0], TYPES),
        "gates must be floating with shape [B, T, E], but it is float32 with shape (5, 6)",
    ),
    (
        lambda: losses.localized_balance(GATES[..., :5], TYPES),
        "gates must have an even number of experts, but they have 5",
    ),
    (
        lambda: call(TYPES[:2]),
        "sample_type must be integers with shape (4,), but they are int",
    ),
    (
        lambda: call(TYPES > 0),
        "sample_type must be integers with shape (4,), but they are bool with shape (4,)",
    ),
    (lambda: call(TYPES + 1), "sample_type must be 0 or 1, but 2 is among them"),
    (
        lambda: call(TYPES, segment_ids=np.ones((4, 5), int)),
        "sample_type must be integers with shape (4, 5), but they are int",
    ),
    (
        lambda: call(np.ones((4, 5), int), segment_ids=np.ones((4, 6), int)),
        "segment_ids must be integers with shape (4, 5), but they are int",
    ),
    (lambda: call(TYPES, np.ones(4)), "mask must have shape (4, 5), but its shape is (4,)"),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
