"""The matrix on losses that go over tiles of tokens: five of 24 tokens a tile, the last ragged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import tiles

from jaxdistill.losses import from_hidden
from tests.kernels import matrix, oracle

K = 3


def topk_forward_kl(hidden, head, teacher_hidden, teacher_head, temperature) -> jax.Array:
    records = from_hidden.top_k_teacher(teacher_hidden, teacher_head, K, temperature=temperature)
    return from_hidden.topk_forward_kl(hidden, head, *records, temperature=temperature)


LOSSES = {
    "adaptive_kl": from_hidden.adaptive_kl,
    "log_acceptance": from_hidden.log_acceptance,
    "topk_forward_kl": topk_forward_kl,
    "universal_logit": from_hidden.universal_logit,
}


def adaptive_kl(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.exp(log_p), np.exp(log_q)
    order = np.argsort(-p, axis=-1)
    gap, ordered = (np.take_along_axis(x, order, -1) for x in (np.abs(p - q), p))
    in_head = ordered.cumsum(-1) - ordered < 0.5
    share = (gap * in_head).sum(-1, keepdims=True) / gap.sum(-1, keepdims=True)
    terms = share * p * (log_p - log_q) + (1 - share) * q * (log_q - log_p)
    return terms.sum(-1), -share * np.exp(log_p - log_q) + (1 - share) * (log_q - log_p + 1)


def log_acceptance(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    accepted = np.exp(np.minimum(log_p, log_q)).sum(-1, keepdims=True)
    return -np.log(accepted[..., 0]), np.where(log_q < log_p, -1 / accepted, 0.0)


def bucket(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.argsort(np.argsort(-log_p, axis=-1), axis=-1) < K
    rest = [np.where(kept, 0, np.exp(x)).sum(-1, keepdims=True) for x in (log_p, log_q)]
    terms = np.where(kept, np.exp(log_p) * (log_p - log_q), 0).sum(-1)
    of_rest = rest[0] * np.log(rest[0] / rest[1])
    return terms + of_rest[..., 0], -np.where(kept, np.exp(log_p - log_q), rest[0] / rest[1])


def sorted_distance(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-log_q, axis=-1)
    difference = np.take_along_axis(np.exp(log_q), order, -1) - np.sort(np.exp(log_p))[:, ::-1]
    derivative = np.zeros_like(log_q)
    np.put_along_axis(derivative, order, np.sign(difference), -1)
    return np.abs(difference).sum(-1), derivative


ORACLES = {
    "adaptive_kl": adaptive_kl,
    "log_acceptance": log_acceptance,
    "topk_forward_kl": bucket,
    "universal_logit": sorted_distance,
}


def values_of(name: str, *arrays: jax.Array) -> jax.Array:
    return LOSSES[name](*arrays[:4], temperature=matrix.TEMPERATURE)


def expected(name: str, arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple:
    models = matrix.flat_models(arrays)
    values, gradients, scales = oracle.of_two_heads(
        ORACLES[name], *models, weights, matrix.TEMPERATURE
    )
    return values, gradients, scales if name == "universal_logit" else gradients


@matrix.each_place()
@matrix.each_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_against_float64(
    name: str, vocab_size: int, dtype: jnp.dtype, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 5 * 4 * vocab_size)
    functions = (functools.partial(x, name) for x in (values_of, expected))
    matrix.assert_against_float64(*functions, vocab_size, dtype, place)
