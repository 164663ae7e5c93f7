"""Hidden-state forms. Their oracles take full logits in float64, so they equal the logits forms."""

import functools

import numpy as np

from jaxdistill.losses import from_hidden
from tests.losses.cases import cross_entropy, divergence
from tests.losses.contract import Case
from tests.losses.oracle import cap


def one_model(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    hidden, head = rng.normal(size=(rows, 3, 4)), rng.normal(size=(7, 4))
    return hidden, head, rng.integers(0, 5, (rows, 3))


def two_models(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    student = rng.normal(size=(rows, 3, 4)), rng.normal(size=(7, 4))
    teacher = rng.normal(size=(rows, 3, 5)), rng.normal(size=(7, 5))
    return *student, *teacher


def smoothed(hidden: np.ndarray, head: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return cross_entropy.smoothed_with_z_loss(cap(hidden @ head[:5].T, 3.0), labels)


def entropy(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    return cross_entropy.entropy(cap(hidden @ head[:5].T, 3.0) / 0.7)


def nll_with_z_loss(hidden: np.ndarray, head: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = cap(hidden @ head[:5].T, 3.0)
    normalizer = np.log(np.exp(logits).sum(-1))
    return cross_entropy.nll(logits, labels) + 0.01 * normalizer**2


def log_probs(hidden: np.ndarray, head: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -cross_entropy.nll(hidden @ head[:5].T / 0.7, labels)


def reverse(
    student: np.ndarray, student_head: np.ndarray, teacher: np.ndarray, teacher_head: np.ndarray
) -> np.ndarray:
    return divergence.reverse(student @ student_head.T, teacher @ teacher_head.T)


CASES = (
    Case(
        "from_hidden.cross_entropy/capped,z_loss,padded",
        functools.partial(from_hidden.cross_entropy, soft_cap=3.0, z_loss=0.01, vocab_size=5),
        nll_with_z_loss,
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    Case(
        "from_hidden.cross_entropy/smoothed,capped,z_loss,padded",
        functools.partial(
            from_hidden.cross_entropy, label_smoothing=0.1, z_loss=0.01, soft_cap=3.0, vocab_size=5
        ),
        smoothed,
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    Case(
        "from_hidden.entropy/capped,temperature,padded",
        functools.partial(from_hidden.entropy, soft_cap=3.0, temperature=0.7, vocab_size=5),
        entropy,
        lambda rng, rows: one_model(rng, rows)[:2],
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    Case(
        "from_hidden.log_probs/temperature,padded",
        functools.partial(from_hidden.log_probs, temperature=0.7, vocab_size=5),
        log_probs,
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    Case(
        "from_hidden.reverse_kl",
        from_hidden.reverse_kl,
        reverse,
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        extreme=(0, 2),
    ),
)
