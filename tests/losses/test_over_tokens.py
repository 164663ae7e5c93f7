"""Losses over tiles of tokens: what the size of a tile changes (nothing), memory, messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import tiles
from jaxdistill.kernels.over_tokens import Model, over_tokens

from jaxdistill import losses
from jaxdistill.losses import from_hidden

RNG = np.random.default_rng(0)
HIDDEN, HEAD = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 5, 4), (11, 4)))
TEACHER, TEACHER_HEAD = (RNG.normal(size=s).astype(np.float32) for s in ((3, 5, 6), (11, 6)))
LOGS = np.full((3, 5, 1), -1.0)
COTANGENT = RNG.normal(size=(3, 5)).astype(np.float32)


def value_and_gradients(loss, hidden, head) -> tuple:
    values, pull = jax.vjp(loss, hidden, head)
    return values, *pull(COTANGENT)


@pytest.fixture
def two_tokens_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 tokens in 8 tiles, the last of them half full."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 2 * 4 * 11)


@pytest.mark.usefixtures("two_tokens_a_tile")
@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_tiles_equal_full_logits(layout: str) -> None:
    turned = (HEAD, TEACHER_HEAD) if layout == "vd" else (HEAD.T, TEACHER_HEAD.T)

    def tiled(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return from_hidden.adaptive_kl(hidden, head, TEACHER, turned[1], head_layout=layout)

    def full(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits = hidden @ (head.T if layout == "vd" else head)
        return losses.adaptive_kl(logits, TEACHER @ TEACHER_HEAD.T)

    found = value_and_gradients(tiled, HIDDEN, turned[0])
    for mine, expected in zip(found, value_and_gradients(full, HIDDEN, turned[0]), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-6)


@pytest.mark.usefixtures("two_tokens_a_tile")
def test_samples_are_those_of_the_logits_form() -> None:
    key = jax.random.key(3)
    student, teacher = HIDDEN @ HEAD.T, TEACHER @ TEACHER_HEAD.T
    models = HIDDEN, HEAD, TEACHER, TEACHER_HEAD
    np.testing.assert_allclose(
        from_hidden.tvd_plus_plus(*models, key=key),
        losses.tvd_plus_plus(student, teacher, key=key),
        atol=1e-5,
    )


@pytest.mark.usefixtures("two_tokens_a_tile")
def test_records_are_those_of_the_logits_form() -> None:
    logits, key = TEACHER @ TEACHER_HEAD.T, jax.random.key(1)
    options = {"temperature": 2.0, "vocab_size": 9}
    pairs = (
        (
            from_hidden.top_k_teacher(TEACHER, TEACHER_HEAD, 3, **options),
            losses.top_k_teacher(logits, 3, **options),
        ),
        (
            from_hidden.sample_teacher(TEACHER, TEACHER_HEAD, 4, key, **options),
            losses.sample_teacher(logits, 4, key, **options),
        ),
    )
    for tiled, full in pairs:
        assert type(tiled) is type(full)
        np.testing.assert_array_equal(tiled.ids, full.ids)
        for mine, expected in zip(tiled[1:], full[1:], strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-5)


@pytest.mark.usefixtures("two_tokens_a_tile")
@pytest.mark.parametrize("given", [1, 2, 3])
def test_records_that_are_left_out(given: int) -> None:
    records = losses.sample_teacher(TEACHER @ TEACHER_HEAD.T, 4, jax.random.key(1))[:given]
    np.testing.assert_allclose(
        from_hidden.sampled_forward_kl(HIDDEN, HEAD, *records),
        losses.sampled_forward_kl(HIDDEN @ HEAD.T, *records),
        atol=1e-5,
    )


def test_gradient_of_a_bfloat16_head_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 equal parts of 1: a sum in bfloat16 stops at 256."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    hidden, head = jnp.ones((1024, 1), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16)

    def total(head: jax.Array) -> jax.Array:
        values = over_tokens(lambda logits: logits[:, 0], (Model("", hidden, head),))
        return values.sum()

    gradient = jax.grad(total)(head)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32)[:, 0], [1024, 0])


def test_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """By XLA's own account: 4,096 tokens of 4,096 columns, 64 MiB for one array of logits."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 2**20)
    shapes = ((4096, 8), (4096, 8), (4096, 16), (4096, 16))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def mean(*models: jax.Array) -> jax.Array:
        return from_hidden.log_acceptance(*models).mean()

    compiled = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20


