"""Contrastive batches, joint labels, ensembles, exits and experts; formulas written out."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.cases import divergence
from tests.losses.cases.cross_entropy import nll
from tests.losses.cases.features import direction
from tests.losses.cases.policy import batch_case
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax, softmax


def views(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    keep = np.arange(rows) != 3
    return rng.normal(size=(rows, 3)), rng.normal(size=(rows, 3)), keep


def nt_xent(first, second):
    """Anchor by anchor over the list of all views."""
    n = len(first)
    all_views = direction(np.concatenate([first, second]))
    terms = np.zeros(2 * n)
    for a in range(2 * n):
        similarity = np.array([all_views[a] @ all_views[c] / 0.5 for c in range(2 * n) if c != a])
        positive = all_views[a] @ all_views[(a + n) % (2 * n)] / 0.5
        terms[a] = np.log(np.exp(similarity).sum()) - positive
    return (terms[:n] + terms[n:]) / 2


def barlow(first, second, keep):
    standard = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (first[keep], second[keep])]
    c = standard[0].T @ standard[1] / keep.sum()
    on = ((1 - np.diag(c)) ** 2).sum()
    return np.asarray(on + 0.1 * ((c**2).sum() - (np.diag(c) ** 2).sum()))


def teachers(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return (rng.normal(size=(rows, 3, 4)) * 2,)


def scores(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 2)) * 2, rng.normal(size=(rows, 2)) * 2


def discrimination(student, teacher):
    """Binary cross-entropy with the probabilities of a logistic function."""
    result = np.zeros(len(student))
    for x, targets in ((student, (1, 0)), (teacher, (0, 1))):
        for column, target in enumerate(targets):
            p = 1 / (1 + np.exp(-x[:, column]))
            result -= np.log(p if target else 1 - p) / 4
    return result


def dual_heads(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Labels of unlabelled rows are -1, as data sets have them."""
    logits = [rng.normal(size=(rows, 5)) * 2 for _ in range(3)]
    labeled = np.arange(rows) % 3 == 0
    return *logits, np.where(labeled, rng.integers(0, 5, rows), -1), labeled


def dho(label_logits, distill_logits, teacher_logits, labels, labeled):
    value = 0.5 * 4 * divergence.forward(distill_logits, teacher_logits, 2.0)
    for row in np.flatnonzero(labeled):
        value[row] -= 0.5 * log_softmax(label_logits[row])[labels[row]]
    return value


