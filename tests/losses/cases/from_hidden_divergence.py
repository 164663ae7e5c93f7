"""Divergences of two models from hidden states: the oracles of the logits forms on full logits."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxdistill.losses import from_hidden
from tests.losses.cases import cross_tokenizer, divergence, sparse
from tests.losses.cases.from_hidden import two_models
from tests.losses.contract import Case
from tests.losses.oracle import cap

FIXED = {"skew": 0.2, "fixed_mixture": True}
CAPS = {"student_soft_cap": 3.0, "teacher_soft_cap": 4.0}


def logits(student, student_head, teacher, teacher_head) -> tuple[np.ndarray, np.ndarray]:
    return cap(student @ student_head[:5].T, 3.0), cap(teacher @ teacher_head[:5].T, 4.0)


def on_logits(oracle: Callable) -> Callable:
    """An oracle of two logits as one of two models, capped and without the padding."""
    return lambda *arrays: oracle(*logits(*arrays[:4]), *arrays[4:])


def of_models(
    name: str,
    oracle: Callable,
    surrogate: Callable | None = None,
    setting: str = "capped,padded",
    **options,
) -> Case:
    """`surrogate` is the oracle whose student, where it is a constant, is `frozen`."""

    def on_frozen(frozen, *arrays):
        still = logits(*frozen[:4])[0]
        return on_logits(functools.partial(surrogate, frozen=still))(*arrays)

    return Case(
        f"from_hidden.{name}/{setting}",
        functools.partial(getattr(from_hidden, name), vocab_size=5, **CAPS, **options),
        on_logits(oracle),
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        surrogate=None if surrogate is None else on_frozen,
        extreme=(0, 2),
    )


def squared(oracle: Callable, **options) -> Callable:
    """The oracle at temperature 2, times its square."""
    return lambda *arrays, **more: 4 * oracle(*arrays, temperature=2.0, **options, **more)


def scaled(name: str, oracle: Callable, with_surrogate: bool = False, **options) -> Case:
    wide = squared(oracle, **options)
    return of_models(
        name,
        wide,
        wide if with_surrogate else None,
        setting="capped,temperature,squared,padded",
        temperature=2.0,
        scale_by_temperature_squared=True,
        **options,
    )


def fixed_mixture(student, teacher, frozen=None):
    return divergence.skew_reverse(student, teacher, skew=0.2, mixed=frozen)


def masked_models(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return *two_models(rng, rows), rng.random((rows, 3)) < 0.7


def tvd(name: str, oracle: Callable, **options) -> Case:
    case = of_models("tvd_plus_plus", oracle, oracle, **options)
    return Case(
        f"from_hidden.tvd_plus_plus/{name},capped,padded",
        case.loss,
        case.oracle,
        masked_models,
        differentiable=(0, 1),
        shared=(1, 3),
        surrogate=case.surrogate,
        extreme=(0, 2),
        rowwise=False,
    )


def taid(student, student_head, teacher, teacher_head) -> jax.Array:
    """The loss a target is for."""
    models = student, student_head, teacher, teacher_head
    target = from_hidden.taid_target(*models, 0.4, vocab_size=5)
    return from_hidden.forward_kl(student, student_head, *target, vocab_size=5)


def taid_oracle(student, student_head, teacher, teacher_head, frozen=None):
    still = frozen or (student, student_head)
    target = 0.6 * still[0] @ still[1][:5].T + 0.4 * teacher @ teacher_head[:5].T
    return divergence.forward(student @ student_head[:5].T, target)


def other_vocabularies(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    student, head, teacher, _ = two_models(rng, rows)
    return student, head, teacher, rng.normal(size=(9, 5))


def of_records(name: str, oracle: Callable, make_records: Callable, **options) -> Case:
    """A student with capped logits, and records of a teacher over the 5 columns that count."""

    def inputs(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
        student, head, *_ = two_models(rng, rows)
        return student, head, *make_records(rng, rows)[1:]

    return Case(
        f"from_hidden.{name}/capped,padded",
        functools.partial(getattr(from_hidden, name), vocab_size=5, soft_cap=3.0, **options),
        lambda student, head, *records: oracle(cap(student @ head[:5].T, 3.0), *records),
        inputs,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    )


CASES = (
    scaled("forward_kl", divergence.forward),
    scaled("reverse_kl", divergence.reverse),
    scaled("symmetric_kl", divergence.symmetric),
    scaled("jensen_shannon", divergence.jensen_shannon, beta=0.3),
    scaled("skew_forward_kl", divergence.skew_forward, skew=0.1),
    scaled("skew_reverse_kl", divergence.skew_reverse, skew=0.1),
    of_models("skew_reverse_kl", fixed_mixture, fixed_mixture, "fixed,capped", **FIXED),
    of_models("total_variation", divergence.rejection),
    of_models("log_acceptance", divergence.log_acceptance),
    scaled("adaptive_kl", divergence.adaptive, with_surrogate=True, head_mass=0.6),
    tvd("exact", divergence.exact_tvd),
    tvd("sampled", divergence.sampled_tvd, key=jax.random.key(0), num_samples=5),
    Case(
        "from_hidden.taid_target/padded",
        taid,
        taid_oracle,
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        surrogate=lambda frozen, *arrays: taid_oracle(*arrays, frozen=frozen[:2]),
        extreme=(0, 2),
    ),
    Case(
        "from_hidden.universal_logit/capped,padded",
        functools.partial(
            from_hidden.universal_logit, student_vocab_size=5, teacher_vocab_size=8, **CAPS
        ),
        lambda student, head, teacher, teacher_head: cross_tokenizer.sorted_distance(
            cap(student @ head[:5].T, 3.0), cap(teacher @ teacher_head[:8].T, 4.0)
        ),
        other_vocabularies,
        differentiable=(0, 1),
        shared=(1, 3),
        extreme=(0, 2),
    ),
    of_records(
        "topk_forward_kl",
        lambda logits, *records: 4 * sparse.of_logs(sparse.bucketed)(logits / 2, *records),
        sparse.top_three,
        temperature=2.0,
        scale_by_temperature_squared=True,
    ),
    of_records("sampled_forward_kl", sparse.sampled, sparse.draws),
    of_records("first", sparse.both_renormalised, sparse.top_three_probabilities),
)
