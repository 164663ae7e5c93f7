"""DFT against TRL's SFTTrainer: its loss method on fixed log-probabilities, value and gradient."""

import types
from collections import defaultdict

import jax
import numpy as np
import pytest

from jaxdistill import losses

# TRL and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=(2, 6, 7)) * 2).astype(np.float32)
LABELS = RNG.integers(0, 7, (2, 6))
MASK = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])


def trl_loss(loss_type: str, rows: slice = slice(None)) -> tuple[float, np.ndarray]:
    """Loss and gradient in the logits of a bare trainer, whose model is a softmax of them."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    logits = torch.tensor(LOGITS[rows], requires_grad=True)
    mask = torch.tensor(MASK[rows])
    labels = torch.tensor(LABELS[rows])[..., None]
    log_probs = logits.log_softmax(-1).gather(-1, labels)[..., 0] * mask
    nothing = torch.zeros_like(mask)
    outputs = types.SimpleNamespace(
        log_probs=log_probs, label_mask=mask, entropy=nothing.float(), is_top1=nothing
    )
    bare = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(gather_for_metrics=lambda x: x, parallelism_config=None),
        args=types.SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        model=types.SimpleNamespace(training=True),
        compute_loss_func=None,
        label_smoother=None,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"labels": labels, "attention_mask": mask}
    loss = trl.SFTTrainer.compute_loss(bare, lambda **_: outputs, inputs)
    loss.backward()
    return float(loss), logits.grad.numpy()


def our_loss(name: str) -> tuple[jax.Array, jax.Array]:
    def mean(logits: jax.Array) -> jax.Array:
        return losses.token_mean(getattr(losses, name)(logits, LABELS), MASK).mean()

    return jax.value_and_grad(mean)(LOGITS)


@pytest.mark.parametrize(("name", "loss_type"), [("dft", "dft"), ("cross_entropy", "nll")])
def test_value_and_gradient(name: str, loss_type: str) -> None:
    for found, expected in zip(our_loss(name), trl_loss(loss_type), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_mean_of_microbatches_is_not_the_mean_of_the_batch() -> None:
    """Told no count of the tokens of the step, TRL divides by those of the microbatch."""
    halves = [trl_loss("dft", slice(row, row + 1))[0] for row in range(2)]
    values = losses.dft(LOGITS, LABELS)
    parts = [losses.token_mean(values[row], MASK[row]) for row in range(2)]
    whole = trl_loss("dft")[0]
    np.testing.assert_allclose((parts[0] + parts[1]).mean(), whole, rtol=1e-5)
    assert abs(np.mean(halves) - whole) > 0.01