def test_nothing_is_asked_of_an_empty_batch() -> None:
    values = from_hidden.log_acceptance(HIDDEN[:0], HEAD, TEACHER[:0], TEACHER_HEAD)
    assert values.shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: from_hidden.adaptive_kl(HIDDEN, HEAD, TEACHER[:1], TEACHER_HEAD),
            "teacher_hidden must have leading shape (3, 5) as student_hidden has",
        ),
        (
            lambda: from_hidden.log_acceptance(HIDDEN, HEAD, TEACHER, TEACHER_HEAD[:7]),
            "student_head and teacher_head must have one vocabulary, but they have 11 and 7",
        ),
        (
            lambda: from_hidden.universal_logit(HIDDEN, HEAD, TEACHER[:1], TEACHER_HEAD),
            "teacher_hidden must have leading shape (3, 5) as student_hidden has, but its shape is",
        ),
        (
            lambda: from_hidden.universal_logit(
                HIDDEN, HEAD, TEACHER, TEACHER_HEAD, teacher_soft_cap=0.0
            ),
            "teacher_soft_cap must be finite and above 0, but it is 0.0",
        ),
        (
            lambda: from_hidden.taid_target(HIDDEN, HEAD, TEACHER, TEACHER_HEAD, 1.2),
            "share must lie in [0.0, 1.0], but it is 1.2",
        ),
        (
            lambda: from_hidden.jensen_shannon(HIDDEN, HEAD, TEACHER, TEACHER_HEAD, beta=0),
            "beta must lie in (0, 1), but it is 0",
        ),
        (
            lambda: from_hidden.skew_reverse_kl(HIDDEN, HEAD, TEACHER, TEACHER_HEAD, skew=1.0),
            "skew must lie in [0, 1), but it is 1.0",
        ),
        (
            lambda: from_hidden.topk_forward_kl(HIDDEN, HEAD, np.full((3, 5, 1), 11), LOGS),
            "ids must lie in [0, 11), but 11 is among them",
        ),
        (
            lambda: from_hidden.topk_forward_kl(HIDDEN, HEAD, np.zeros((3, 5, 1), int), -2 * LOGS),
            "exp(teacher_log_probs) must sum to at most 1 at each position, but a sum is 7.389",
        ),
        (
            lambda: from_hidden.topk_forward_kl(
                HIDDEN, HEAD, np.broadcast_to([0, 1], (3, 5, 2)), LOGS
            ),
            "teacher_log_probs must have the shape of ids, (3, 5, 2), but its shape is (3, 5, 1)",
        ),
        (
            lambda: from_hidden.sampled_forward_kl(HIDDEN, HEAD, np.zeros((3, 5, 1), int), LOGS[0]),
            "weights must have the shape of ids, (3, 5, 1), but its shape is (5, 1)",
        ),
        (
            lambda: from_hidden.first(HIDDEN, HEAD, np.zeros((3, 5, 1), int), LOGS),
            "teacher_probabilities must be at least 0, but -1.0 is among them",
        ),
        (
            lambda: from_hidden.first(
                HIDDEN, HEAD, np.zeros((3, 5, 2), int), np.full((3, 5, 2), 0.5)
            ),
            "ids must differ at each position, but one stands twice at (0, 0)",
        ),
        (
            lambda: from_hidden.top_k_teacher(HIDDEN, HEAD, 12),
            "k must lie in [1, 11], but it is 12",
        ),
        (
            lambda: from_hidden.sample_teacher(HIDDEN, HEAD, 0, jax.random.key(0)),
            "num_samples must lie in [1, inf], but it is 0",
        ),
        (
            lambda: from_hidden.tvd_plus_plus(
                HIDDEN, HEAD, TEACHER, TEACHER_HEAD, np.ones((3, 4), bool)
            ),
            "mask must have shape (3, 5), but its shape is (3, 4)",
        ),
    ],
)
def test_messages(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
