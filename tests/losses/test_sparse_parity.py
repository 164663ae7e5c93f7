"""Sparse and cross-vocabulary divergences against TRL's, called on given logits, and torch."""

import types

import jax
import numpy as np
import pytest

from jaxdistill import losses

# TRL and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
STUDENT = (RNG.normal(size=(2, 6, 9)) * 2).astype(np.float32)
TEACHER = (RNG.normal(size=(2, 6, 9)) * 2).astype(np.float32)
WIDE_TEACHER = (RNG.normal(size=(2, 8, 11)) * 2).astype(np.float32)
LABELS = np.array([[-100, -100, 4, 5, 6, -100], [-100, 3, 2, 8, 1, 7]])
IDS, LOG_P = (np.asarray(x).copy() for x in losses.top_k_teacher(TEACHER, 4))
LOG_P[0, 3, 2:] = -np.inf  # a shorter list


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def ours(loss, student: np.ndarray = STUDENT, mask: np.ndarray = LABELS != -100):
    def mean(student: jax.Array) -> jax.Array:
        return losses.token_mean(loss(student), mask).mean()

    return jax.value_and_grad(mean)(student)


def compare(found, expected) -> None:
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


def from_server(torch, student: np.ndarray, add_tail: bool, ids=IDS, log_p=LOG_P, labels=LABELS):
    """Loss and gradient of TRL's forward KL from the top k that a teacher server sends."""
    module = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    trainer = module.ServerDistillationTrainer
    bare = types.SimpleNamespace(
        loss_add_tail=add_tail, _reduce_divergence_loss=trainer._reduce_divergence_loss
    )
    logits = torch.tensor(student, requires_grad=True)
    sent = {"topk_logprobs": torch.tensor(log_p), "topk_token_ids": torch.tensor(ids).long()}
    loss = trainer._compute_server_forward_kl_loss(
        bare, sent, logits.log_softmax(-1), torch.tensor(labels)
    )
    loss.backward()
    return float(loss), logits.grad.numpy()


def test_bucket_is_that_of_trl(torch) -> None:
    found = ours(lambda s: losses.topk_forward_kl(s, IDS, LOG_P))
    compare(found, from_server(torch, STUDENT, add_tail=True))


def test_first_is_trl_without_its_tail(torch) -> None:
    """Both sides renormalised over the k: not `renormalise`, whose student keeps its rest."""
    whole = np.where(np.isinf(LOG_P), -2.0, LOG_P)
    found = ours(lambda s: losses.first(s, IDS, np.exp(whole)))
    compare(found, from_server(torch, STUDENT, add_tail=False, log_p=whole))
    other = ours(lambda s: losses.topk_forward_kl(s, IDS, LOG_P, tail="renormalise"))
    assert abs(other[0] - found[0]) > 0.01


def test_clamped_tail_cannot_teach_a_sure_student(torch) -> None:
    """All of the student's mass on the id: ours pushes the teacher's rest back, TRL's nothing."""
    student = np.where(np.arange(9) == 4, 40.0, 0.0).astype(np.float32)[None, None]
    record = {"ids": np.array([[[4]]]), "log_p": np.log(np.float32([[[0.6]]]))}
    one = np.zeros((1, 1), int)
    value, gradient = from_server(torch, student, add_tail=True, labels=one, **record)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    our_value, our_gradient = ours(
        lambda s: losses.topk_forward_kl(s, record["ids"], record["log_p"]), student, one + 1
    )
    np.testing.assert_allclose(our_gradient[0, 0, 4], 0.4, rtol=1e-5)
    assert our_value > value + 5


def test_truncated_forms_are_torch_kl_div(torch) -> None:
    logits = torch.tensor(STUDENT, requires_grad=True)
    ids, log_p = torch.tensor(IDS).long(), torch.tensor(LOG_P)
    log_q = logits.log_softmax(-1).gather(-1, ids)
    for tail, p in (("ignore", log_p.exp()), ("renormalise", log_p.softmax(-1))):
        logits.grad = None
        kl = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
        kl.mean().backward(retain_graph=True)
        found = ours(
            lambda s, t=tail: losses.topk_forward_kl(s, IDS, LOG_P, tail=t), mask=np.ones((2, 6))
        )
        compare(found, (float(kl.mean().detach()), logits.grad.numpy()))


def test_other_bucket_without_logarithms_is_no_divergence(torch) -> None:
    """FIRST's code hands kl_div probabilities for logs: at the teacher it does not rest."""
    logits = torch.tensor(TEACHER, requires_grad=True)
    q = logits.softmax(-1).gather(-1, torch.tensor(IDS).long())
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    torch.nn.functional.kl_div(q, q.detach(), reduction="sum", log_target=True).backward()
    assert logits.grad.abs().max() > 0.05
    p = np.exp(losses.top_k_teacher(TEACHER, 4).log_probs)
    _, gradient = ours(lambda s: losses.first(s, IDS, p, other_bucket=True), TEACHER)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def gold(torch, strategy: str, student_labels: np.ndarray, teacher_labels: np.ndarray):
    """Value and gradient of GOLD's universal logit loss with positions paired by index."""
    module = pytest.importorskip("trl.experimental.gold.gold_trainer")
    config = types.SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=2.0,
        uld_teacher_temperature=2.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy=strategy,
    )
    logits = torch.tensor(STUDENT, requires_grad=True)
    labels = [torch.tensor(x) for x in (student_labels, teacher_labels)]
    loss = module.ULDLoss(config)(logits, torch.tensor(WIDE_TEACHER), *labels, *labels)
    loss.backward()
    return float(loss.detach()), logits.grad.numpy()


@pytest.mark.parametrize(("strategy", "late"), [("bayesian", 0), ("observed", 1)])
def test_universal_logit_is_that_of_gold(torch, strategy: str, late: int) -> None:
    """GOLD's default begins at the logits of the first answer token, which predict the second."""
    starts, lengths = (2, 1), (3, 4)
    teacher_labels = np.full((2, 8), -100)
    teacher_labels[0, 3:8], teacher_labels[1, 2:6] = 1, 1
    student_labels = np.where(np.arange(6) < 5, LABELS, -100)  # logits follow the last token

    def loss(student: jax.Array) -> jax.Array:
        means = []
        for row, teacher_start in enumerate((3, 2)):
            begin, end = starts[row] - 1 + late, starts[row] - 1 + late + lengths[row]
            shift = teacher_start - starts[row]
            values = losses.universal_logit(
                student[row, begin:end],
                WIDE_TEACHER[row, begin + shift : end + shift],
                temperature=2.0,
            )
            means.append(values.mean())
        return (means[0] + means[1]) / 2

    compare(
        jax.value_and_grad(loss)(STUDENT), gold(torch, strategy, student_labels, teacher_labels)
    )
