"""Preference objectives; the oracles write out each paper's formula, `L(h)` is log(1 + exp(-h))."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxdistill import losses
from tests.losses.contract import Case

BETA = 0.1
POLICY = (0, 1)


def pairs(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Chosen and rejected under the policy, then under the reference: sums over an answer."""
    return tuple(rng.normal(-20, 6, rows) for _ in range(4))


def pairs_with_lengths(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return *pairs(rng, rows), *(rng.integers(0, 9, rows) for _ in range(2))


def answers_with_lengths(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    lengths = [rng.integers(1, 9, rows) for _ in range(2)]
    return *(-n * rng.uniform(0.1, 3, rows) for n in lengths), *lengths


def single_answers(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    policy, reference, *_ = pairs(rng, rows)
    return policy, reference, rng.random(rows) < 0.5, np.array(1.7)


def s(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def L(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -x)


def rewards(chosen, rejected, reference_chosen, reference_rejected):
    """beta times the log-ratios of both answers."""
    return BETA * (chosen - reference_chosen), BETA * (rejected - reference_rejected)


def margin(*pair: np.ndarray) -> np.ndarray:
    won, lost = rewards(*pair)
    return won - lost


def smoothed(h: np.ndarray, e: float) -> np.ndarray:
    return (1 - e) * L(h) + e * L(-h)


def smoothed_sigmoid(*pair: np.ndarray) -> np.ndarray:
    return smoothed(margin(*pair), 0.1)


def hinge(*pair: np.ndarray) -> np.ndarray:
    return np.maximum(1 - margin(*pair), 0)


def robust(*pair: np.ndarray) -> np.ndarray:
    return (0.9 * L(margin(*pair)) - 0.1 * L(-margin(*pair))) / 0.8


def nca(*pair: np.ndarray) -> np.ndarray:
    won, lost = rewards(*pair)
    return L(won) + L(-won) / 2 + L(-lost) / 2


def bco(*pair: np.ndarray) -> np.ndarray:
    won, lost = rewards(*pair)
    return L(won) + L(-lost)


def sppo(chosen, rejected, reference_chosen, reference_rejected):
    won = chosen - reference_chosen - 1 / (2 * BETA)
    lost = rejected - reference_rejected + 1 / (2 * BETA)
    return won**2 + lost**2


def apo_zero(*pair: np.ndarray) -> np.ndarray:
    won, lost = rewards(*pair)
    return 1 - s(won) + s(lost)


def apo_down(*pair: np.ndarray) -> np.ndarray:
    won, lost = rewards(*pair)
    return s(won) + 1 - s(won - lost)


def exo(*pair: np.ndarray) -> np.ndarray:
    policy = np.stack([s(margin(*pair)), s(-margin(*pair))])
    target = np.array([[0.9], [0.1]])
    return (policy * np.log(policy / target)).sum(0)


def discopop(*pair: np.ndarray, temperature: float = 0.05) -> np.ndarray:
    h = margin(*pair)
    weight = s(h / temperature)
    return (1 - weight) * L(h) + weight * np.exp(-h)


def quantiles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first - second, both sorted, at the places of the entries of first."""
    order = np.argsort(first)
    result = np.empty_like(first)
    result[order] = first[order] - np.sort(second)
    return result


def aot(chosen, rejected, reference_chosen, reference_rejected):
    gain = quantiles(chosen - rejected, reference_chosen - reference_rejected)
    return smoothed(BETA * gain, 0.1)


def aot_unpaired(*pair: np.ndarray) -> np.ndarray:
    return L(quantiles(*rewards(*pair)))


def per_token(
    chosen, rejected, reference_chosen, reference_rejected, chosen_length, rejected_length
):
    n, m = np.maximum(chosen_length, 1), np.maximum(rejected_length, 1)
    return chosen / n, rejected / m, reference_chosen / n, reference_rejected / m


def ipo(chosen, rejected, reference_chosen, reference_rejected):
    gain = chosen - reference_chosen - rejected + reference_rejected
    return (gain - 1 / (2 * BETA)) ** 2


def rpo(chosen, rejected, reference_chosen, reference_rejected, length):
    h = margin(chosen, rejected, reference_chosen, reference_rejected)
    return L(h) - 0.7 * chosen / np.maximum(length, 1)


def kto(log_prob, reference, desirable, point):
    gain = log_prob - reference - max(point, 0)
    value = np.where(desirable, s(0.2 * gain), s(-0.2 * gain))
    return np.where(desirable, 1.5, 0.5) * (1 - value)


def orpo(chosen, rejected, chosen_length, rejected_length):
    p, q = np.exp(chosen / chosen_length), np.exp(rejected / rejected_length)
    return -np.log(p) + BETA * L(np.log(p / (1 - p)) - np.log(q / (1 - q)))


def simpo(chosen, rejected, chosen_length, rejected_length):
    return smoothed(2 * (chosen / chosen_length - rejected / rejected_length) - 0.5, 0.1)


def cpo(chosen, rejected, length):
    return smoothed(BETA * (chosen - rejected), 0.1) - 0.7 * chosen / length


def redi(chosen, rejected, chosen_length, rejected_length):
    return -chosen / chosen_length + 0.8 * rejected / rejected_length


def together(*settings: dict):
    """DPO under several settings, stacked on the last axis: one program to compile for all."""

    def call(*pair, **lengths):
        return jnp.stack([losses.dpo(*pair, **setting, **lengths) for setting in settings], -1)

    return call


def each(*oracles):
    return lambda *pair: np.stack([oracle(*pair) for oracle in oracles], -1)


def with_lengths(loss):
    """`loss` with the lengths of both answers after its four log-probabilities."""

    def call(*inputs):
        *pair, chosen_length, rejected_length = inputs
        return loss(*pair, chosen_length=chosen_length, rejected_length=rejected_length)

    return call


# Settings of gradients of one size stand together, or the large would hide the small.
DPO = (
    Case("dpo", losses.dpo, lambda *pair: L(margin(*pair)), pairs, differentiable=POLICY),
    Case(
        "dpo/bounded gradient",
        together(
            {"variant": "sigmoid", "label_smoothing": 0.1},
            {"variant": "hinge"},
            {"variant": "robust", "label_smoothing": 0.1},
            {"variant": "exo", "label_smoothing": 0.1},
            {"variant": "nca"},
            {"variant": "bco"},
            {"variant": "apo_zero"},
            {"variant": "apo_down"},
        ),
        each(smoothed_sigmoid, hinge, robust, exo, nca, bco, apo_zero, apo_down),
        pairs,
        differentiable=POLICY,
    ),
    Case(
        "dpo/discopop",
        together({"variant": "discopop"}, {"variant": "discopop", "discopop_temperature": 0.5}),
        each(discopop, functools.partial(discopop, temperature=0.5)),
        pairs,
        differentiable=POLICY,
    ),
    Case(
        "dpo/squared",
        together({"variant": "ipo"}, {"variant": "sppo"}),
        each(ipo, sppo),
        pairs,
        differentiable=POLICY,
    ),
    Case(
        "dpo/quantiles",
        together({"variant": "aot", "label_smoothing": 0.1}, {"variant": "aot_unpaired"}),
        each(aot, aot_unpaired),
        pairs,
        differentiable=POLICY,
        rowwise=False,
    ),
    Case(
        "dpo/per token",
        with_lengths(together({"variant": "sigmoid"}, {"variant": "hinge"})),
        lambda *inputs: each(lambda *pair: L(margin(*pair)), hinge)(*per_token(*inputs)),
        pairs_with_lengths,
        differentiable=POLICY,
    ),
)

CASES = (
    *DPO,
    Case(
        "rpo",
        functools.partial(losses.rpo, nll_weight=0.7),
        rpo,
        lambda rng, rows: pairs_with_lengths(rng, rows)[:5],
        differentiable=POLICY,
    ),
    Case(
        "kto",
        functools.partial(losses.kto, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5),
        kto,
        single_answers,
        differentiable=(0,),
        shared=(3,),
    ),
    Case("orpo", losses.orpo, orpo, answers_with_lengths, differentiable=POLICY),
    Case(
        "simpo",
        functools.partial(losses.simpo, label_smoothing=0.1),
        simpo,
        answers_with_lengths,
        differentiable=POLICY,
    ),
    Case(
        "cpo",
        functools.partial(losses.cpo, nll_weight=0.7, label_smoothing=0.1),
        cpo,
        lambda rng, rows: answers_with_lengths(rng, rows)[:3],
        differentiable=POLICY,
    ),
    Case("redi", losses.redi, redi, answers_with_lengths, differentiable=POLICY),
)