def exits(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return (
        rng.normal(size=(rows, 3, 5)) * 2,
        rng.normal(size=(rows, 5)) * 2,
        rng.integers(0, 5, rows),
    )


def unfused(frozen, shallow, deep, labels):
    target = frozen[1]
    value = nll(deep, labels)
    for i in range(3):
        q = shallow[:, i]
        unit_distance = ((direction(q) - direction(target)) ** 2).sum(-1)
        value += 0.7 * nll(q, labels) + 0.3 * divergence.forward(q, target) + 0.5 * unit_distance
    return value


def joint(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Three classes under two transformations."""
    return rng.normal(size=(rows, 2, 6)) * 2, rng.integers(0, 3, rows)


def sla(logits, labels):
    log_p = log_softmax(logits)
    values = [[-log_p[b, j, y * 2 + j] for j in range(2)] for b, y in enumerate(labels)]
    return np.array(values)


def aggregate(logits):
    result = np.zeros((len(logits), 3))
    for b, i, j in np.ndindex(len(logits), 3, 2):
        result[b, i] += logits[b, j, i * 2 + j] / 2
    return result


def with_single(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    logits, labels = joint(rng, rows)
    return logits, rng.normal(size=(rows, 3)) * 2, labels


def sla_distillation(frozen, logits, single, labels):
    """The teacher is computed from what is frozen."""
    distilled = 1.5**2 * divergence.forward(single, aggregate(frozen[0]), 1.5)
    return sla(logits, labels).sum(-1) + 0.3 * nll(single, labels) + distilled


def routed(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    gates = softmax(rng.normal(size=(rows, 3, 4)))
    keep = np.arange(3) < rng.integers(1, 4, (rows, 1))
    keep[2] = False
    return gates, np.arange(rows) % 2, keep


def balance(gates, types, keep, average=False, squared=True):
    z = []
    for m in range(len(gates)):
        tokens = np.flatnonzero(keep[m])
        for i in range(4 if len(tokens) else 0):
            used = sum(gates[m, t, i] for t in tokens) / (len(tokens) if average else 1)
            half = 1 if i < 2 else 0
            z.append(used * (1.3 if types[m] == half else 0.7))
    mean = np.mean(z)
    variance = sum((value - mean) ** 2 for value in z) / (len(z) - 1)
    return np.asarray(variance / (mean**2 + 1e-10) if squared else variance / mean)


def unfrozen(surrogate):
    return lambda *arrays: surrogate(arrays, *arrays)


CASES = (
    Case(
        "nt_xent",
        functools.partial(losses.nt_xent, temperature=0.5),
        nt_xent,
        lambda rng, rows: views(rng, rows)[:2],
        differentiable=(0, 1),
        rowwise=False,
    ),
    batch_case("barlow_twins", barlow, views, differentiable=(0, 1), off_diagonal_weight=0.1),
    Case(
        "ensemble_probabilities",
        functools.partial(losses.ensemble_probabilities, temperature=0.8, vocab_size=3),
        lambda logits: softmax(logits[..., :3] / 0.8).mean(1),
        teachers,
        differentiable=(),
        extreme=(0,),
    ),
    Case(
        "output_discrimination",
        losses.output_discrimination,
        discrimination,
        scores,
        differentiable=(0, 1),
    ),
    Case(
        "reverse_gradient",
        functools.partial(losses.reverse_gradient, scale=0.5),
        lambda values: values,
        lambda rng, rows: (rng.normal(size=(rows, 3)),),
        differentiable=(0,),
        surrogate=lambda frozen, values: 1.5 * frozen[0] - 0.5 * values,
    ),
    Case("dho", losses.dho, dho, dual_heads, differentiable=(0, 1)),
    Case(
        "dho_probabilities",
        functools.partial(losses.dho_probabilities, label_share=0.3, temperature=1.5),
        lambda labels, distilled: 0.3 * softmax(labels) + 0.7 * softmax(distilled / 1.5),
        lambda rng, rows: dual_heads(rng, rows)[:2],
        differentiable=(0, 1),
    ),
    Case(
        "unfused",
        functools.partial(losses.unfused, distance_weight=0.5),
        unfrozen(unfused),
        exits,
        differentiable=(0, 1),
    ),
    Case(
        "unfused/stopped",
        functools.partial(losses.unfused, distance_weight=0.5, stop_deep_gradient=True),
        unfrozen(unfused),
        exits,
        differentiable=(0, 1),
        surrogate=unfused,
    ),
    Case("sla", losses.sla, sla, joint, differentiable=(0,)),
    Case(
        "sla_aggregate",
        losses.sla_aggregate,
        aggregate,
        lambda rng, rows: joint(rng, rows)[:1],
        differentiable=(0,),
    ),
    Case(
        "sla_single",
        functools.partial(losses.sla_single, num_transformations=2, transformation=1),
        lambda logits: np.stack([logits[..., 2 * i + 1] for i in range(3)], axis=-1),
        lambda rng, rows: joint(rng, rows)[:1],
        differentiable=(0,),
    ),
    Case(
        "sla_distillation",
        functools.partial(
            losses.sla_distillation, temperature=1.5, label_weight=0.3, sum_transformations=True
        ),
        unfrozen(sla_distillation),
        with_single,
        differentiable=(0, 1),
        surrogate=sla_distillation,
    ),
    batch_case("localized_balance", balance, routed, delta=0.3),
    batch_case(
        "localized_balance/mean,average",
        functools.partial(balance, average=True, squared=False),
        routed,
        delta=0.3,
        form="mean",
        average_tokens=True,
    ),
)
