"""The distillation of classifiers against torch's own pieces, and the forms the authors train with.

No library has these losses, so torch's `kl_div`, `corrcoef` and `std` make them here: once from the
formula, once as the authors' code approximates it, to show where that differs.
"""

import jax
import numpy as np
import pytest

from jaxdistill import losses

# torch warns about itself while it is imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
TEACHER = (RNG.normal(size=(8, 7)) * 2).astype(np.float32)
STUDENT = TEACHER + RNG.normal(size=(8, 7)).astype(np.float32)
LABELS = RNG.integers(0, 7, 8)
IS_TARGET = np.arange(7) == LABELS[:, None]


def of_torch(loss, student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
    """Value and gradient in the student of a function of two tensors."""
    torch = pytest.importorskip("torch")
    leaf = torch.tensor(student, requires_grad=True)
    value = loss(torch, leaf, torch.tensor(teacher))
    value.backward()
    return float(value.detach()), leaf.grad.numpy()


def ours(loss, student: np.ndarray, teacher: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda s: loss(s, teacher))(student)


def assert_equal(found: tuple, expected: tuple) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


def decoupled(student: jax.Array, teacher: np.ndarray) -> jax.Array:
    return losses.decoupled_kd(student, teacher, LABELS).mean()


def exact_dkd(torch, student, teacher):
    """Two divergences of torch: of the target against the rest, and without the target's column."""
    kl, at = torch.nn.functional.kl_div, torch.tensor(IS_TARGET)
    split, others = [], []
    for logits in (student / 4, teacher / 4):
        rest = logits[~at].reshape(8, 6)
        pair = torch.stack([logits[at], rest.logsumexp(-1)], -1)
        split.append(pair.log_softmax(-1))
        others.append(rest.log_softmax(-1))
    tckd, nckd = (kl(*x, reduction="batchmean", log_target=True) for x in (split, others))
    return 16 * (tckd + 8 * nckd)


def approximate_dkd(torch, student, teacher):
    """The target's logit lowered by 1000, and logarithms of sums of probabilities."""
    kl, at = torch.nn.functional.kl_div, torch.tensor(IS_TARGET)
    lowered = [logits / 4 - 1000.0 * at for logits in (student, teacher)]
    split = []
    for logits in (student, teacher):
        p = (logits / 4).softmax(-1)
        split.append(torch.stack([(p * at).sum(-1), (p * ~at).sum(-1)], -1))
    nckd = kl(lowered[0].log_softmax(-1), lowered[1].softmax(-1), reduction="sum")
    tckd = kl(split[0].log(), split[1], reduction="sum")
    return 16 * (tckd + 8 * nckd) / len(student)


@pytest.mark.parametrize("reference", [exact_dkd, approximate_dkd])
def test_decoupled_kd(reference) -> None:
    assert_equal(ours(decoupled, STUDENT, TEACHER), of_torch(reference, STUDENT, TEACHER))


@pytest.mark.parametrize("gap", [600.0, 6000.0])
def test_decoupled_kd_of_a_sure_student(gap: float) -> None:
    """The exact form holds; the other is infinite, its gradient no number."""
    sure = STUDENT + np.float32(gap) * IS_TARGET
    found = ours(decoupled, sure, TEACHER)
    assert_equal(found, of_torch(exact_dkd, sure, TEACHER))
    value, gradient = of_torch(approximate_dkd, sure, TEACHER)
    assert np.isfinite(found[0])
    assert not np.isfinite(value)
    assert not np.isfinite(gradient).all()


def test_standardized_kd_is_torchs_at_a_higher_temperature() -> None:
    """torch's deviation is over V - 1, so its logits are smaller by sqrt(1 - 1 / V)."""

    def kd(torch, student, teacher):
        log_q, log_p = (
            ((x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) / 2).log_softmax(-1)
            for x in (student, teacher)
        )
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def loss(student: jax.Array, teacher: np.ndarray, temperature: float) -> jax.Array:
        standard = losses.standardize_logits(student), losses.standardize_logits(teacher)
        return losses.forward_kl(*standard, temperature=temperature).mean()

    expected = of_torch(kd, STUDENT, TEACHER)
    higher = 2 * np.sqrt(7 / 6)
    assert_equal(ours(lambda s, t: loss(s, t, higher), STUDENT, TEACHER), expected)
    assert abs(loss(STUDENT, TEACHER, 2.0) - expected[0]) > 1e-3
    constant = np.zeros((8, 7), np.float32)
    assert np.abs(of_torch(kd, constant, TEACHER)[1]).max() > 1e4
    assert not np.asarray(ours(lambda s, t: loss(s, t, 2.0), constant, TEACHER)[1]).any()


def test_dist_is_the_correlation_of_torch() -> None:
    """Row by row and class by class; the authors' factor temperature^2 is one of the weights."""

    def distances(torch, student, teacher):
        q, p = ((x / 4).softmax(-1) for x in (student, teacher))
        inter, intra = (
            torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()
            for pairs in (zip(q, p, strict=True), zip(q.T, p.T, strict=True))
        )
        return 4.0**2 * (2 * inter + 2 * intra)

    def loss(student: jax.Array, teacher: np.ndarray) -> jax.Array:
        weights = {"inter_weight": 32.0, "intra_weight": 32.0}
        return losses.dist(student, teacher, temperature=4.0, epsilon=0.0, **weights).mean()

    assert_equal(ours(loss, STUDENT, TEACHER), of_torch(distances, STUDENT, TEACHER))


def test_dist_with_the_authors_epsilon() -> None:
    """Cosines of centred probabilities over norms and 1e-8, with classes rare enough to feel it."""
    rare = np.array([0, 0, 0, 0, 0, -18, -20], np.float32)

    def distances(torch, student, teacher):
        q, p = (x.softmax(-1) for x in (student, teacher))
        total = 0.0
        for a, b in ((q, p), (q.T, p.T)):
            a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
            r = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-8)
            total = total + 2 * (1 - r).mean()
        return total

    expected = of_torch(distances, STUDENT + rare, TEACHER + rare)
    assert_equal(
        ours(lambda s, t: losses.dist(s, t).mean(), STUDENT + rare, TEACHER + rare), expected
    )
    exact = losses.dist(STUDENT + rare, TEACHER + rare, epsilon=0.0).mean()
    assert expected[0] > exact + 0.1
