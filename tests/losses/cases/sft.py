"""The supervised fine-tuning family; the oracles write out each paper's formula."""

import functools

import numpy as np

from jaxdistill import losses
from jaxdistill.losses import from_hidden
from tests.losses.cases import divergence
from tests.losses.cases.cross_entropy import entropy, logits_and_labels, nll
from tests.losses.cases.from_hidden import one_model
from tests.losses.contract import Case
from tests.losses.oracle import cap, log_softmax, pick, softmax


def two_logits_and_labels(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    logits, labels = logits_and_labels(rng, rows)
    return logits, rng.normal(size=logits.shape) * 2, labels


def two_models(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    reference = rng.normal(size=(rows, 3, 4)), rng.normal(size=(7, 4))
    hidden, head, labels = one_model(rng, rows)
    return hidden, head, *reference, labels


def logits_and_entropy(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Targets within reach, below it and above it."""
    return rng.normal(size=(rows, 3, 7)) * 2, rng.uniform(0.5, 1.9, (rows, 3))


def token_kinds(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Key tokens, trained tokens and ends of values; the first row has no key token."""
    key = rng.random((rows, 9)) < 0.2
    key[0] = False
    return key, rng.random((rows, 9)) < 0.8, rng.random((rows, 9)) < 0.3


def dft(frozen, logits, labels):
    weight = pick(softmax(frozen[0]), labels)
    return weight * nll(logits, labels)


def asft(frozen, logits, reference, labels):
    return dft(frozen, logits, labels) + 0.3 * divergence.forward(logits, reference)


def rollout(frozen, logits, labels):
    """The exact expectation, token by token of the vocabulary."""
    total = np.zeros(labels.shape)
    explored, log_p = softmax(frozen[0] / 1.3), log_softmax(logits)
    for action in range(logits.shape[-1]):
        reward = np.where(labels == action, 1.0, -0.1)
        total -= explored[..., action] * reward * log_p[..., action]
    return total


def temperature(logits: np.ndarray, target: np.ndarray, top: int | None = None) -> np.ndarray:
    """The root of the entropy's excess; 60 halvings leave nothing in float64."""
    logits = np.sort(logits, axis=-1)[..., ::-1][..., :top]
    low, high = np.full(target.shape, 1.1), np.full(target.shape, 1.5)
    for _ in range(60):
        middle = (low + high) / 2
        rising = entropy(logits / middle[..., None]) < target
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    return low


def curio(frozen, logits, teacher, labels):
    del teacher
    teacher = frozen[1]
    h = entropy(teacher)
    t = temperature(teacher, h + 0.5 / (1 + np.exp(-2.0 * (h - 1.2))))
    t = np.where(h <= 0.03, 1.1, t)
    score, of_teacher = -nll(logits, labels), -nll(teacher / t[..., None], labels)
    return -score + 0.5 * (score - of_teacher) ** 2


def weights(key: np.ndarray, mask: np.ndarray, value_end: np.ndarray) -> np.ndarray:
    result = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        keys = [t for t in range(9) if mask[row, t] and key[row, t]]
        others = [t for t in range(9) if mask[row, t] and t not in keys and not value_end[row, t]]
        for t in range(9):
            if mask[row, t]:
                larger = t in keys and len(keys) < len(others)
                result[row, t] = min(len(others) / len(keys), 3.0) if larger else 1.0
    return result


def unlikelihood(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(1 - pick(softmax(logits), labels))


def unfrozen(surrogate):
    """The value: nothing apart in what is frozen and what is not."""
    return lambda *arrays: surrogate(arrays, *arrays)


def of_hidden(surrogate):
    """The same formula of `cap(hidden @ head.T)`, its padding cut off."""

    def form(frozen, *arrays):
        def logits(arrays):
            states = zip(arrays[:-1:2], arrays[1:-1:2], strict=True)
            return [cap(hidden @ head[:5].T, 3.0) for hidden, head in states]

        return surrogate([*logits(frozen), frozen[-1]], *logits(arrays), arrays[-1])

    return form


def stopped(name, loss, surrogate, inputs, **options) -> Case:
    """A case whose loss holds parts of its gradient still."""
    return Case(name, loss, unfrozen(surrogate), inputs, surrogate=surrogate, **options)


HEAD = {"soft_cap": 3.0, "vocab_size": 5}

CASES = (
    stopped("dft", losses.dft, dft, logits_and_labels, differentiable=(0,)),
    stopped(
        "asft",
        functools.partial(losses.asft, kl_weight=0.3),
        asft,
        two_logits_and_labels,
        differentiable=(0,),
        extreme=(0, 1),
    ),
    stopped(
        "one_token_rollout/exact",
        losses.one_token_rollout,
        rollout,
        logits_and_labels,
        differentiable=(0,),
    ),
    Case(
        "temperature_for_entropy",
        losses.temperature_for_entropy,
        temperature,
        logits_and_entropy,
        differentiable=(),
        extreme=(0,),
    ),
    stopped(
        "curio_sft",
        losses.curio_sft,
        curio,
        two_logits_and_labels,
        differentiable=(0,),
        extreme=(0, 1),
    ),
    Case(
        "key_token_weights",
        lambda key, mask, end: losses.key_token_weights(
            key, mask, value_end_mask=end, max_weight=3.0
        ),
        weights,
        token_kinds,
        differentiable=(),
    ),
    Case("unlikelihood", losses.unlikelihood, unlikelihood, logits_and_labels, differentiable=(0,)),
    Case(
        "linear_ramp",
        functools.partial(losses.linear_ramp, total_steps=100, peak=0.4),
        lambda step: 0.4 * np.minimum(1.0, step / 67),
        lambda rng, rows: (rng.integers(0, 130, rows),),
        differentiable=(),
    ),
    stopped(
        "from_hidden.dft/capped,padded",
        functools.partial(from_hidden.dft, **HEAD),
        of_hidden(dft),
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    stopped(
        "from_hidden.asft/capped,padded",
        functools.partial(from_hidden.asft, kl_weight=0.3, **HEAD),
        of_hidden(asft),
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        extreme=(0, 2),
    ),
    stopped(
        "from_hidden.one_token_rollout/capped,padded",
        functools.partial(from_hidden.one_token_rollout, **HEAD),
        of_hidden(rollout),
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    stopped(
        "from_hidden.curio_sft/capped,padded",
        functools.partial(from_hidden.curio_sft, **HEAD),
        of_hidden(curio),
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        extreme=(0, 2),
    ),
    Case(
        "from_hidden.unlikelihood/capped,padded",
        functools.partial(from_hidden.unlikelihood, **HEAD),
        unfrozen(of_hidden(lambda frozen, *arrays: unlikelihood(*arrays))),
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
)
