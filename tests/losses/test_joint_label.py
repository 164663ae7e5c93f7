"""Which columns of the joint head count, and where they learn from."""

import re

import jax
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.oracle import log_softmax, pick, softmax

RNG = np.random.default_rng(0)
JOINT = (2 * RNG.normal(size=(5, 2, 6))).astype(np.float32)  # 2 transformations, 3 classes
SINGLE = RNG.normal(size=(5, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 2, 0])
sla, aggregate = jax.jit(losses.sla), jax.jit(losses.sla_aggregate)
distillation = jax.jit(losses.sla_distillation, static_argnames="sum_transformations")


def test_every_function_finds_the_columns_of_a_label() -> None:
    """A head that says y M + j under transformation j says y whichever way it is asked."""
    joint = np.stack([np.eye(6, dtype=np.float32)[LABELS * 2 + j] for j in range(2)], axis=1)
    np.testing.assert_allclose(sla(100 * joint, LABELS), 0, atol=1e-6)
    np.testing.assert_array_equal(aggregate(joint), np.eye(3)[LABELS])
    for j in range(2):
        logits = losses.sla_single(joint[:, j], num_transformations=2, transformation=j)
        np.testing.assert_array_equal(logits, np.eye(3)[LABELS])


def test_cross_entropy_of_the_joint_label() -> None:
    joint_labels = LABELS[:, None] * 2 + np.arange(2)
    expected = -pick(log_softmax(JOINT), joint_labels)
    np.testing.assert_allclose(sla(JOINT, LABELS), expected, rtol=1e-5)


def test_order_of_the_transformations_is_free() -> None:
    """If their inputs and their columns change places together."""
    swapped = JOINT[:, ::-1].reshape(5, 2, 3, 2)[..., ::-1].reshape(5, 2, 6)
    np.testing.assert_allclose(sla(swapped, LABELS), sla(JOINT, LABELS)[:, ::-1], rtol=1e-6)
    np.testing.assert_allclose(aggregate(swapped), aggregate(JOINT), rtol=1e-6)


def test_one_transformation_is_plain_classification() -> None:
    expected = -pick(log_softmax(SINGLE), LABELS)
    np.testing.assert_allclose(sla(SINGLE[:, None], LABELS)[:, 0], expected, rtol=1e-5)
    np.testing.assert_array_equal(aggregate(SINGLE[:, None]), SINGLE)
    np.testing.assert_array_equal(losses.sla_single(SINGLE, num_transformations=1), SINGLE)


def test_single_inference_conditions_on_the_transformation() -> None:
    joint = softmax(JOINT[:, 0].astype(np.float64)).reshape(5, 3, 2)[..., 0]
    conditional = joint / joint.sum(-1, keepdims=True)
    logits = losses.sla_single(JOINT[:, 0], num_transformations=2)
    np.testing.assert_allclose(jax.nn.softmax(logits), conditional, rtol=1e-5)


def test_distillation_teaches_the_plain_head_alone() -> None:
    run = jax.jit(jax.grad(lambda *heads: losses.sla_distillation(*heads).sum(), argnums=(0, 1)))
    joint, single = run(JOINT, SINGLE, LABELS)
    own = jax.jit(jax.grad(lambda x: losses.sla(x, LABELS).mean(-1).sum()))(JOINT)
    np.testing.assert_allclose(joint, own, atol=1e-6)
    target = softmax(np.asarray(aggregate(JOINT)))
    expected = 2 * softmax(SINGLE) - np.eye(3)[LABELS] - target
    np.testing.assert_allclose(single, expected, atol=1e-6)


def test_what_the_options_of_distillation_add() -> None:
    nll = sla(JOINT, LABELS)
    value = distillation(JOINT, SINGLE, LABELS)
    total = distillation(JOINT, SINGLE, LABELS, sum_transformations=True)
    np.testing.assert_allclose(total - value, nll.sum(-1) / 2, rtol=1e-5)
    agreed = distillation(JOINT, aggregate(JOINT), LABELS, label_weight=0.0, temperature=3.0)
    np.testing.assert_allclose(agreed, nll.mean(-1), rtol=1e-5)


INVALID = [
    (
        lambda: losses.sla(JOINT[..., :5], LABELS),
        "joint_logits must have shape [..., M, N M], its columns a multiple of its "
        "transformations, but its shape is (5, 2, 5)",
    ),
    (
        lambda: losses.sla_aggregate(JOINT[0, 0]),
        "joint_logits must be floating with shape [..., M, N M], but it is float32 with shape (6,)",
    ),
    (
        lambda: losses.sla(JOINT, np.repeat(LABELS[:, None], 2, 1)),
        "labels must have shape (5,), one an image, but the shape is (5, 2)",
    ),
    (lambda: losses.sla(JOINT, LABELS + 1), "labels must lie in [0, 3), but 3 is among them"),
    (lambda: losses.sla(JOINT, LABELS * 1.0), "labels must be integers, but the type is float"),
    (
        lambda: losses.sla_single(JOINT, num_transformations=4),
        "num_transformations must divide 6, the columns of joint_logits, but it is 4",
    ),
    (
        lambda: losses.sla_single(JOINT, num_transformations=0),
        "num_transformations must divide 6, the columns of joint_logits, but it is 0",
    ),
    (
        lambda: losses.sla_single(JOINT, num_transformations=2, transformation=2),
        "transformation must lie in [0, 1], but it is 2",
    ),
    (
        lambda: losses.sla_single(JOINT > 0, num_transformations=2),
        "joint_logits must be floating with shape [..., N M], but it is bool",
    ),
    (
        lambda: losses.sla_distillation(JOINT, JOINT[:, 0], LABELS),
        "single_logits must have shape (5, 3), the classes of joint_logits, but its shape is "
        "(5, 6)",
    ),
    (
        lambda: losses.sla_distillation(JOINT, LABELS, LABELS),
        "single_logits must be floating with shape [..., V], but it is int",
    ),
    (
        lambda: losses.sla_distillation(JOINT, SINGLE, LABELS, temperature=0.0),
        "temperature must be finite and above 0, but it is 0.0",
    ),
    (
        lambda: losses.sla_distillation(JOINT, SINGLE, LABELS, label_weight=-1.0),
        "label_weight must lie in [0.0, inf], but it is -1.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
