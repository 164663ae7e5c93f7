"""Hidden-state forms of the policy family: the oracle of the log-prob form on full logits."""

import functools
from collections.abc import Callable

import numpy as np

from jaxdistill.losses import from_hidden
from tests.losses.cases import policy, policy_distillation
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax, pick, softmax

WIDTH, VOCABULARY, TEMPERATURE = 2, 6, 0.7
LOGITS_FORMS = {case.name: case for case in (*policy.CASES, *policy_distillation.CASES)}


def logits(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    return hidden @ head[:5].T / TEMPERATURE


def one_model(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    hidden, head = rng.normal(size=(rows, policy.T, WIDTH)), rng.normal(size=(VOCABULARY, WIDTH))
    return hidden, head, rng.integers(0, 5, (rows, policy.T))


def on_log_probs(oracle: Callable) -> Callable:
    """The oracle of log-probabilities as one of hidden, head and labels."""

    def of_hidden(
        hidden: np.ndarray, head: np.ndarray, labels: np.ndarray, *rest: np.ndarray
    ) -> np.ndarray:
        return oracle(pick(log_softmax(logits(hidden, head)), labels), *rest)

    return of_hidden


def hidden_case(name: str, **options: object) -> Case:
    """The hidden-state form of a case, with the padding of a vocabulary and a temperature."""
    base = LOGITS_FORMS[name]
    public = name.split("/")[0]
    form = functools.partial(
        getattr(from_hidden, public), temperature=TEMPERATURE, vocab_size=5, **options
    )
    reduced = not base.rowwise

    def surrogate(frozen: list[np.ndarray], *inputs: np.ndarray) -> np.ndarray:
        frozen_log_prob = pick(log_softmax(logits(*frozen[:2])), frozen[2])
        frozen_inputs = [frozen_log_prob, *frozen[3:]]
        return on_log_probs(functools.partial(base.surrogate, frozen_inputs))(*inputs)

    return Case(
        f"from_hidden.{name}",
        (lambda *arrays: form(*arrays).mean()) if reduced else form,
        on_log_probs(base.oracle),
        lambda rng, rows: (*one_model(rng, rows), *base.inputs(rng, rows)[1:]),
        differentiable=(0, 1),
        shared=(1,),
        surrogate=None if base.surrogate is None else surrogate,
        extreme=(0,),
        rowwise=base.rowwise,
    )


def entropy(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    x = logits(hidden, head)
    return -(softmax(x) * log_softmax(x)).sum(-1)


def with_entropy_bonus(hidden, head, labels, old, a, mask) -> np.ndarray:
    log_prob = pick(log_softmax(logits(hidden, head)), labels)
    loss = policy.clipped(np.exp(log_prob - old), a, 0.2, 0.2) - 0.3 * entropy(hidden, head)
    return policy.token_average(loss, mask)


def srft(hidden, head, labels, a, mask, is_demo, correct, frozen=None) -> np.ndarray:
    log_prob = pick(log_softmax(logits(hidden, head)), labels)
    stopped = entropy(*((hidden, head) if frozen is None else frozen[:2]))
    return policy_distillation.srft(log_prob, a, mask, is_demo, correct, stopped)


def two_views(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Hidden states with and without the information in view, then as for pi_distill."""
    hidden, head, labels = one_model(rng, rows)
    _, old, _, advantage, mask = policy_distillation.student_and_privileged(rng, rows)
    return hidden, hidden + rng.normal(0, 0.2, hidden.shape), head, labels, old, advantage, mask


def pi_distill(teacher, student, head, labels, old, a, mask, frozen=None, kl=policy.k1):
    def both(one, other, head):
        return [pick(log_softmax(logits(x, head)), labels) for x in (one, other)]

    log_teacher, log_student = both(teacher, student, head)
    stopped = (None, None) if frozen is None else both(*frozen[:3])
    return policy_distillation.pi_distill(
        log_teacher, old, log_student, a, mask,
        frozen_teacher=stopped[0], frozen_student=stopped[1], kl=kl,
    )  # fmt: skip


def reduced(name: str, oracle: Callable, inputs: Callable, shared: int, **kwargs: object) -> Case:
    """A form with arguments of its own."""
    surrogate, differentiable = kwargs.pop("surrogate"), kwargs.pop("differentiable")
    form = functools.partial(
        getattr(from_hidden, name), temperature=TEMPERATURE, vocab_size=5, **kwargs
    )
    return Case(
        f"from_hidden.{name}",
        lambda *arrays: form(*arrays).mean(),
        oracle,
        inputs,
        differentiable=differentiable,
        shared=(shared,),
        surrogate=surrogate,
        extreme=(0,),
        rowwise=False,
    )


CASES = (
    hidden_case("on_policy_distillation"),
    hidden_case("iw_sft"),
    hidden_case("chord/phi", mu=0.25, token_weight="phi"),
    reduced(
        "policy_gradient",
        with_entropy_bonus,
        lambda rng, rows: (*one_model(rng, rows), *policy.rollouts(rng, rows)[1:]),
        shared=1,
        surrogate=None,
        differentiable=(0, 1),
        entropy_weight=0.3,
    ),
    reduced(
        "srft",
        srft,
        lambda rng, rows: (
            *one_model(rng, rows),
            *policy_distillation.with_entropy(rng, rows)[1:-1],
        ),
        shared=1,
        surrogate=lambda frozen, *inputs: srft(*inputs, frozen=frozen),
        differentiable=(0, 1),
        divisor=7,
    ),
    reduced(
        "pi_distill",
        pi_distill,
        two_views,
        shared=2,
        surrogate=lambda frozen, *inputs: pi_distill(*inputs, frozen=frozen, kl=policy.k2),
        differentiable=(0, 1, 2),
        alpha=0.3,
        beta=0.2,
    ),
)
