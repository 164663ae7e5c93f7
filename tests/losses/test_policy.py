"""The policy gradient: what its estimators estimate, how batches add up, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses import oracle

AGGREGATIONS = {"token": {}, "sequence": {}, "constant": {"divisor": 9.0}}


def rollouts(seed: int = 0, rows: int = 6, length: int = 5) -> tuple[np.ndarray, ...]:
    """log_prob, old_log_prob, advantage and a ragged mask."""
    rng = np.random.default_rng(seed)
    log_prob = -rng.exponential(1.0, (rows, length)).astype(np.float32)
    old = log_prob + rng.normal(0, 0.4, log_prob.shape).astype(np.float32)
    mask = np.arange(length) < np.arange(rows)[:, None] % length + 1
    return log_prob, old, rng.normal(size=rows).astype(np.float32), mask


def value_and_gradient(loss, log_prob, *rest, **options):
    """The mean and its gradient in log_prob."""
    return jax.value_and_grad(lambda x: loss(x, *rest, **options).mean())(log_prob)


def expected_gradient(loss, logits: np.ndarray) -> np.ndarray:
    """The gradient in the logits of a loss of sampled log-probs, averaged over all samples."""

    def average(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(log_p)) * loss(log_p)).sum()

    return np.asarray(jax.grad(average)(jnp.asarray(logits, jnp.float32)))


def kl_gradient(logits: np.ndarray, reference: np.ndarray, reverse: bool) -> np.ndarray:
    """Finite differences of KL(policy || reference), or the other way round, in float64."""

    def kl(logits: np.ndarray) -> float:
        log_p, log_q = oracle.log_softmax(logits), oracle.log_softmax(reference)
        if reverse:
            log_p, log_q = log_q, log_p
        return float((np.exp(log_p) * (log_p - log_q)).sum())

    return oracle.gradient(kl, [logits], 0)


@pytest.fixture
def two_distributions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=6), rng.normal(size=6)


@pytest.mark.parametrize(("kind", "reverse"), [("k1", None), ("k2", False), ("k3", True)])
def test_gradient_of_each_kl_estimator(two_distributions, kind, reverse) -> None:
    logits, reference = two_distributions
    log_q = oracle.log_softmax(reference)
    found = expected_gradient(lambda x: losses.kl_estimate(x, log_q, kind=kind), logits)
    expected = np.zeros(6) if reverse is None else kl_gradient(logits, reference, reverse)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_value_of_each_kl_estimator(two_distributions, kind, unbiased) -> None:
    log_p, log_q = (oracle.log_softmax(x) for x in two_distributions)
    average = (np.exp(log_p) * np.asarray(losses.kl_estimate(log_p, log_q, kind=kind))).sum()
    exact = (np.exp(log_p) * (log_p - log_q)).sum()
    assert (abs(average - exact) < 1e-6) == unbiased


def test_straight_through_has_the_gradient_that_is_named(two_distributions) -> None:
    logits, reference = two_distributions
    log_q = oracle.log_softmax(reference)

    def estimate(x: jax.Array) -> jax.Array:
        return losses.kl_estimate(x, log_q, kind="k3", gradient="k2")

    expected = kl_gradient(logits, reference, reverse=False)
    np.testing.assert_allclose(expected_gradient(estimate, logits), expected, atol=2e-6)


@pytest.mark.parametrize("form", ["advantage", "loss"])
def test_on_policy_distillation_estimates_reverse_kl(two_distributions, form) -> None:
    logits, teacher = two_distributions
    log_q = oracle.log_softmax(teacher)[:, None].astype(np.float32)

    def distil(log_p: jax.Array) -> jax.Array:
        def one(x: jax.Array, q: jax.Array) -> jax.Array:
            loss = losses.on_policy_distillation(x[None], None, q[None], np.ones((1, 1)), form=form)
            return loss.mean()

        return jax.vmap(one)(log_p[:, None], log_q)

    expected = kl_gradient(logits, teacher, reverse=False)
    np.testing.assert_allclose(expected_gradient(distil, logits), expected, atol=2e-6)
    student, teacher = jnp.asarray(logits, jnp.float32), jnp.asarray(teacher, jnp.float32)
    exact = jax.grad(lambda x: losses.reverse_kl(x, teacher))(student)
    np.testing.assert_allclose(expected_gradient(distil, logits), exact, atol=2e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_microbatches_add_up_and_their_means_do_not(aggregation: str) -> None:
    """1 + 2 tokens against 3 + 4 + 5 + 1: ragged, as microbatches are."""
    arrays = rollouts()
    options = {"aggregation": aggregation, **AGGREGATIONS[aggregation]}
    whole = losses.policy_gradient(*arrays, **options)
    parts = [
        losses.policy_gradient(*(x[rows] for x in arrays), **options)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    np.testing.assert_allclose((parts[0] + parts[1]).mean(), whole.mean(), rtol=1e-6)
    mean_of_means = (parts[0].mean() + parts[1].mean()) / 2
    assert abs(float(mean_of_means - whole.mean())) > 1e-2


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_product"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_unpacked(ratio: str, aggregation: str) -> None:
    """Two sequences a row, with padding after them, are the four of one a row."""
    log_prob, old, advantage, mask = rollouts(rows=4)
    options = {"ratio": ratio, "aggregation": aggregation, **AGGREGATIONS[aggregation]}
    expected = losses.policy_gradient(log_prob, old, advantage, mask, **options)

    def pack(x: np.ndarray) -> np.ndarray:
        return np.pad(x.reshape(2, 10), ((0, 0), (0, 3)))

    packed = losses.policy_gradient(
        pack(log_prob),
        pack(old),
        pack(np.repeat(advantage[:, None], 5, axis=1)),
        pack(mask),
        segment_ids=pack(np.repeat([[1], [2], [1], [2]], 5, axis=1)),
        **options,
    )
    np.testing.assert_allclose(packed.sum, expected.sum, rtol=1e-5)
    np.testing.assert_allclose(packed.weight, expected.weight)


def test_segments_must_be_said_to_matter() -> None:
    """Without segment ids two sequences in a row share one ratio: another loss."""
    log_prob, old, _, _ = rollouts(rows=2)
    row = [x.reshape(1, 10) for x in (log_prob, old)]
    advantage, mask = np.repeat([[1.0, -1.0]], 5, axis=1).reshape(1, 10), np.ones((1, 10))
    ids = np.repeat([[1, 2]], 5, axis=1).reshape(1, 10)
    one = losses.gspo(*row, advantage, mask).mean()
    two = losses.gspo(*row, advantage, mask, segment_ids=ids).mean()
    assert abs(float(one - two)) > 1e-3


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_nothing_off_the_mask_matters(rubbish: float, ratio: str) -> None:
    log_prob, old, advantage, mask = rollouts()
    extras = [np.ones_like(log_prob) for _ in range(3)]

    def run(log_prob: np.ndarray, old: np.ndarray, reference, entropy, weight):
        return value_and_gradient(
            losses.policy_gradient,
            log_prob,
            old,
            advantage,
            mask,
            ratio=ratio,
            reference_log_prob=reference,
            kl_weight=0.1,
            entropy=entropy,
            entropy_weight=0.1,
            weight=weight,
        )

    value, gradient = run(log_prob, old, *extras)
    dirty = [np.where(mask, x, np.float32(rubbish)) for x in (log_prob, old, *extras)]
    dirty_value, dirty_gradient = run(*dirty)
    np.testing.assert_allclose(dirty_value, value, rtol=1e-6)
    np.testing.assert_allclose(dirty_gradient, gradient, rtol=1e-6)
    assert not np.asarray(gradient)[~mask].any()


def test_a_clip_silences_tokens_and_cispo_does_not() -> None:
    log_prob, old = np.log([[0.9, 0.5, 0.1]]), np.log([[0.5, 0.5, 0.5]])
    arguments = log_prob, old, np.array([1.0]), np.ones((1, 3))
    _, clipped = value_and_gradient(losses.dapo, *arguments)
    np.testing.assert_array_equal(np.asarray(clipped)[0] != 0, [False, True, True])
    _, weighted = value_and_gradient(losses.cispo, *arguments)
    assert (np.asarray(weighted) != 0).all()


def test_dual_clip_bounds_what_a_negative_advantage_costs() -> None:
    log_prob, old = np.log([[0.9]]), np.log([[0.01]])
    arguments = log_prob, old, np.array([-1.0]), np.ones((1, 1))
    np.testing.assert_allclose(losses.policy_gradient(*arguments).mean(), 90, rtol=1e-5)
    value, gradient = value_and_gradient(losses.policy_gradient, *arguments, clip="dual")
    assert (float(value), float(gradient[0, 0])) == (3.0, 0.0)


def test_one_update_a_rollout_is_reinforce() -> None:
    log_prob, _, advantage, mask = rollouts()
    _, gradient = value_and_gradient(losses.dapo, log_prob, None, advantage, mask)
    np.testing.assert_allclose(gradient, -advantage[:, None] * mask / mask.sum(), rtol=1e-6)
    _, same = value_and_gradient(losses.dapo, log_prob, log_prob, advantage, mask)
    np.testing.assert_array_equal(gradient, same)


def test_sum_and_weight_over_devices_is_the_whole_batch() -> None:
    arrays = rollouts(rows=8)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def summed(*local: jax.Array) -> losses.Weighted:
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), losses.dapo(*local))

    sharded = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=(rows,) * 4, out_specs=whole))
    np.testing.assert_allclose(
        sharded(*arrays).mean(), losses.dapo(*arrays).mean(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "tokens"}, 'ratio must be one of "token", "sequence", "sequence_product"'),
        ({"clip": "ppo"}, "clip must be one of"),
        ({"aggregation": "mean"}, "aggregation must be one of"),
        ({"clip_low": 1.5}, r"clip_low must lie in \[0.0, 1.0\], but it is 1.5"),
        (
            {"clip_high": 0.3},
            'clip_high must be None or 0.2, as clip_low, when clip is "symmetric"',
        ),
        ({"clip": "dual", "dual_bound": 1.1}, "dual_bound must lie in"),
        ({"aggregation": "constant"}, "divisor must be given"),
        ({"divisor": 5.0}, "divisor must be given"),
        ({"aggregation": "constant", "divisor": 0.0}, "divisor must be finite and above 0"),
        ({"kl_weight": 0.1}, "reference_log_prob must be given when kl_weight is 0.1"),
        ({"kl_weight": -0.1}, "kl_weight must lie in"),
        ({"entropy_weight": 0.1}, "entropy must be given when entropy_weight is 0.1"),
        ({"weight": np.ones(6)}, r"weight must have shape \(6, 5\), but its shape is \(6,\)"),
        ({"segment_ids": np.ones((6, 5), int)}, r"advantage must have shape \(6, 5\), but"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.policy_gradient(*rollouts(), **options)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (), "log_prob must have shape"),
        (1, (6, 4), r"old_log_prob must have shape \(6, 5\), but its shape is \(6, 4\)"),
        (2, (5,), r"advantage must have shape \(6,\) or \(6, 5\), but its shape is \(5,\)"),
        (3, (6,), r"mask must have shape \(6, 5\), but its shape is \(6,\)"),
    ],
)
def test_refuses_shapes(position: int, shape: tuple[int, ...], message: str) -> None:
    arrays = list(rollouts())
    arrays[position] = np.ones(shape)
    with pytest.raises(ValueError, match=message):
        losses.policy_gradient(*arrays)


def test_refuses_other_names() -> None:
    x, mask = np.zeros((2, 3)), np.ones((2, 3))
    with pytest.raises(ValueError, match='kind must be one of "k1", "k2", "k3", but it is'):
        losses.kl_estimate(x, x, kind="k4")
    with pytest.raises(ValueError, match="gradient must be one of"):
        losses.kl_estimate(x, x, gradient="none")
    with pytest.raises(ValueError, match="level must be one of"):
        losses.importance_weights(x, x, mask, level="row")
    with pytest.raises(ValueError, match="mode must be one of"):
        losses.importance_weights(x, x, mask, mode="clip")
    with pytest.raises(ValueError, match=r"floor must lie in \[0.0, 2.0\]"):
        losses.importance_weights(x, x, mask, floor=3.0)
    with pytest.raises(ValueError, match="weight must lie in"):
        losses.entropy_bonus(x, weight=-1.0)
    with pytest.raises(ValueError, match="clip must be finite and above 0"):
        losses.ppo_value(x, x, x, mask, clip=0.0)
