"""Cross-entropy, log-probabilities and entropy of logits."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax, pick, softmax


def logits_and_labels(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 3, 7)) * 2, rng.integers(0, 5, (rows, 3))


def logits_and_targets(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 3, 7)) * 2, softmax(rng.normal(size=(rows, 3, 7)))


def logits_alone(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return (rng.normal(size=(rows, 3, 7)) * 2,)


def nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -pick(log_softmax(logits), labels)


def smoothed_with_z_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    spread = -log_softmax(logits).mean(-1)
    normalizer = np.log(np.exp(logits).sum(-1))
    return 0.9 * nll(logits, labels) + 0.1 * spread + 0.01 * normalizer**2


def entropy(logits: np.ndarray) -> np.ndarray:
    return -(softmax(logits) * log_softmax(logits)).sum(-1)


def in_top_two(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    order = np.argsort(-logits, axis=-1, kind="stable")
    return (order[..., :2] == labels[..., None]).any(-1).astype(np.float64)


CASES = (
    Case("cross_entropy", losses.cross_entropy, nll, logits_and_labels, differentiable=(0,)),
    Case(
        "cross_entropy/smoothed,z_loss,padded",
        functools.partial(losses.cross_entropy, label_smoothing=0.1, z_loss=0.01, vocab_size=5),
        lambda logits, labels: smoothed_with_z_loss(logits[..., :5], labels),
        logits_and_labels,
        differentiable=(0,),
    ),
    Case(
        "soft_cross_entropy",
        losses.soft_cross_entropy,
        lambda logits, targets: -(targets * log_softmax(logits)).sum(-1),
        logits_and_targets,
        differentiable=(0,),
    ),
    Case(
        "log_probs/temperature,padded",
        functools.partial(losses.log_probs, temperature=0.7, vocab_size=5),
        lambda logits, labels: -nll(logits[..., :5] / 0.7, labels),
        logits_and_labels,
        differentiable=(0,),
    ),
    Case(
        "entropy/temperature,padded",
        functools.partial(losses.entropy, temperature=0.7, vocab_size=5),
        lambda logits: entropy(logits[..., :5] / 0.7),
        logits_alone,
        differentiable=(0,),
    ),
    Case(
        "top_k_accuracy/two,padded",
        functools.partial(losses.top_k_accuracy, k=2, vocab_size=5),
        lambda logits, labels: in_top_two(logits[..., :5], labels),
        logits_and_labels,
        differentiable=(),
        extreme=(0,),
    ),
)
