"""Cross-entropy's weights, top-k accuracy's ties, and both against torch and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax, pick

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, 7)).astype(np.float32)
LABELS = RNG.integers(0, 7, (3, 5))


def test_weights_normalise_by_their_sum() -> None:
    """Weights go into the reduction; a mean over the count of tokens is another number."""
    weights = RNG.uniform(0, 3, LABELS.shape)
    found = losses.token_mean(losses.cross_entropy(LOGITS, LABELS), weights).mean()
    values = -pick(log_softmax(LOGITS.astype(np.float64)), LABELS)
    np.testing.assert_allclose(found, (weights * values).sum() / weights.sum(), rtol=1e-6)
    assert abs(found - (weights * values).mean()) > 0.1


def test_smoothed_is_soft_against_the_smoothed_target() -> None:
    target = 0.9 * np.eye(7)[LABELS] + 0.1 / 7
    found = losses.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    np.testing.assert_allclose(found, losses.soft_cross_entropy(LOGITS, target), rtol=1e-5)


def test_accuracy_of_equal_logits_is_chance() -> None:
    """Counting the larger ones alone would call all of them right."""
    found = losses.top_k_accuracy(np.zeros((7, 7)), np.arange(7), k=2)
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 0, 0, 0])


def test_accuracy_at_the_ends() -> None:
    np.testing.assert_array_equal(
        losses.top_k_accuracy(LOGITS, LABELS), LOGITS.argmax(-1) == LABELS
    )
    np.testing.assert_array_equal(losses.top_k_accuracy(LOGITS, LABELS, k=7), 1.0)


def test_accuracy_of_nan_is_nan() -> None:
    logits = LOGITS[0].copy()
    logits[2, 3] = np.nan
    found = losses.top_k_accuracy(logits, LABELS[0])
    np.testing.assert_array_equal(np.isnan(found), [False, False, True, False, False])
    beyond = jax.jit(losses.top_k_accuracy)(LOGITS[0], LABELS[0] + 7)
    assert np.isnan(beyond).all()


@pytest.mark.parametrize("k", [0, 8])
def test_accuracy_refuses(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 7\], but it is {k}"):
        losses.top_k_accuracy(LOGITS, LABELS, k=k)


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_torch_and_optax(smoothing: float) -> None:
    import optax
    import torch

    found = losses.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS).flatten(0, 1),
        torch.tensor(LABELS).flatten(),
        label_smoothing=smoothing,
        reduction="none",
    )
    np.testing.assert_allclose(found.reshape(-1), theirs.numpy(), rtol=1e-5, atol=1e-6)
    target = optax.losses.smooth_labels(jax.nn.one_hot(jnp.asarray(LABELS), 7), smoothing)
    twin = optax.losses.softmax_cross_entropy(jnp.asarray(LOGITS), target)
    np.testing.assert_allclose(found, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
def test_torch_topk() -> None:
    import torch

    top = torch.tensor(LOGITS).topk(3).indices.numpy()
    expected = (top == LABELS[..., None]).any(-1)
    np.testing.assert_array_equal(losses.top_k_accuracy(LOGITS, LABELS, k=3), expected)
