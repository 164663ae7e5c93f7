"""Several teachers, a discriminator, two heads and exits: who learns from whom."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax, pick, softmax

RNG = np.random.default_rng(0)
LABEL, DISTILL, TEACHER = (2 * RNG.normal(size=(3, 6, 4))).astype(np.float32)
LABELS = RNG.integers(0, 4, 6)
LABELED = np.array([1, 1, 0, 1, 0, 0], bool)
SHALLOW = RNG.normal(size=(6, 3, 4)).astype(np.float32)
SCORES = RNG.normal(size=(2, 5, 2)).astype(np.float32)
ensemble = jax.jit(losses.ensemble_probabilities, static_argnames="vocab_size")
dho = jax.jit(losses.dho)
mixed = jax.jit(losses.dho_probabilities)
unfused = jax.jit(losses.unfused, static_argnames="stop_deep_gradient")
discrimination = jax.jit(losses.output_discrimination)


def test_two_sure_teachers_who_disagree_give_half_each() -> None:
    """The softmax of the mean of their logits would do so too, but not of unequal logits."""
    logits = np.array([[40.0, 0.0, 0.0], [0.0, 20.0, 0.0]], np.float32)
    np.testing.assert_allclose(ensemble(logits), [0.5, 0.5, 0], atol=1e-6)
    assert softmax(logits.mean(0))[0] > 0.99


def test_one_teacher_is_ordinary_distillation() -> None:
    target = ensemble(TEACHER[:, None], temperature=2.0)
    np.testing.assert_allclose(target, softmax(TEACHER / 2), atol=1e-6)
    difference = losses.soft_cross_entropy(LABEL / 2, target) - losses.forward_kl(
        LABEL, TEACHER, temperature=2.0
    )
    np.testing.assert_allclose(difference, losses.entropy(TEACHER, temperature=2.0), rtol=1e-5)


def test_what_teachers_forbid_and_columns_that_do_not_exist() -> None:
    logits = np.stack([TEACHER, DISTILL], axis=1)
    logits[:, :, 1] = -np.inf
    logits[..., 3] = 1e4
    probabilities = ensemble(logits, vocab_size=3)
    np.testing.assert_array_equal(probabilities[:, 1], 0)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)


def test_discriminator_scores_student_and_teacher_as_opposites() -> None:
    student, teacher = SCORES
    value = discrimination(student, teacher)
    np.testing.assert_allclose(discrimination(teacher[:, ::-1], student[:, ::-1]), value, rtol=1e-6)
    np.testing.assert_allclose(discrimination(0 * student, 0 * teacher), np.log(2), rtol=1e-6)
    right = np.array([[30.0, -30.0]], np.float32)
    np.testing.assert_allclose(discrimination(right, -right), 0, atol=1e-6)
    np.testing.assert_allclose(discrimination(-right, right), 30, rtol=1e-6)


def test_reversal_lets_the_discriminator_learn_and_the_student_deceive() -> None:
    discriminator = RNG.normal(size=(4, 2)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(student: jax.Array, discriminator: jax.Array, reverse: bool) -> jax.Array:
        seen = losses.reverse_gradient(student) if reverse else student
        scores = seen @ discriminator, TEACHER @ discriminator
        return losses.output_discrimination(*scores).mean()

    value, (student, network) = run(LABEL, discriminator, False)
    reversed_value, (deceiving, same_network) = run(LABEL, discriminator, True)
    assert value == reversed_value
    np.testing.assert_allclose(same_network, network, rtol=1e-6)
    np.testing.assert_allclose(deceiving, -student, rtol=1e-6)
    assert np.abs(student).max() > 1e-3


def test_scale_of_the_reversal_may_follow_a_schedule() -> None:
    @jax.jit
    def run(scale: jax.Array) -> jax.Array:
        function = lambda x, s: losses.reverse_gradient(x, scale=s).sum()  # noqa: E731
        return jax.grad(function, argnums=(0, 1))(LABEL.astype(jax.numpy.bfloat16), scale)

    for scale in (0.0, 0.25):
        values, of_scale = run(np.float32(scale))
        assert values.dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(values.astype(np.float32), -scale)
        assert of_scale == 0


def test_dho_heads_learn_from_their_own_loss_alone() -> None:
    run = jax.jit(jax.grad(lambda *heads: losses.dho(*heads).sum(), argnums=(0, 1)))
    label, distill = run(LABEL, DISTILL, TEACHER, LABELS, LABELED)
    assert not np.asarray(label)[~LABELED].any()
    other_label, _ = run(LABEL, DISTILL, TEACHER[::-1], LABELS, LABELED)
    _, other_distill = run(LABEL, DISTILL, TEACHER, (LABELS + 1) % 4, LABELED)
    np.testing.assert_array_equal(label, other_label)
    np.testing.assert_array_equal(distill, other_distill)
    expected = 0.5 * (softmax(LABEL) - np.eye(4)[LABELS])
    np.testing.assert_allclose(np.asarray(label)[LABELED], expected[LABELED], atol=1e-6)
    expected = 0.5 * 2 * (softmax(DISTILL / 2) - softmax(TEACHER / 2))
    np.testing.assert_allclose(distill, expected, atol=1e-6)


def test_dho_reduces_labelled_and_unlabelled_rows_apart() -> None:
    """lambda CE + (1 - lambda)(KD on labelled + KD on unlabelled), a mean each."""
    values = dho(LABEL, DISTILL, TEACHER, LABELS, LABELED, label_weight=0.3, distill_weight=0.7)
    found = losses.token_mean(values, LABELED).mean() + losses.token_mean(values, ~LABELED).mean()
    log_p, log_q = log_softmax(TEACHER / 2), log_softmax(DISTILL / 2)
    kd = 4 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    ce = -pick(log_softmax(LABEL), LABELS)[LABELED].mean()
    expected = 0.3 * ce + 0.7 * (kd[LABELED].mean() + kd[~LABELED].mean())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dho_probabilities_at_the_ends_are_those_of_one_head() -> None:
    np.testing.assert_allclose(mixed(LABEL, DISTILL, label_share=1.0), softmax(LABEL), atol=1e-6)
    for temperature in (0.5, 2.0):
        np.testing.assert_allclose(
            mixed(LABEL, DISTILL, label_share=0.0, temperature=temperature),
            softmax(DISTILL / temperature),
            atol=1e-6,
        )


def test_unfused_of_equal_exits_is_their_cross_entropy() -> None:
    shallow = np.repeat(TEACHER[:, None], 3, axis=1)
    value = unfused(shallow, TEACHER, LABELS)
    nll = -pick(log_softmax(TEACHER), LABELS)
    np.testing.assert_allclose(value, (1 + 3 * 0.7) * nll, rtol=1e-5)


def test_unfused_without_weights_is_plain_classification() -> None:
    nothing = {"shallow_weight": 0.0, "kl_weight": 0.0, "distance_weight": 0.0}
    value = unfused(SHALLOW, TEACHER, LABELS, **nothing)
    np.testing.assert_allclose(value, -pick(log_softmax(TEACHER), LABELS), rtol=1e-5)


def test_unfused_last_exit_learns_from_the_others_unless_stopped() -> None:
    run = jax.jit(
        jax.grad(lambda deep, stop: losses.unfused(
            SHALLOW, deep, LABELS, distance_weight=1.0, stop_deep_gradient=stop
        ).sum()),
        static_argnums=1,
    )  # fmt: skip
    alone = softmax(TEACHER) - np.eye(4)[LABELS]
    np.testing.assert_allclose(run(TEACHER, True), alone, atol=1e-6)
    assert np.abs(run(TEACHER, False) - alone).max() > 0.1


INVALID = [
    (
        lambda: losses.ensemble_probabilities(TEACHER[0]),
        "teacher_logits must be floating with shape [..., K, V], but it is float32 with shape (4,)",
    ),
    (
        lambda: losses.ensemble_probabilities(TEACHER, temperature=-1.0),
        "temperature must be finite and above 0, but it is -1.0",
    ),
    (
        lambda: losses.ensemble_probabilities(TEACHER, vocab_size=5),
        "vocab_size must lie in [1, 4], the columns of teacher_logits, but it is 5",
    ),
    (
        lambda: losses.output_discrimination(TEACHER, TEACHER),
        "student_scores must have shape [..., 2], but its shape is (6, 4)",
    ),
    (
        lambda: losses.output_discrimination(SCORES[0], SCORES[1, 0]),
        "teacher_scores must have the shape of student_scores, (5, 2), but its shape is (2,)",
    ),
    (
        lambda: losses.output_discrimination(SCORES[0], SCORES[1] > 0),
        "teacher_scores must be floating with shape [..., 2], but it is bool",
    ),
    (
        lambda: losses.reverse_gradient(LABELS),
        "values must be floating with shape [...], but it is int",
    ),
    (
        lambda: losses.reverse_gradient(LABEL, scale=-1.0),
        "scale must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL[:, :3], TEACHER, LABELS, LABELED),
        "distill_logits must have the shape of label_logits, (6, 4), but its shape is (6, 3)",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER[0], LABELS, LABELED),
        "teacher_logits must have the shape of label_logits, (6, 4), but its shape is (4,)",
    ),
    (
        lambda: losses.dho(LABELS, DISTILL, TEACHER, LABELS, LABELED),
        "label_logits must be floating with shape [..., V], but it is int",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER, LABELS, LABELED[:3]),
        "labeled must have shape (6,), but its shape is (3,)",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER, LABELS[:3], LABELED),
        "labels must have the shape of labeled, (6,), but its shape is (3,)",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER, LABELS + 4, LABELED),
        "labels must lie in [0, 4), but",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER, LABELS, LABELED, temperature=0.0),
        "temperature must be finite and above 0, but it is 0.0",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER, LABELS, LABELED, label_weight=-1.0),
        "label_weight must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.dho(LABEL, DISTILL, TEACHER, LABELS, LABELED, distill_weight=-1.0),
        "distill_weight must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.dho_probabilities(LABEL, DISTILL[:, :2]),
        "distill_logits must have the shape of label_logits, (6, 4), but its shape is (6, 2)",
    ),
    (
        lambda: losses.dho_probabilities(LABEL, DISTILL, label_share=1.5),
        "label_share must lie in [0.0, 1.0], but it is 1.5",
    ),
    (
        lambda: losses.dho_probabilities(LABEL, DISTILL, temperature=0.0),
        "temperature must be finite and above 0, but it is 0.0",
    ),
    (
        lambda: losses.unfused(SHALLOW[:, 0], TEACHER, LABELS),
        "shallow_logits must have the shape of deep_logits, (6, 4), with an axis of exits before "
        "the last, but its shape is (6, 4)",
    ),
    (
        lambda: losses.unfused(SHALLOW, TEACHER, LABELS, shallow_weight=-1.0),
        "shallow_weight must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.unfused(SHALLOW, TEACHER, LABELS, kl_weight=-1.0),
        "kl_weight must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.unfused(SHALLOW, TEACHER, LABELS, distance_weight=-1.0),
        "distance_weight must lie in [0.0, inf], but it is -1.0",
    ),
    (
        lambda: losses.unfused(SHALLOW, TEACHER, LABELS[:3]),
        "labels must have shape (6,), but the shape is (3,)",
    ),
    (lambda: losses.unfused(SHALLOW, TEACHER, LABELS - 4), "labels must lie in [0, 4), but -"),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
