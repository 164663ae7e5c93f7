"""Reward models and pairs of diffusion samples."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.cases.preference import L
from tests.losses.contract import Case

LENGTH = 6


def scores(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 3)) * 2, rng.normal(size=(rows, 3)) * 2


def texts(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Right-padded tokens from three ids, so that texts share a beginning, and their lengths.

    Row 0 holds equal texts, row 1 a text and its beginning, row 2 two empty texts.
    """
    lengths = rng.integers(1, LENGTH + 1, (2, rows))
    tokens = rng.integers(1, 4, (2, rows, LENGTH))
    tokens[1, :2] = tokens[0, :2]
    lengths[:, :3] = [[4, 5, 0], [4, 2, 0]]
    tokens[np.arange(LENGTH) >= lengths[..., None]] = 0
    return *tokens, *lengths


def texts_with_rewards(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return *(rng.normal(size=(rows, LENGTH)) * 2 for _ in range(2)), *texts(rng, rows)


def divergence_mask(chosen, rejected, chosen_length, rejected_length):
    mask = np.zeros(chosen.shape)
    for row, (n, m) in enumerate(zip(chosen_length, rejected_length, strict=True)):
        first, second = chosen[row, :n].tolist(), rejected[row, :m].tolist()
        end = max(n, m)
        start = next((t for t in range(end) if first[t : t + 1] != second[t : t + 1]), end - 1)
        mask[row, max(start, 0) : end] = 1
    return mask


def token_bradley_terry(chosen, rejected, *texts):
    mask = divergence_mask(*texts)
    return (mask * L(chosen - rejected)).sum(1) / np.maximum(mask.sum(1), 1)


def transitions(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    shape = rows, 2, 3
    return rng.normal(size=shape), rng.normal(size=shape), rng.uniform(0.5, 2, rows)


def gaussian_log_prob(sample, mean, scale):
    scale = scale[:, None, None]
    density = np.exp(-(((sample - mean) / scale) ** 2) / 2) / (scale * np.sqrt(2 * np.pi))
    return np.log(density).mean((1, 2))


def step_log_probs(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Two samples' steps under policy and reference, some further apart than the clip."""
    reference = [rng.normal(-0.3, 0.1, (rows, 3)) for _ in range(2)]
    policy = [x + rng.normal(0, 0.1, x.shape) for x in reference]
    return *policy, *reference, rng.choice([-1.0, 0.0, 1.0], (rows, 3))


def pso_online(first, second, reference_first, reference_second, preference):
    ratios = np.exp(first - reference_first), np.exp(second - reference_second)
    logs = [np.log(np.clip(ratio, 0.9, 1.1)) for ratio in ratios]
    return L(50 * (preference * logs[0] + -preference * logs[1]))


def errors(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return tuple(rng.uniform(0, 0.5, (rows, 2)) for _ in range(4))


def pso_offline(chosen, rejected, reference_chosen, reference_rejected):
    model, frozen = chosen - 0.1 * rejected, reference_chosen - 0.1 * reference_rejected
    return L(20 * (frozen - model)) + 0.5 * rejected


def pso_hinge(chosen, rejected):
    return np.maximum(1 - 5 * -(chosen - 0.4 * rejected), 0) + 0.5 * rejected


CASES = (
    Case(
        "bradley_terry",
        losses.bradley_terry,
        lambda chosen, rejected: L(chosen - rejected),
        scores,
        differentiable=(0, 1),
    ),
    Case(
        "token_bradley_terry",
        losses.token_bradley_terry,
        token_bradley_terry,
        texts_with_rewards,
        differentiable=(0, 1),
    ),
    Case("divergence_mask", losses.divergence_mask, divergence_mask, texts, differentiable=()),
    Case(
        "gaussian_log_prob",
        losses.gaussian_log_prob,
        gaussian_log_prob,
        transitions,
        differentiable=(1, 2),
        extreme=(1,),
    ),
    Case("pso_online", losses.pso_online, pso_online, step_log_probs, differentiable=(0, 1)),
    Case(
        "pso_offline",
        functools.partial(losses.pso_offline, beta=20.0, prior_weight=0.5),
        pso_offline,
        errors,
        differentiable=(0, 1),
    ),
    Case(
        "pso_hinge",
        functools.partial(losses.pso_hinge, rejected_weight=0.4),
        pso_hinge,
        lambda rng, rows: errors(rng, rows)[:2],
        differentiable=(0, 1),
    ),
)
