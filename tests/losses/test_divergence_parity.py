"""The dense divergences against TRL's GKDTrainer, torch and optax, and where a peer is biased."""

import jax
import numpy as np
import pytest

from jaxdistill import losses

# TRL and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(2, 2, 6, 7)) * 2).astype(np.float32)
MASK = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])


def ours(loss) -> tuple[jax.Array, jax.Array]:
    """Token mean over the mask, and its gradient."""

    def mean(student: jax.Array) -> jax.Array:
        return losses.token_mean(loss(student), MASK).mean()

    return jax.value_and_grad(mean)(STUDENT)


def theirs(loss) -> tuple[float, np.ndarray]:
    """A torch function of student and teacher logits, and its gradient."""
    torch = pytest.importorskip("torch")
    student = torch.tensor(STUDENT, requires_grad=True)
    value = loss(torch, student, torch.tensor(TEACHER))
    value.backward()
    return value.item(), student.grad.numpy()


def assert_same(mine: tuple, expected: tuple) -> None:
    for one, other in zip(mine, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def gkd(rows: slice = slice(None), **options):
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer

    def loss(torch, student, teacher):
        labels = torch.tensor(np.where(MASK, 0, -100))[rows]
        return trainer.generalized_jsd_loss(student[rows], teacher[rows], labels, **options)

    return loss


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jensen_shannon_is_that_of_gkd(beta: float, temperature: float) -> None:
    options = {"beta": beta, "temperature": temperature}
    mine = ours(lambda student: losses.jensen_shannon(student, TEACHER, **options))
    assert_same(mine, theirs(gkd(**options)))


@pytest.mark.parametrize(("beta", "kl"), [(0, losses.forward_kl), (1, losses.reverse_kl)])
def test_gkd_at_its_ends_is_a_kl(beta: int, kl) -> None:
    assert_same(ours(lambda student: kl(student, TEACHER)), theirs(gkd(beta=beta)))


def test_gkd_averages_microbatches_if_not_told_the_tokens() -> None:
    """4 tokens and 2: the mean of the two means is another number than the mean of all."""
    values = losses.jensen_shannon(STUDENT, TEACHER)
    halves = [losses.token_mean(values[row], MASK[row]) for row in range(2)]
    whole = theirs(gkd())[0]
    np.testing.assert_allclose((halves[0] + halves[1]).mean(), whole, rtol=1e-5)
    found = np.mean([theirs(gkd(slice(row, row + 1)))[0] for row in range(2)])
    assert abs(found - whole) > 0.001


@pytest.mark.parametrize("kl", [losses.forward_kl, losses.reverse_kl])
def test_kl_div_of_torch(kl) -> None:
    """kl_div(input, target) is KL(target || input)."""

    def loss(torch, student, teacher):
        kept = torch.tensor(MASK) == 1
        log_q, log_p = (x.log_softmax(-1)[kept] for x in (student, teacher))
        pair = (log_q, log_p) if kl is losses.forward_kl else (log_p, log_q)
        return torch.nn.functional.kl_div(*pair, reduction="batchmean", log_target=True)

    assert_same(ours(lambda student: kl(student, TEACHER)), theirs(loss))


def test_batchmean_of_torch_grows_with_the_length() -> None:
    """Of [batch, length, vocabulary] it divides by the batch alone."""

    def loss(torch, student, teacher):
        logs = student.log_softmax(-1), teacher.log_softmax(-1)
        return torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)

    values = losses.forward_kl(STUDENT, TEACHER)
    np.testing.assert_allclose(theirs(loss)[0], 6 * np.mean(values), rtol=1e-5)


def test_optax() -> None:
    optax = pytest.importorskip("optax")
    logs = jax.nn.log_softmax(STUDENT), jax.nn.log_softmax(TEACHER)
    np.testing.assert_allclose(
        losses.forward_kl(STUDENT, TEACHER),
        optax.losses.kl_divergence_with_log_targets(*logs),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        losses.reverse_kl(STUDENT, TEACHER),
        optax.losses.kl_divergence_with_log_targets(*logs[::-1]),
        rtol=1e-5,
        atol=1e-6,
    )
