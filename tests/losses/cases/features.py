"""Hidden states, attention maps, patches and relations; the oracles write out each formula."""

import functools

import numpy as np

from jaxdistill import losses
from tests.losses.cases.divergence import kl
from tests.losses.cases.policy import batch_case
from tests.losses.contract import Case
from tests.losses.oracle import log_softmax


def projected(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    hidden = rng.normal(size=(rows, 2, 3)), rng.normal(size=(rows, 2, 4))
    return *hidden, rng.normal(size=(3, 4)), rng.normal(size=4)


def patches(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(rows, 2, 5)), rng.normal(size=(rows, 2, 5)) * 3 + 1


def activations(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    keep = np.arange(5) < rng.integers(2, 6, (rows, 1))
    return rng.normal(size=(rows, 5, 3)), rng.normal(size=(rows, 5, 4)), keep


def maps(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Two heads and four of the teacher, causal, so that later keys have the probability 0."""
    seen = np.tri(3)
    return tuple(
        seen * weights / (seen * weights).sum(-1, keepdims=True)
        for weights in (rng.uniform(0.2, 1, (rows, heads, 3, 3)) for heads in (2, 4))
    )


def packed_vectors(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    ids = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])[np.arange(rows) % 2]
    return rng.normal(size=(rows, 5, 4)) * 2, rng.normal(size=(rows, 5, 6)) * 2, ids


def examples(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    keep = np.arange(rows) != 3
    return rng.normal(size=(rows, 3)), rng.normal(size=(rows, 4)), keep


def sets(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    keep = np.arange(6) < rng.integers(4, 7, (rows, 1))
    return rng.normal(size=(rows, 6, 3)) + 2, rng.normal(size=(rows, 6, 4)) - 1, keep


def direction(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def mse(student, teacher, projection, bias):
    return ((student @ projection + bias - teacher) ** 2).mean(-1)


def cosine(student, teacher, projection, bias):
    return 1 - (direction(student @ projection + bias) * direction(teacher)).sum(-1)


def dmae(student, teacher, projection, bias):
    return np.abs(direction(student @ projection + bias) - direction(teacher)).mean(-1)


def reconstruction(prediction, target):
    mean = target.mean(-1, keepdims=True)
    variance = ((target - mean) ** 2).sum(-1, keepdims=True) / (target.shape[-1] - 1)
    return ((prediction - (target - mean) / np.sqrt(variance + 1e-6)) ** 2).mean(-1)


def transfer(student, teacher, keep):
    values = []
    for row, kept in enumerate(keep):
        attention = [direction((np.abs(x[row][kept]) ** 2).sum(-1)) for x in (student, teacher)]
        values.append(((attention[0] - attention[1]) ** 2).sum())
    return np.array(values)


def map_kl(student, teacher):
    student, teacher = student.mean(1), teacher.mean(1)
    result = np.zeros(student.shape[:2])
    for row, query in np.ndindex(result.shape):
        for key in range(query + 1):
            p, q = teacher[row, query, key], student[row, query, key]
            result[row, query] += p * np.log(p / q)
    return result


def map_mse(student, teacher):
    return ((student.mean(1) - teacher.mean(1)) ** 2).sum(-1)


def relation(student, teacher, ids):
    """Token by token over itself and the tokens of its segment before it."""
    result = np.zeros(ids.shape)
    for row, t in np.ndindex(ids.shape):
        if not ids[row, t]:
            continue
        others = [k for k in range(5) if ids[row, k] == ids[row, t] and k <= t]
        for head in range(2):
            scores = []
            for x in (teacher[row], student[row]):
                part = np.split(x, 2, axis=-1)[head]
                products = np.array([part[t] @ part[k] for k in others])
                scores.append(log_softmax(products / np.sqrt(part.shape[-1])))
            result[row, t] += kl(*scores) / 2
    return result


def huber(r: float) -> float:
    return r * r / 2 if abs(r) <= 1 else abs(r) - 0.5


def rkd_distance(student, teacher, keep):
    rows = np.flatnonzero(keep)
    pairs = [(i, j) for i in rows for j in rows if i != j]
    apart = [np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (student, teacher)]
    relative = [d / d.mean() for d in apart]
    return np.asarray(np.mean([huber(r) for r in relative[0] - relative[1]]))


def rkd_angle(student, teacher, keep):
    rows = np.flatnonzero(keep)
    terms = []
    for i, j, k in ((i, j, k) for i in rows for j in rows for k in rows):
        if len({i, j, k}) == 3:
            cosines = [direction(x[i] - x[j]) @ direction(x[k] - x[j]) for x in (student, teacher)]
            terms.append(huber(cosines[0] - cosines[1]))
    return np.asarray(np.mean(terms))


def flat_cosine(first: np.ndarray, second: np.ndarray) -> float:
    return (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())


def relations(student, teacher, keep):
    """The matrices of each sample's kept positions."""
    return [
        [x[row][kept] @ x[row][kept].T for x in (student, teacher)] for row, kept in enumerate(keep)
    ]


def relation_cosine(student, teacher, keep):
    return np.array([1 - flat_cosine(*pair) for pair in relations(student, teacher, keep)])


def pooled_relation_cosine(student, teacher, keep):
    pairs = relations(student, teacher, keep)
    return np.asarray(
        1 - flat_cosine(*(np.concatenate([m.ravel() for m in x]) for x in zip(*pairs, strict=True)))
    )


def cka(student, teacher, keep):
    values = []
    for x, y, kept in zip(student, teacher, keep, strict=True):
        centring = np.eye(kept.sum()) - 1 / kept.sum()
        values.append(flat_cosine(*(centring @ z[kept] @ z[kept].T @ centring for z in (x, y))))
    return np.array(values)


def unbiased_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al.'s estimator, which no centring appears in."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    total = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def debiased_cka(student, teacher, keep):
    values = []
    for k, m in relations(student, teacher, keep):
        values.append(unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m)))
    return np.array(values)


PROJECTED = {"differentiable": (0, 2, 3), "shared": (2, 3), "extreme": (0,)}

CASES = (
    Case("hidden_mse/projected", losses.hidden_mse, mse, projected, **PROJECTED),
    Case("hidden_cosine/projected", losses.hidden_cosine, cosine, projected, **PROJECTED),
    Case("dmae_alignment/projected", losses.dmae_alignment, dmae, projected, **PROJECTED),
    Case(
        "masked_reconstruction/normalized",
        functools.partial(losses.masked_reconstruction, normalize_patches=True),
        reconstruction,
        patches,
        differentiable=(0,),
    ),
    Case(
        "attention_transfer", losses.attention_transfer, transfer, activations, differentiable=(0,)
    ),
    Case("attention_kl", losses.attention_kl, map_kl, maps, differentiable=(0,), extreme=()),
    Case("attention_mse", losses.attention_mse, map_mse, maps, differentiable=(0,)),
    Case(
        "self_attention_relation/packed,causal",
        functools.partial(losses.self_attention_relation, num_relation_heads=2, causal=True),
        relation,
        packed_vectors,
        differentiable=(0,),
    ),
    batch_case("rkd_distance", rkd_distance, examples),
    batch_case("rkd_angle", rkd_angle, examples),
    Case("relation_cosine", losses.relation_cosine, relation_cosine, sets, differentiable=(0,)),
    Case(
        "relation_cosine/pooled",
        functools.partial(losses.relation_cosine, pooled=True),
        pooled_relation_cosine,
        sets,
        differentiable=(0,),
        rowwise=False,
    ),
    Case("linear_cka", losses.linear_cka, cka, sets, differentiable=(0,)),
    Case(
        "linear_cka/debiased",
        functools.partial(losses.linear_cka, debiased=True),
        debiased_cka,
        sets,
        differentiable=(0,),
    ),
)
