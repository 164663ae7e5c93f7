"""Policy gradients of teachers and demonstrations: on-policy and pi-distillation, the hybrids."""

from collections.abc import Callable

import numpy as np

from jaxdistill import losses
from tests.losses.cases.policy import (
    T,
    batch_case,
    clipped,
    constant_average,
    engines,
    k1,
    k2,
    ragged_mask,
    rollouts,
    token_average,
)
from tests.losses.contract import Case


def with_teacher(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """log_prob, old, teacher, mask."""
    log_prob, old, _, mask = rollouts(rng, rows)
    return log_prob, old, -rng.exponential(1.0, (rows, T)), mask


def student_and_privileged(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """log_prob, old, privileged, advantage, mask."""
    log_prob, old, advantage, mask = rollouts(rng, rows)
    return log_prob, old, log_prob + rng.normal(0, 0.4, (rows, T)), advantage, mask


def with_demos(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Rollouts, of which every third row is a demonstration."""
    return *rollouts(rng, rows), np.arange(rows) % 3 == 0


def with_successes(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return *with_demos(rng, rows), np.arange(rows) // 3


def with_entropy(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """log_prob, advantage, mask, is_demo, correct, entropy."""
    log_prob, _, advantage, mask, is_demo = with_demos(rng, rows)
    return (
        log_prob,
        advantage,
        mask,
        is_demo,
        np.arange(rows) % 2 == 0,
        rng.uniform(0, 2, (rows, T)),
    )


def with_hints(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    log_prob, old, advantage, mask = rollouts(rng, rows)
    mask[:, -1] = True
    return log_prob, old, advantage, mask, ~mask


def teacher_tokens(x, old, teacher, mask) -> np.ndarray:
    return -np.exp(x - old) * (teacher - old)


def returns_to_go(old: np.ndarray, teacher: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros_like(old)
    for i, row in enumerate(mask):
        running = 0.0
        for t in np.flatnonzero(row)[::-1]:
            running = teacher[i, t] - old[i, t] + 0.9 * running
            out[i, t] = running
    return out


def pi_distill(
    teacher, old, student, a, mask, *, frozen_teacher=None, frozen_student=None, kl=k1
) -> np.ndarray:
    """Equations T and S, alpha 0.3 and beta 0.2; what is stopped comes from the frozen arrays."""
    stopped_teacher = teacher if frozen_teacher is None else frozen_teacher
    stopped_student = student if frozen_student is None else frozen_student
    teacher_loss = clipped(np.exp(teacher - old), a, 0.2, 0.2) + 0.2 * kl(teacher, stopped_student)
    student_loss = clipped(np.exp(student - stopped_teacher), a, 0.2, 0.2)
    student_loss = student_loss + 0.2 * (stopped_teacher - student)
    return token_average(0.3 * teacher_loss + 0.7 * student_loss, mask)


def opsd(x, old, privileged, a, mask, kl: Callable = k1) -> np.ndarray:
    return token_average(clipped(np.exp(x - old), a, 0.2, 0.2) + 0.2 * kl(x, privileged), mask)


def luffy(x, old, a, mask, is_demo) -> np.ndarray:
    p = np.exp(x)
    ratio = np.where(is_demo[:, None], p / (p + 0.1), np.exp(x - old))
    return constant_average(-a[:, None] * ratio, mask, 7)


def srft(x, a, mask, is_demo, correct, entropy) -> np.ndarray:
    h = ((entropy * mask).sum(-1) / mask.sum(-1))[:, None]
    p = np.exp(x)
    demo = -0.5 * np.exp(-h) * x - a[:, None] * p / (p + 0.1)
    rollout = np.where(correct[:, None], -0.1 * np.exp(h) * x, x)
    return constant_average(np.where(is_demo[:, None], demo, rollout), mask, 7)


def hpt(x, old, a, mask, is_demo, successes) -> np.ndarray:
    sums = []
    for i in range(len(x)):
        if is_demo[i] and successes[i] <= 0:
            sums.append(-0.3 * x[i][mask[i]].sum() / 7)
        if not is_demo[i] and successes[i] > 0:
            sums.append(-(a[i] * np.exp(x[i] - old[i]))[mask[i]].sum() / 7)
    return np.mean(sums)


def chord(x, old, a, mask, is_demo, frozen=None) -> np.ndarray:
    p = np.exp(x if frozen is None else frozen)
    demo = is_demo[:, None] & mask
    reinforced = token_average(clipped(np.exp(x - old), a, 0.2, 0.2), mask & ~demo)
    return 0.75 * reinforced + 0.25 * token_average(-p * (1 - p) * x, demo)


def uft(x, old, a, mask, hint_mask) -> np.ndarray:
    reinforced = token_average(clipped(np.exp(x - old), a, 0.2, 0.2), mask)
    return reinforced + 0.3 * token_average(-x, hint_mask)


def iw_sft(x, proposal, reference, mask) -> np.ndarray:
    w = np.exp(((proposal - reference) * mask).sum(-1, keepdims=True))
    return np.where(mask, -np.minimum(w, 2.0) * x, 0.0)


def proposals(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    proposal, reference, mask = engines(rng, rows)
    return -rng.exponential(1.0, (rows, T)), proposal, reference, mask


CASES = (
    Case(
        "distillation_advantages",
        lambda x, teacher, mask: losses.distillation_advantages(x, teacher, mask, discount=0.9),
        returns_to_go,
        lambda rng, rows: (
            -rng.exponential(1.0, (rows, T)),
            -rng.exponential(1.0, (rows, T)),
            ragged_mask(rng, rows),
        ),
        differentiable=(),
        extreme=(0,),
    ),
    batch_case(
        "on_policy_distillation",
        lambda *arrays: token_average(teacher_tokens(*arrays), arrays[-1]),
        with_teacher,
    ),
    batch_case(
        "on_policy_distillation/loss",
        lambda x, old, teacher, m: token_average(k1(x, teacher), m),
        with_teacher,
        surrogate=lambda frozen, x, old, teacher, m: token_average(k2(x, teacher), m),
        form="loss",
    ),
    batch_case(
        "pi_distill",
        pi_distill,
        student_and_privileged,
        differentiable=(0, 2),
        surrogate=lambda frozen, *inputs: pi_distill(
            *inputs, frozen_teacher=frozen[0], frozen_student=frozen[2], kl=k2
        ),
        alpha=0.3,
        beta=0.2,
    ),
    batch_case(
        "opsd",
        opsd,
        student_and_privileged,
        surrogate=lambda frozen, *inputs: opsd(*inputs, kl=k2),
        beta=0.2,
    ),
    Case(
        "policy_shaping",
        losses.policy_shaping,
        lambda x: np.exp(x) / (np.exp(x) + 0.1),
        lambda rng, rows: (-rng.exponential(1.0, (rows, T)),),
        differentiable=(0,),
    ),
    batch_case("luffy", luffy, with_demos, divisor=7),
    batch_case(
        "srft",
        srft,
        with_entropy,
        divisor=7,
        extreme=(0,),
    ),
    batch_case("hpt", hpt, with_successes, divisor=7, sft_weight=0.3),
    batch_case(
        "chord/phi",
        chord,
        with_demos,
        surrogate=lambda frozen, *inputs: chord(*inputs, frozen=frozen[0]),
        mu=0.25,
        token_weight="phi",
    ),
    batch_case("uft", uft, with_hints, hint_weight=0.3),
    Case("iw_sft", losses.iw_sft, iw_sft, proposals, differentiable=(0,), extreme=(0,)),
)
