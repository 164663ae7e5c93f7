"""Float64 numpy the oracles are written with, and numerical derivatives of them."""

from collections.abc import Callable

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """x - log sum exp(x) over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x) over the last axis."""
    return np.exp(log_softmax(logits))


def pick(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """values[..., label]."""
    return np.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def cap(logits: np.ndarray, bound: float | None) -> np.ndarray:
    """Soft cap of raw logits."""
    return logits if bound is None else bound * np.tanh(logits / bound)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """sum(weights values) / sum(weights)."""
    return float((values * weights).sum() / weights.sum())


def gradient(
    function: Callable[..., float], arguments: list[np.ndarray], position: int, step: float = 1e-6
) -> np.ndarray:
    """Central differences of a scalar function of float64 arrays in one of them, element by one."""
    result = np.zeros_like(arguments[position])
    moved = [x.copy() for x in arguments]
    for index in np.ndindex(result.shape):
        here = moved[position][index]
        moved[position][index] = here + step
        above = function(*moved)
        moved[position][index] = here - step
        below = function(*moved)
        moved[position][index] = here
        result[index] = (above - below) / (2 * step)
    return result
