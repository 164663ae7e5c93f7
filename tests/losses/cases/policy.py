"""The policy gradient, its terms and the published objectives; oracles written from the papers."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxdistill import losses
from tests.losses.contract import Case

T = 4


def by_row(
    objective: Callable, shared: tuple[int, ...] = (), count: int = 4, **options: object
) -> Callable:
    """A loss that returns Weighted, as the contract wants it: the mean of each row on its own.

    How rows make a batch is tested in test_policy_batch.py.
    """

    def loss(*arrays: object) -> jax.Array:
        def one_row(*row: object) -> jax.Array:
            batch = (x if i in shared else x[None] for i, x in enumerate(row))
            return objective(*batch, **options).mean()

        return jax.vmap(one_row, [None if i in shared else 0 for i in range(count)])(*arrays)

    return loss


def ragged_mask(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Completions of 1 to T tokens, with a hole where a tool wrote."""
    mask = np.arange(T) < rng.integers(1, T + 1, (rows, 1))
    mask[0] = [True, False, True, False]
    return mask


def rollouts(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    log_prob = -rng.exponential(1.0, (rows, T))
    old = log_prob - rng.normal(0, 0.4, (rows, T))
    return log_prob, old, rng.normal(size=rows), ragged_mask(rng, rows)


def with_reference(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Rollouts and the log-probabilities, entropies and weights of their tokens."""
    reference = -rng.exponential(1.0, (rows, T))
    return (
        *rollouts(rng, rows),
        reference,
        rng.uniform(0, 2, (rows, T)),
        rng.uniform(0, 2, (rows, T)),
    )


def two_policies(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return -rng.exponential(1.0, (rows, T)), -rng.exponential(1.0, (rows, T))


def mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Over the kept tokens of each row."""
    return (values * mask).sum(-1) / mask.sum(-1)


def token_ratio(log_prob: np.ndarray, old: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.exp(log_prob - old)


def sequence_ratio(log_prob: np.ndarray, old: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.exp(mean(log_prob - old, mask))[:, None] * np.ones(T)


def product_ratio(log_prob: np.ndarray, old: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.exp(((log_prob - old) * mask).sum(-1))[:, None] * np.ones(T)


def clipped(rho: np.ndarray, advantage: np.ndarray, low: float, high: float) -> np.ndarray:
    """PPO's pessimistic bound, by cases: a gain stops at 1 + high, a loss at 1 - low."""
    a = advantage[:, None] if advantage.ndim == 1 else advantage
    return -a * np.where(a > 0, np.minimum(rho, 1 + high), np.maximum(rho, 1 - low))


def dual_clipped(
    rho: np.ndarray, advantage: np.ndarray, low: float, high: float, bound: float
) -> np.ndarray:
    a = advantage[:, None]
    bounded = np.clip(rho, 1 - low, bound)
    return -a * np.where(a > 0, np.minimum(rho, 1 + high), bounded)


def cispo_tokens(log_prob, old, advantage, frozen_log_prob, low, high) -> np.ndarray:
    weight = np.clip(np.exp(frozen_log_prob - old), 1 - low, 1 + high)
    return -weight * advantage[:, None] * log_prob


def surrogate_case(setting: str, values: Callable, **options: object) -> Case:
    """policy_surrogate is 0 off the mask; `values` are its tokens' by the formula."""
    return Case(
        f"policy_surrogate/{setting}",
        functools.partial(losses.policy_surrogate, **options),
        lambda x, old, a, mask: values(x, old, a, mask) * mask,
        rollouts,
        differentiable=(0,),
    )


def batch_case(
    name: str,
    oracle: Callable,
    inputs: Callable = rollouts,
    differentiable: tuple[int, ...] = (0,),
    surrogate: Callable | None = None,
    extreme: tuple[int, ...] | None = None,
    **options: object,
) -> Case:
    """An objective that returns Weighted: its mean over the batch, one number."""
    objective = functools.partial(getattr(losses, name.split("/")[0]), **options)
    return Case(
        name,
        lambda *arrays: objective(*arrays).mean(),
        oracle,
        inputs,
        differentiable=differentiable,
        surrogate=surrogate,
        extreme=extreme,
        rowwise=False,
    )


def token_average(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (values * mask).sum() / mask.sum()


def sequence_average(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return mean(values, mask).mean()


def constant_average(values: np.ndarray, mask: np.ndarray, divisor: float) -> np.ndarray:
    return ((values * mask).sum(-1) / divisor).mean()


def k1(log_prob: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return log_prob - reference


def k2(log_prob: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return (log_prob - reference) ** 2 / 2


def k3(log_prob: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.exp(reference - log_prob) - 1 - (reference - log_prob)


def full_terms(x, old, a, mask, reference, entropy, weight, kl=k3) -> np.ndarray:
    loss = clipped(np.exp(x - old), a, 0.2, 0.2)
    return mean(weight * loss + 0.04 * kl(x, reference) - 0.01 * entropy, mask)


def with_all_terms(*arrays: object, kl_gradient: str | None = None) -> losses.Weighted:
    x, old, a, mask, reference, entropy, weight = arrays
    return losses.policy_gradient(
        x,
        old,
        a,
        mask,
        aggregation="sequence",
        reference_log_prob=reference,
        kl_weight=0.04,
        kl_gradient=kl_gradient,
        entropy=entropy,
        entropy_weight=0.01,
        weight=weight,
    )


def truncated(x: np.ndarray, rollout: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, np.minimum(np.exp(x - rollout), 2.0), 1.0)


def masked_sequences(x: np.ndarray, rollout: np.ndarray, mask: np.ndarray) -> np.ndarray:
    w = product_ratio(x, rollout, mask)
    return np.where(mask, np.where((w > 0.5) & (w < 3.0), w, 0.0), 1.0)


def engines(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    x, old, _, mask = rollouts(rng, rows)
    return x, old, mask


def whole_batch(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return (*two_policies(rng, rows), ragged_mask(rng, rows))


def value_tokens(value, old, returns, mask) -> np.ndarray:
    near = np.clip(value, old - 0.2, old + 0.2)
    return np.maximum((value - returns) ** 2, (near - returns) ** 2) / 2


def values_and_returns(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    value, old, returns = (rng.normal(size=(rows, T)) * 0.5 for _ in range(3))
    return value, old, returns, ragged_mask(rng, rows)


KL = (
    Case("kl_estimate", losses.kl_estimate, k3, two_policies, differentiable=(0,)),
    Case(
        "kl_estimate/k1 with the gradient of k2",
        functools.partial(losses.kl_estimate, kind="k1", gradient="k2"),
        k1,
        two_policies,
        differentiable=(0,),
        surrogate=lambda frozen, x, reference: k2(x, reference),
    ),
)

SURROGATES = (
    surrogate_case("symmetric", lambda x, old, a, m: clipped(np.exp(x - old), a, 0.2, 0.2)),
    surrogate_case(
        "dual",
        lambda x, old, a, m: dual_clipped(np.exp(x - old), a, 0.2, 0.2, 1.5),
        clip="dual",
        dual_bound=1.5,
    ),
    Case(
        "policy_surrogate/one update a rollout",
        lambda x, a, mask: losses.policy_surrogate(x, None, a, mask),
        lambda x, a, mask: -a[:, None] * mask,
        lambda rng, rows: (rollouts(rng, rows)[0], *rollouts(rng, rows)[2:]),
        differentiable=(0,),
        surrogate=lambda frozen, x, a, mask: -np.exp(x - frozen[0]) * a[:, None] * mask,
    ),
)

POLICY_GRADIENT = (
    Case(
        "policy_gradient/all terms",
        by_row(with_all_terms, count=7),
        full_terms,
        with_reference,
        differentiable=(0, 5),
        extreme=(0,),
    ),
    Case(
        "policy_gradient/straight-through KL",
        lambda *arrays: with_all_terms(*arrays, kl_gradient="k2").mean(),
        lambda *arrays: full_terms(*arrays).mean(),
        with_reference,
        differentiable=(0, 5),
        extreme=(0,),
        surrogate=lambda frozen, *inputs: full_terms(*inputs, kl=k2).mean(),
        rowwise=False,
    ),
    batch_case(
        "policy_gradient/product,none",
        lambda x, old, a, m: sequence_average(-product_ratio(x, old, m) * a[:, None], m),
        ratio="sequence_product",
        clip="none",
        aggregation="sequence",
    ),
)

GROUP_OBJECTIVES = (
    batch_case(
        "grpo", lambda x, old, a, m: sequence_average(clipped(np.exp(x - old), a, 0.2, 0.2), m)
    ),
    batch_case(
        "dr_grpo",
        lambda x, old, a, m: constant_average(clipped(np.exp(x - old), a, 0.2, 0.2), m, 7),
        divisor=7,
    ),
    batch_case(
        "dapo", lambda x, old, a, m: token_average(clipped(np.exp(x - old), a, 0.2, 0.28), m)
    ),
    batch_case(
        "gspo",
        lambda x, old, a, m: sequence_average(clipped(sequence_ratio(x, old, m), a, 3e-4, 4e-4), m),
    ),
    batch_case(
        "rloo",
        lambda x, old, a, m: sequence_average(clipped(product_ratio(x, old, m), a, 0.2, 0.2), m),
    ),
    batch_case(
        "ppo_policy", lambda x, old, a, m: token_average(clipped(np.exp(x - old), a, 0.2, 0.2), m)
    ),
    batch_case(
        "reinforce_plus_plus",
        lambda x, old, a, m: token_average(clipped(np.exp(x - old), a, 0.2, 0.2), m),
    ),
    batch_case(
        "cispo",
        lambda x, old, a, m: token_average(cispo_tokens(x, old, a, x, 0.2, 0.3), m),
        surrogate=lambda frozen, x, old, a, m: token_average(
            cispo_tokens(x, old, a, frozen[0], 0.2, 0.3), m
        ),
        clip_low=0.2,
        clip_high=0.3,
    ),
)

VALUE = (
    batch_case(
        "ppo_value",
        lambda *arrays: token_average(value_tokens(*arrays), arrays[-1]),
        values_and_returns,
    ),
)

TERMS = (
    Case(
        "entropy_bonus",
        functools.partial(losses.entropy_bonus, weight=0.3),
        lambda entropy: -0.3 * entropy,
        lambda rng, rows: (rng.uniform(0, 3, (rows, T)),),
        differentiable=(0,),
    ),
    Case(
        "importance_weights/token,truncate",
        losses.importance_weights,
        truncated,
        engines,
        differentiable=(),
        extreme=(0,),
    ),
    Case(
        "importance_weights/sequence,mask",
        functools.partial(
            losses.importance_weights, level="sequence", mode="mask", cap=3.0, floor=0.5
        ),
        masked_sequences,
        engines,
        differentiable=(),
        extreme=(0,),
    ),
)

CASES = (*KL, *SURROGATES, *POLICY_GRADIENT, *GROUP_OBJECTIVES, *VALUE, *TERMS)
