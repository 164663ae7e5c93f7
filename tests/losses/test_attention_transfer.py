"""Identities of attention transfer, of attention maps and of relations of tokens."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(2, 5, 4)).astype(np.float32)
TEACHER = RNG.normal(size=(2, 5, 6)).astype(np.float32)
MAPS = [
    np.array(jax.nn.softmax(RNG.normal(size=(2, heads, 3, 3)).astype(np.float32)))
    for heads in (2, 2, 4)
]
relation = functools.partial(
    jax.jit(losses.self_attention_relation, static_argnames=("num_relation_heads", "causal")),
    num_relation_heads=2,
)
attention_kl = jax.jit(losses.attention_kl, static_argnames="average_heads")
attention_mse = jax.jit(losses.attention_mse, static_argnames="average_heads")
transfer = jax.jit(losses.attention_transfer, static_argnames="power")


def test_attention_is_where_activations_are_large_whatever_their_sign_scale_and_number() -> None:
    doubled = np.concatenate([STUDENT, -STUDENT], axis=-1)
    for power in (2.0, 4.0):  # of 1e6, which would overflow
        np.testing.assert_allclose(transfer(STUDENT, 1e6 * doubled, power=power), 0, atol=1e-6)
    assert (np.asarray(transfer(STUDENT, TEACHER)) > 0.01).all()


def test_maps_of_zeros() -> None:
    zero = np.zeros_like(STUDENT)
    np.testing.assert_allclose(transfer(zero, TEACHER), 1, rtol=1e-6)
    np.testing.assert_array_equal(transfer(zero, 0 * TEACHER), 0)


@pytest.mark.parametrize("power", [1.0, 1.5, 4.0])
def test_power(power: float) -> None:
    """Half the activations are 0, as after a ReLU: their gradient is 0 and not NaN."""
    student = np.maximum(STUDENT, 0)
    run = jax.jit(jax.value_and_grad(lambda s: transfer(s, TEACHER, power=power).sum()))
    value, gradient = run(student)
    maps = [(np.abs(x) ** power).sum(-1) for x in (student, TEACHER)]
    maps = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in maps]
    np.testing.assert_allclose(value, ((maps[0] - maps[1]) ** 2).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[student == 0].any()


def test_positions_that_do_not_exist_are_as_if_cut_off() -> None:
    mask = np.arange(5) < np.array([[3], [3]])
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, 3:] = teacher[:, 3:] = np.nan
    run = jax.jit(jax.value_and_grad(lambda s: transfer(s, teacher, mask).sum()))
    value, gradient = run(student)
    expected = transfer(STUDENT[:, :3], TEACHER[:, :3])
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[:, 3:].any()


@pytest.mark.parametrize("loss", [attention_kl, attention_mse])
def test_equal_maps_and_one_value_a_query_or_a_head(loss) -> None:
    np.testing.assert_allclose(loss(MAPS[0], MAPS[0]), 0, atol=1e-6)
    np.testing.assert_allclose(loss(MAPS[0], MAPS[0][:, ::-1]), 0, atol=1e-6)  # on average
    by_head = loss(MAPS[0], MAPS[1], average_heads=False)
    assert by_head.shape == (2, 2, 3)
    single = [loss(MAPS[0][:, h : h + 1], MAPS[1][:, h : h + 1]) for h in range(2)]
    np.testing.assert_allclose(by_head, np.stack(single, axis=1), rtol=1e-6)
    assert loss(MAPS[0], MAPS[2]).shape == (2, 3)


def test_attention_kl_where_a_probability_is_0() -> None:
    """The teacher's are left out; the student's count as 1e-30 and are out of reach there."""
    teacher = np.array([[[[1.0, 0.0]]]], np.float32)
    run = jax.jit(jax.value_and_grad(lambda a: attention_kl(a, teacher).sum()))
    np.testing.assert_allclose(run(teacher)[0], 0)
    value, gradient = run(1 - teacher)
    np.testing.assert_allclose(value, -np.log(1e-30), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_queries_without_keys_do_not_spoil_the_gradient() -> None:
    """A softmax over masked keys alone is NaN on both sides; the mask of queries drops it."""
    student, teacher = MAPS[0].copy(), MAPS[1].copy()
    student[:, :, 2] = teacher[:, :, 2] = np.nan
    mask = np.array([[1, 1, 0]] * 2)

    def objective(attention: jax.Array) -> jax.Array:
        return losses.token_mean(attention_kl(attention, teacher), mask).mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(student)
    expected = np.asarray(attention_kl(MAPS[0], MAPS[1]))[:, :2].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [attention_kl, attention_mse])
def test_packed_maps_equal_unpacked(loss) -> None:
    """Blocks along the diagonal, and queries of padding whose maps are 0."""
    blocks = [np.zeros((1, 2, 8, 8), np.float32) for _ in range(2)]
    for block, maps in zip(blocks, MAPS[:2], strict=True):
        block[0, :, :3, :3], block[0, :, 3:6, 3:6] = maps
    packed = losses.token_mean(loss(*blocks), np.arange(8)[None] < 6).mean()
    np.testing.assert_allclose(packed, loss(*MAPS[:2]).mean(), rtol=1e-6)


def test_a_relation_is_attention_of_vectors_to_each_other() -> None:
    def attention(vectors: np.ndarray) -> jax.Array:
        parts = np.stack(np.split(vectors, 2, axis=-1), axis=1)
        return jax.nn.softmax(parts @ parts.swapaxes(-1, -2) / np.sqrt(parts.shape[-1]))

    by_head = attention_kl(attention(STUDENT), attention(TEACHER), average_heads=False)
    np.testing.assert_allclose(relation(STUDENT, TEACHER), by_head.mean(1), rtol=1e-5, atol=1e-6)


def test_relations_do_not_change_if_a_head_is_rotated() -> None:
    turn = np.linalg.qr(RNG.normal(size=(2, 2)))[0].astype(np.float32)
    turned = STUDENT @ np.kron(np.eye(2, dtype=np.float32), turn)
    np.testing.assert_allclose(relation(turned, STUDENT), 0, atol=1e-6)
    assert np.asarray(relation(STUDENT[..., [0, 2, 1, 3]], STUDENT)).max() > 1e-3


def test_causal_tokens_do_not_see_later_ones() -> None:
    at_2 = jax.grad(lambda s: relation(s, TEACHER, causal=True)[:, 2].sum())(STUDENT)
    np.testing.assert_array_equal(np.asarray(at_2).any(axis=(0, 2)), [1, 1, 1, 0, 0])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_relations_equal_unpacked(causal: bool) -> None:
    """Padding holds NaN: it neither counts nor gets a gradient."""
    lengths = 3, 4
    rows = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    row = np.array([[1] * 3 + [2] * 4 + [0] * 2])

    def padded(x: np.ndarray) -> np.ndarray:
        return np.where(rows[..., None] > 0, x, np.nan)

    def packed(x: jax.Array) -> jax.Array:
        pieces = [x[i, :n] for i, n in enumerate(lengths)]
        return jnp.concatenate([*pieces, jnp.full((2, x.shape[-1]), jnp.nan)])[None]

    def apart(student: jax.Array) -> jax.Array:
        values = relation(student, padded(TEACHER), rows, causal=causal)
        return losses.token_mean(values, rows > 0).mean()

    def together(student: jax.Array) -> jax.Array:
        values = relation(packed(student), packed(TEACHER), row, causal=causal)
        return losses.token_mean(values, row > 0).mean()

    value, gradient = jax.jit(jax.value_and_grad(apart))(padded(STUDENT))
    packed_value, packed_gradient = jax.jit(jax.value_and_grad(together))(padded(STUDENT))
    assert value > 0.01
    np.testing.assert_allclose(packed_value, value, rtol=1e-6)
    np.testing.assert_allclose(packed_gradient, gradient, atol=1e-6)
    assert not np.asarray(gradient)[rows == 0].any()
    alone = relation(STUDENT[:1, :3], TEACHER[:1, :3], causal=causal)
    values = relation(padded(STUDENT), padded(TEACHER), rows, causal=causal)
    np.testing.assert_allclose(values[0], [*alone[0], 0, 0], rtol=1e-6, atol=1e-6)


INVALID = [
    (
        lambda: losses.attention_transfer(STUDENT, TEACHER[:, :4]),
        "teacher_features must have the shape of student_features, (2, 5, 4), in all axes but the "
        "last, but the shape is (2, 4, 6)",
    ),
    (
        lambda: losses.attention_transfer(STUDENT[0, 0], TEACHER),
        "student_features must be floating with shape [..., P, C], but it is float32 with shape",
    ),
    (
        lambda: losses.attention_transfer(STUDENT, TEACHER, power=0.5),
        "power must lie in [1.0, inf], but it is 0.5",
    ),
    (
        lambda: losses.attention_transfer(STUDENT, TEACHER, np.ones(5)),
        "mask must have shape (2, 5), but its shape is (5,)",
    ),
    (
        lambda: losses.attention_kl(MAPS[0], MAPS[2], average_heads=False),
        "teacher_attention must have the shape of student_attention, (2, 2, 3, 3), but its shape "
        "is (2, 4, 3, 3)",
    ),
    (
        lambda: losses.attention_mse(MAPS[0], MAPS[2][..., :2]),
        "teacher_attention must have the shape of student_attention, (2, 3, 3) with heads "
        "averaged, but its shape is (2, 3, 2)",
    ),
    (
        lambda: losses.attention_kl(MAPS[0][0, 0], MAPS[1]),
        "student_attention must be floating with shape [..., H, Q, K], but it is float32 with "
        "shape (3, 3)",
    ),
    (
        lambda: losses.self_attention_relation(STUDENT, TEACHER, num_relation_heads=4),
        "num_relation_heads must divide 6, the width of teacher_vectors, but it is 4",
    ),
    (
        lambda: losses.self_attention_relation(STUDENT, TEACHER, num_relation_heads=0),
        "num_relation_heads must divide 4, the width of student_vectors, but it is 0",
    ),
    (
        lambda: relation(STUDENT, TEACHER, np.ones((2, 4), int)),
        "segment_ids must be integers with shape (2, 5), but they are int",
    ),
    (
        lambda: relation(STUDENT, TEACHER[:1]),
        "teacher_vectors must have the shape of student_vectors, (2, 5, 4), in all axes but the "
        "last, but the shape is (1, 5, 6)",
    ),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
