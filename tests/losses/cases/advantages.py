"""Advantages: constants made from rewards. Each oracle walks its sequences in plain loops."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.cases.policy import T, ragged_mask
from tests.losses.contract import Case


def groups(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return (rng.normal(size=(rows, 4)),)


def one_reward_a_row(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=rows), ragged_mask(rng, rows), rng.normal(size=(rows, T))


def rewards_and_values(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, T)), rng.normal(size=(rows, T)), ragged_mask(rng, rows)


def standardised(rewards: np.ndarray) -> np.ndarray:
    out = np.zeros_like(rewards)
    for i, group in enumerate(rewards):
        deviation = np.sqrt(((group - group.mean()) ** 2).sum() / (len(group) - 1))
        out[i] = (group - group.mean()) / (deviation + 1e-4)
    return out


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    out = np.zeros_like(rewards)
    for i, j in np.ndindex(rewards.shape):
        out[i, j] = rewards[i, j] - np.delete(rewards[i], j).mean()
    return out


def batch_scaled(rewards: np.ndarray) -> np.ndarray:
    centred = rewards - rewards.mean(-1, keepdims=True)
    return centred / (rewards.std(ddof=1) + 1e-4)


def whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    kept = values[mask]
    out = np.zeros_like(values)
    out[mask] = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    return out


def spread(rewards: np.ndarray, mask: np.ndarray, kl: np.ndarray) -> np.ndarray:
    out = np.where(mask, -0.3 * kl, 0.0)
    for i, row in enumerate(mask):
        out[i, np.flatnonzero(row)[-1]] += rewards[i]
    return out


def advantages(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, discount: float, trace: float
) -> np.ndarray:
    """A_t = sum_k (discount trace)^k delta_{t+k} over the kept tokens, the others cut out."""
    out = np.zeros_like(rewards)
    for i, row in enumerate(mask):
        steps = np.flatnonzero(row)
        r, v = rewards[i, steps], np.append(values[i, steps], 0.0)
        delta = r + discount * v[1:] - v[:-1]
        for t in range(len(steps)):
            powers = (discount * trace) ** np.arange(len(steps) - t)
            out[i, steps[t]] = (powers * delta[t:]).sum()
    return out


def returns(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, advantages(rewards, values, mask, 0.9, 0.8) + values, 0.0)


def whitened_returns(rewards: np.ndarray, mask: np.ndarray, kl: np.ndarray) -> np.ndarray:
    earned = spread(rewards, mask, kl)
    return whitened(advantages(earned, np.zeros_like(earned), mask, 0.9, 1.0), mask)


def constant(name: str, loss, oracle, inputs, rowwise: bool = True) -> Case:
    return Case(name, loss, oracle, inputs, differentiable=(), extreme=(0,), rowwise=rowwise)


def gae_part(part: str):
    return lambda *arrays: getattr(losses.gae(*arrays, discount=0.9, trace=0.8), part)


CASES = (
    constant("group_advantages", losses.group_advantages, standardised, groups),
    constant(
        "group_advantages/leave_one_out",
        functools.partial(losses.group_advantages, scale="none", baseline="leave_one_out"),
        leave_one_out,
        groups,
    ),
    constant(
        "group_advantages/batch",
        functools.partial(losses.group_advantages, scale="batch"),
        batch_scaled,
        groups,
        rowwise=False,
    ),
    constant(
        "filter_groups",
        lambda rewards: losses.filter_groups(rewards).astype(np.float32),
        lambda rewards: np.array([float(len(set(group)) > 1) for group in rewards]),
        lambda rng, rows: (rng.integers(0, 2, (rows, 3)).astype(float),),
    ),
    constant(
        "whiten",
        losses.whiten,
        whitened,
        lambda rng, rows: (rng.normal(size=(rows, T)), ragged_mask(rng, rows)),
        rowwise=False,
    ),
    constant(
        "token_rewards",
        lambda rewards, mask, kl: losses.token_rewards(rewards, mask, kl=kl, kl_weight=0.3),
        spread,
        one_reward_a_row,
    ),
    constant(
        "gae/advantages",
        gae_part("advantages"),
        lambda r, v, m: advantages(r, v, m, 0.9, 0.8),
        rewards_and_values,
    ),
    constant("gae/returns", gae_part("returns"), returns, rewards_and_values),
    constant(
        "reinforce_plus_plus_advantages",
        lambda rewards, mask, kl: losses.reinforce_plus_plus_advantages(
            rewards, mask, kl=kl, kl_weight=0.3, discount=0.9
        ),
        whitened_returns,
        one_reward_a_row,
        rowwise=False,
    ),
    constant(
        "overlong_penalty",
        functools.partial(losses.overlong_penalty, max_length=20, buffer=8, factor=2.0),
        lambda n: np.array([0.0 if x <= 12 else -2.0 if x > 20 else (12 - x) / 4 for x in n]),
        lambda rng, rows: (np.linspace(2.0, 30.0, rows),),
    ),
)
