"""Divergences of student and teacher logits over one vocabulary."""

import functools

import jax
import numpy as np

from jaxdistill import losses
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax, softmax


def inputs(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 3, 7)) * 2, rng.normal(size=(rows, 3, 7)) * 2


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def forward(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return kl(log_softmax(teacher / temperature), log_softmax(student / temperature))


def reverse(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return kl(log_softmax(student / temperature), log_softmax(teacher / temperature))


def symmetric(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return (forward(student, teacher, temperature) + reverse(student, teacher, temperature)) / 2


def jensen_shannon(student, teacher, beta, temperature=1.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    m = beta * p + (1 - beta) * q
    return beta * kl(np.log(p), np.log(m)) + (1 - beta) * kl(np.log(q), np.log(m))


def skew_forward(student, teacher, skew, temperature=1.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return kl(np.log(p), np.log(skew * p + (1 - skew) * q))


def skew_reverse(student, teacher, skew, temperature=1.0, mixed=None):
    """The student of the mixture is `mixed`, by default the same."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    of_mixture = q if mixed is None else softmax(mixed / temperature)
    return kl(np.log(q), np.log((1 - skew) * p + skew * of_mixture))


def adaptive(student, teacher, head_mass=0.5, temperature=1.0, frozen=None):
    """Token by token in the order of the teacher, until the head is full."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    still = q if frozen is None else softmax(frozen / temperature)
    share = np.zeros(p.shape[:-1])
    for position in np.ndindex(share.shape):
        gap, mass, of_head = np.abs(p[position] - still[position]), 0.0, 0.0
        for token in np.argsort(-p[position]):
            if mass >= head_mass:
                break
            mass += p[position][token]
            of_head += gap[token]
        share[position] = of_head / gap.sum()
    forward_part = share * forward(student, teacher, temperature)
    return forward_part + (1 - share) * reverse(student, teacher, temperature)


def rejection(student, teacher, temperature=1.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return 1 - np.minimum(p, q).sum(-1)


def log_acceptance(student, teacher, temperature=1.0):
    return -np.log(1 - rejection(student, teacher, temperature))


def masked_inputs(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return *inputs(rng, rows), rng.random((rows, 3)) < 0.7


def exact_advantage(student, teacher, mask, statistics):
    """A of every token, from the rewards of all kept positions, one by one."""
    p, q = softmax(teacher), softmax(student)
    reward = np.where(p > q, 1.0, 0.0)
    weights = (q if statistics == "student" else np.ones_like(q)) * mask[..., None]
    mean = (weights * reward).sum() / weights.sum()
    variance = (weights * (reward - mean) ** 2).sum() / weights.sum()
    return (reward - mean) / np.sqrt(variance)


def exact_tvd(student, teacher, mask, statistics="student", frozen=None):
    advantage = exact_advantage(student if frozen is None else frozen, teacher, mask, statistics)
    return -(softmax(student) * advantage).sum(-1)


def samples(student: np.ndarray) -> np.ndarray:
    """The tokens that the loss draws with this key from a student in float32."""
    uniform = np.asarray(jax.random.uniform(jax.random.key(0), (*student.shape[:-1], 5)))
    cumulative = softmax(student.astype(np.float32)).cumsum(-1)
    return (uniform[..., None] > cumulative[..., None, :]).sum(-1).clip(max=student.shape[-1] - 1)


def sampled_tvd(student, teacher, mask, frozen=None):
    frozen = student if frozen is None else frozen
    drawn = samples(frozen)
    rewards = np.take_along_axis(softmax(teacher) > softmax(frozen), drawn, -1).astype(float)
    kept = rewards[mask]
    advantage = (rewards - kept.mean()) / kept.std()
    return -(advantage * np.take_along_axis(log_softmax(student), drawn, -1)).mean(-1)


def cut(oracle, temperature: float, **options):
    """The oracle at a temperature on the 5 columns that are no padding, times its square."""

    def of_columns(student, teacher):
        values = oracle(student[..., :5], teacher[..., :5], temperature=temperature, **options)
        return temperature**2 * values

    return of_columns


def scaled(name: str, temperature: float, **options):
    """The loss with all its options set."""
    return functools.partial(
        getattr(losses, name),
        temperature=temperature,
        scale_by_temperature_squared=True,
        vocab_size=5,
        **options,
    )


def pair(name: str, oracle, temperature: float, **options) -> tuple[Case, Case]:
    """A divergence as it is, and with temperature, its square and a padded vocabulary."""
    plain = functools.partial(getattr(losses, name), **options)
    return (
        Case(name, plain, functools.partial(oracle, **options), inputs, differentiable=(0,)),
        Case(
            f"{name}/temperature,squared,padded",
            scaled(name, temperature, **options),
            cut(oracle, temperature, **options),
            inputs,
            differentiable=(0,),
        ),
    )


CASES = (
    *pair("forward_kl", forward, 2.0),
    *pair("reverse_kl", reverse, 0.5),
    *pair("symmetric_kl", symmetric, 2.0),
    *pair("jensen_shannon", jensen_shannon, 2.0, beta=0.3),
    *pair("skew_forward_kl", skew_forward, 2.0, skew=0.1),
    *pair("skew_reverse_kl", skew_reverse, 2.0, skew=0.1),
    Case(
        "skew_reverse_kl/fixed_mixture",
        functools.partial(losses.skew_reverse_kl, skew=0.2, fixed_mixture=True),
        functools.partial(skew_reverse, skew=0.2),
        inputs,
        differentiable=(0,),
        surrogate=lambda frozen, student, teacher: skew_reverse(
            student, teacher, skew=0.2, mixed=frozen[0]
        ),
    ),
    Case(
        "adaptive_kl/temperature,squared,padded",
        scaled("adaptive_kl", 2.0, head_mass=0.6),
        cut(adaptive, 2.0, head_mass=0.6),
        inputs,
        differentiable=(0,),
        surrogate=lambda frozen, student, teacher: cut(
            adaptive, 2.0, head_mass=0.6, frozen=frozen[0][..., :5]
        )(student, teacher),
    ),
    Case("total_variation", losses.total_variation, rejection, inputs, differentiable=(0,)),
    Case(
        "log_acceptance/temperature,padded",
        functools.partial(losses.log_acceptance, temperature=2.0, vocab_size=5),
        lambda student, teacher: log_acceptance(student[..., :5], teacher[..., :5], 2.0),
        inputs,
        differentiable=(0,),
    ),
    Case(
        "tvd_plus_plus/exact",
        losses.tvd_plus_plus,
        exact_tvd,
        masked_inputs,
        differentiable=(0,),
        surrogate=lambda frozen, *arrays: exact_tvd(*arrays, frozen=frozen[0]),
        rowwise=False,
    ),
    Case(
        "tvd_plus_plus/exact,vocabulary",
        functools.partial(losses.tvd_plus_plus, statistics="vocabulary"),
        functools.partial(exact_tvd, statistics="vocabulary"),
        masked_inputs,
        differentiable=(0,),
        surrogate=lambda frozen, *arrays: exact_tvd(*arrays, "vocabulary", frozen=frozen[0]),
        rowwise=False,
    ),
    Case(
        "tvd_plus_plus/sampled",
        lambda *arrays: losses.tvd_plus_plus(*arrays, key=jax.random.key(0), num_samples=5),
        sampled_tvd,
        masked_inputs,
        differentiable=(0,),
        surrogate=lambda frozen, *arrays: sampled_tvd(*arrays, frozen=frozen[0]),
        rowwise=False,
    ),
)
