"""Hidden-state forms of the preference objectives: the oracles go by full logits in float64."""

import functools

import numpy as np

from jaxdistill.losses import from_hidden
from tests.losses.cases import preference
from tests.losses.contract import Case
from tests.losses.oracle import cap, log_softmax, pick

CAPPED = {"soft_cap": 3.0, "vocab_size": 5}


def answers(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, ...]:
    """Labels in the real vocabulary and masks that keep at least the first token."""
    mask = rng.integers(0, 2, shape)
    mask[..., 0] = 1
    return rng.integers(0, 5, shape), mask


def one_model(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    hidden, head = rng.normal(size=(rows, 2, 3, 4)), rng.normal(size=(7, 4))
    return hidden, head, *answers(rng, rows, 2, 3)


def two_models(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    reference = 3 * rng.normal(size=(rows, 2, 3, 2)), rng.normal(size=(7, 2))
    hidden, head, *rest = one_model(rng, rows)
    return 3 * hidden, head, *reference, *rest


def single_answers(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    hidden, head, reference, reference_head, labels, mask = two_models(rng, rows)
    policy, frozen = hidden[:, 0], reference[:, 0]
    marks = rng.random(rows) < 0.5, np.array(0.3)
    return policy, head, frozen, reference_head, labels[:, 0], mask[:, 0], *marks


def sums(hidden, head, labels, mask, soft_cap=None, vocab_size=None):
    """Summed log-probability of each sequence."""
    logits = cap(hidden @ head[:vocab_size].T, soft_cap)
    return (pick(log_softmax(logits), labels) * mask).sum(-1)


def lengths(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return mask.sum(-1)[:, 0], mask.sum(-1)[:, 1]


def both(*inputs, **options):
    log_prob = sums(*inputs, **options)
    return log_prob[:, 0], log_prob[:, 1]


def two_sided(oracle, use_lengths, hidden, head, reference, reference_head, labels, mask):
    policy = both(hidden, head, labels, mask)
    frozen = both(reference, reference_head, labels, mask)
    return oracle(*policy, *frozen, *lengths(mask)[:use_lengths])


def one_sided(oracle, use_lengths, hidden, head, labels, mask):
    return oracle(*both(hidden, head, labels, mask), *lengths(mask)[:use_lengths])


def capped_dpo(hidden, head, reference, reference_head, labels, mask):
    policy = both(hidden, head, labels, mask, **CAPPED)
    frozen = both(reference, reference_head, labels, mask, **CAPPED)
    return preference.exo(*preference.per_token(*policy, *frozen, *lengths(mask)))


def kto(hidden, head, reference, reference_head, labels, mask, desirable, point):
    policy = sums(hidden, head, labels, mask)
    return preference.kto(policy, sums(reference, reference_head, labels, mask), desirable, point)


def paired(name: str, loss, oracle, use_lengths: int) -> Case:
    return Case(
        f"from_hidden.{name}",
        loss,
        functools.partial(two_sided, oracle, use_lengths),
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        extreme=(0, 2),
    )


def free(name: str, loss, oracle, use_lengths: int) -> Case:
    return Case(
        f"from_hidden.{name}",
        loss,
        functools.partial(one_sided, oracle, use_lengths),
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    )


CASES = (
    Case(
        "from_hidden.sequence_log_prob/average,capped,padded",
        functools.partial(from_hidden.sequence_log_prob, average=True, **CAPPED),
        lambda *inputs: sums(*inputs, **CAPPED) / inputs[3].sum(-1),
        one_model,
        differentiable=(0, 1),
        shared=(1,),
        extreme=(0,),
    ),
    Case(
        "from_hidden.dpo/exo,average,capped,padded",
        functools.partial(
            from_hidden.dpo, variant="exo", label_smoothing=0.1, average=True, **CAPPED
        ),
        capped_dpo,
        two_models,
        differentiable=(0, 1),
        shared=(1, 3),
        extreme=(0, 2),
    ),
    paired("rpo", functools.partial(from_hidden.rpo, nll_weight=0.7), preference.rpo, 1),
    Case(
        "from_hidden.kto",
        functools.partial(from_hidden.kto, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5),
        kto,
        single_answers,
        differentiable=(0, 1),
        shared=(1, 3, 7),
        extreme=(0, 2),
    ),
    free("orpo", from_hidden.orpo, preference.orpo, 2),
    free("simpo", functools.partial(from_hidden.simpo, label_smoothing=0.1), preference.simpo, 2),
    free(
        "cpo",
        functools.partial(from_hidden.cpo, nll_weight=0.7, label_smoothing=0.1),
        preference.cpo,
        1,
    ),
    free("redi", from_hidden.redi, preference.redi, 2),
)
