"""Identities of the supervised fine-tuning family, its randomness, and what it refuses."""

import functools

import jax
import numpy as np
import pytest
from jaxdistill.kernels import tiles

from jaxdistill import losses
from jaxdistill.losses import from_hidden
from tests.losses.oracle import log_softmax, pick, softmax

RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=(6, 7)) * 2).astype(np.float32)
REFERENCE = (RNG.normal(size=(6, 7)) * 2).astype(np.float32)
LABELS = RNG.integers(0, 7, 6)
KEY = jax.random.key(0)


def test_masked_thought_replaces_its_share_of_the_solution_alone() -> None:
    tokens = RNG.integers(0, 50, (40, 500))
    mask = RNG.random(tokens.shape) < 0.5
    found = np.asarray(losses.mask_thought(tokens, mask, KEY, rate=0.3, mask_id=50))
    np.testing.assert_array_equal(found[~mask], tokens[~mask])
    replaced = found[mask] == 50
    np.testing.assert_array_equal(found[mask][~replaced], tokens[mask][~replaced])
    assert abs(replaced.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / mask.sum())


def test_masked_thought_by_random_tokens_is_uniform() -> None:
    tokens = np.full((100, 200), 3)
    found = losses.mask_thought(tokens, tokens, KEY, rate=1.0, vocab_size=8)
    share = np.bincount(np.asarray(found).ravel(), minlength=8) / tokens.size
    np.testing.assert_allclose(share, 1 / 8, atol=5 * np.sqrt(7 / 64 / tokens.size))


def test_masked_thought_is_a_function_of_its_key_and_of_a_traced_rate() -> None:
    tokens = RNG.integers(0, 50, (4, 50))

    @jax.jit
    def corrupt(key: jax.Array, step: int) -> jax.Array:
        rate = losses.linear_ramp(step, total_steps=10, peak=0.4)
        return losses.mask_thought(tokens, np.ones_like(tokens), key, rate=rate, mask_id=50)

    np.testing.assert_array_equal(corrupt(KEY, 0), tokens)
    np.testing.assert_array_equal(corrupt(KEY, 9), corrupt(KEY, 9))
    assert (corrupt(KEY, 9) != corrupt(jax.random.key(1), 9)).any()
    assert corrupt(KEY, 9).dtype == losses.shift(tokens).labels.dtype


def test_dft_has_the_gradient_of_minus_p() -> None:
    gradient = jax.grad(lambda x: losses.dft(x, LABELS).sum())(LOGITS)
    p = softmax(LOGITS.astype(np.float64))
    expected = pick(p, LABELS)[:, None] * (p - np.eye(7)[LABELS])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_dft_raises_improbable_tokens_which_undetached_weights_would_lower() -> None:
    """-p log p differentiated through p has the wrong sign below 1/e."""
    logits, label = np.array([[0.0, 3.0]], np.float32), np.array([0])
    assert jax.grad(lambda x: losses.dft(x, label).sum())(logits)[0, 0] < 0

    def undetached(x: jax.Array) -> jax.Array:
        log_prob = losses.log_probs(x, label)
        return -(jax.numpy.exp(log_prob) * log_prob).sum()

    assert jax.grad(undetached)(logits)[0, 0] > 0


def test_a_label_without_probability_counts_for_nothing_in_dft() -> None:
    logits = np.array([[0.0, -np.inf, 1.0]], np.float32)
    value, gradient = jax.value_and_grad(lambda x: losses.dft(x, np.array([1])).sum())(logits)
    assert value == 0
    assert not np.asarray(gradient).any()


def test_asft_is_dft_at_weight_zero_and_at_the_start() -> None:
    dft = losses.dft(LOGITS, LABELS)
    np.testing.assert_allclose(losses.asft(LOGITS, REFERENCE, LABELS, kl_weight=0.0), dft)
    np.testing.assert_allclose(losses.asft(LOGITS, LOGITS, LABELS, kl_weight=9.0), dft, atol=1e-5)


def test_rollout_without_reward_of_wrong_tokens_is_dft() -> None:
    found = losses.one_token_rollout(LOGITS, LABELS, temperature=1.0, wrong_reward=0.0)
    np.testing.assert_allclose(found, losses.dft(LOGITS, LABELS), rtol=1e-5)


def test_sampled_rollout_is_exact_on_average() -> None:
    """Value and gradient over many keys; a position's rewards are its own."""

    def total(logits: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        values = losses.one_token_rollout(logits, LABELS, key=key, num_samples=16)
        return values.sum(), values

    run = jax.grad(total, has_aux=True)
    keys = jax.random.split(KEY, 3000)
    sampled = jax.jit(jax.vmap(run, in_axes=(None, 0)))(LOGITS, keys)
    exact = run(LOGITS, None)
    for found, expected in zip(sampled, exact, strict=True):
        found = np.asarray(found, np.float64)
        error = found.std(0) / np.sqrt(len(keys))
        assert (np.abs(found.mean(0) - expected) < 5 * error + 1e-6).all()
        assert error.max() > 0


def test_samples_never_meet_a_token_without_probability() -> None:
    logits = LOGITS.copy()
    logits[:, [0, 3, 6]] = -np.inf
    labels = np.full(6, 1)
    found = losses.one_token_rollout(logits, labels, key=KEY, num_samples=2000)
    kept = losses.one_token_rollout(logits[:, [1, 2, 4, 5]], labels - 1)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, kept, atol=0.1)


def test_curio_turns_where_the_student_is_one_nat_surer_than_its_teacher() -> None:
    """The gradient in log p_label is -(1 - (l - q)); q is made from a teacher at the low clamp."""
    label = np.array([0])
    slope = jax.jit(jax.grad(lambda x, teacher: losses.curio_sft(x, teacher, label).sum()))
    for vocab_size, probability, sign in ((2, 0.999, -1), (8, 0.32, -1), (8, 0.36, 1)):
        teacher = np.zeros((1, vocab_size), np.float32)  # q = -log V: flips at p = e / V
        others = [(1 - probability) / (vocab_size - 1)] * (vocab_size - 1)
        logits = np.log(np.array([[probability, *others]], np.float32))
        assert np.sign(slope(logits, teacher)[0, 0]) == sign


def test_curio_without_distillation_is_cross_entropy() -> None:
    found = losses.curio_sft(LOGITS, REFERENCE, LABELS, distillation_weight=0.0)
    np.testing.assert_allclose(found, losses.cross_entropy(LOGITS, LABELS), rtol=1e-6)


def test_curio_holds_a_certain_teacher_at_the_lowest_temperature() -> None:
    teacher = np.array([[8.0, 0.0, 0.0]], np.float32)
    assert losses.entropy(teacher)[0] < 0.03
    found = losses.curio_sft(teacher, teacher, np.array([1]), entropy_gain=9.0)
    score, of_teacher = (
        pick(log_softmax(teacher.astype(np.float64) / t), np.array([1])) for t in (1.0, 1.1)
    )
    np.testing.assert_allclose(found, -score + 0.5 * (score - of_teacher) ** 2, rtol=1e-5)


def test_temperature_hits_the_entropy_or_ends_at_a_bound() -> None:
    for target in (1.2, 1.37):
        wanted = losses.entropy(LOGITS / target)
        found = losses.temperature_for_entropy(LOGITS, wanted)
        np.testing.assert_allclose(found, target, atol=1e-4)
    low = losses.temperature_for_entropy(LOGITS, np.zeros(6))
    high = losses.temperature_for_entropy(LOGITS, np.full(6, 9.0))
    np.testing.assert_allclose(low, 1.1, atol=1e-6)
    np.testing.assert_allclose(high, 1.5, atol=1e-6)


def test_entropy_of_the_most_probable_tokens_is_too_low() -> None:
    """The authors' 512 of the vocabulary: all of it where it is smaller, else a higher t."""
    target = losses.entropy(LOGITS / 1.3)
    full = losses.temperature_for_entropy(LOGITS, target)
    np.testing.assert_array_equal(
        losses.temperature_for_entropy(LOGITS, target, top_k=512),
        losses.temperature_for_entropy(LOGITS, target, top_k=7),
    )
    np.testing.assert_allclose(
        losses.temperature_for_entropy(LOGITS, target, top_k=512), full, atol=1e-5
    )
    assert (losses.temperature_for_entropy(LOGITS, target, top_k=3) > full + 1e-3).all()


def test_key_tokens_of_a_call_worked_by_hand() -> None:
    """12 tokens: 2 keys, 2 ends of values, 7 others, 1 of the prompt; w = 7 / 2."""
    mask = np.array([[0] + [1] * 11])
    key = np.array([[1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])  # the first is no target
    end = np.array([[0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]])
    weights = losses.key_token_weights(key, mask, value_end_mask=end)
    np.testing.assert_allclose(weights, [[0, 3.5, 1, 3.5, 1, 1, 1, 1, 1, 1, 1, 1]])
    values = RNG.random((1, 12))
    expected = (3.5 * values[0, [1, 3]].sum() + values[0, [2, *range(4, 12)]].sum()) / (7 + 2 + 7)
    found = losses.sequence_mean(values, weights).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 8.0, 40.0, 1e4])
def test_unlikelihood_holds_where_p_rounds_to_one(gap: float) -> None:
    """-log(1 - p) is the gap, and the gradient in its logit is p: 1, not 0."""
    logits, label = np.array([[gap, 0.0]], np.float32), np.array([0])
    run = jax.jit(jax.value_and_grad(lambda x: losses.unlikelihood(x, label).sum()))
    value, gradient = run(logits)
    np.testing.assert_allclose(value, np.logaddexp(0, gap), rtol=1e-6)
    p = 1 / (1 + np.exp(-gap))
    np.testing.assert_allclose(gradient, [[p, -p]], rtol=1e-6)


def test_rollout_from_hidden_without_reward_of_wrong_tokens_is_dft() -> None:
    head = np.eye(7, dtype=np.float32)
    options = {"temperature": 1.0, "wrong_reward": 0.0}
    found = from_hidden.one_token_rollout(LOGITS, head, LABELS, **options)
    np.testing.assert_allclose(found, losses.dft(LOGITS, LABELS), rtol=1e-5)


def test_sampled_rollout_from_hidden_is_that_of_the_logits(monkeypatch) -> None:
    """The same samples in tiles of four of the six tokens: value and gradient."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 7 * 4)
    hidden, head = RNG.normal(size=(6, 3)).astype(np.float32), RNG.normal(size=(7, 3))
    head = head.astype(np.float32)

    def run(loss) -> tuple:
        return jax.value_and_grad(lambda *x: loss(*x).sum(), argnums=(0, 1))(hidden, head)

    tiled = run(lambda *x: from_hidden.one_token_rollout(*x, LABELS, key=KEY, num_samples=8))
    full = run(lambda h, w: losses.one_token_rollout(h @ w.T, LABELS, key=KEY, num_samples=8))
    for mine, expected in zip(jax.tree.leaves(tiled), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_unlikelihood_from_hidden_of_a_sure_token() -> None:
    """Where 1 - p is below what log p can tell, as in the logits form: 30 nats, gradient 1."""
    hidden, head = np.array([[30.0]], np.float32), np.array([[1.0], [0.0]], np.float32)
    value, gradient = jax.value_and_grad(
        lambda hidden: from_hidden.unlikelihood(hidden, head, np.array([0])).sum()
    )(hidden)
    np.testing.assert_allclose(value, 30, rtol=1e-6)
    np.testing.assert_allclose(gradient, 1, rtol=1e-6)


def test_tiles_have_one_implementation() -> None:
    head = np.eye(7, dtype=np.float32)
    for loss in (
        functools.partial(from_hidden.cross_entropy, label_smoothing=0.1),
        functools.partial(from_hidden.one_token_rollout, key=KEY),
    ):
        with pytest.raises(ValueError, match="implementation must be 'auto' for a loss over tiles"):
            loss(LOGITS, head, LABELS, implementation="xla")


@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_curio_from_hidden_in_tiles_that_do_not_divide_the_tokens(monkeypatch, layout) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 7 * 4)  # four of the six tokens
    hidden, head = RNG.normal(size=(2, 6, 3)), RNG.normal(size=(2, 9, 3))
    logits = (hidden @ head.swapaxes(1, 2))[..., :7]
    heads = head if layout == "vd" else head.swapaxes(1, 2)
    run = functools.partial(from_hidden.curio_sft, vocab_size=7, head_layout=layout)
    found = jax.jit(run)(hidden[0], heads[0], hidden[1], heads[1], LABELS)
    np.testing.assert_allclose(found, losses.curio_sft(*logits, LABELS), rtol=1e-5)


def test_curio_from_hidden_never_holds_the_logits(monkeypatch) -> None:
    tokens, vocab_size = 1024, 2048
    monkeypatch.setattr(tiles, "TILE_BYTES", 2**16)
    hidden, head = np.ones((tokens, 4), np.float32), np.ones((vocab_size, 4), np.float32)
    labels = np.zeros(tokens, int)

    def total(hidden: jax.Array, teacher: jax.Array) -> jax.Array:
        return from_hidden.curio_sft(hidden, head, teacher, head, labels).sum()

    compiled = jax.jit(jax.grad(total)).lower(hidden, hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab_size * 4 / 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.mask_thought(LABELS, LABELS, KEY, rate=1.1, mask_id=1), "rate must lie"),
        (lambda: losses.mask_thought(LABELS, LABELS, KEY, rate=0.1), "exactly one of mask_id"),
        (
            lambda: losses.mask_thought(LABELS, LABELS[:2], KEY, rate=0.1, mask_id=1),
            r"mask must have shape \(6,\)",
        ),
        (
            lambda: losses.mask_thought(LOGITS, LOGITS, KEY, rate=0.1, mask_id=1),
            "tokens must be integers",
        ),
        (lambda: losses.linear_ramp(1, total_steps=0, peak=0.1), "total_steps must be finite"),
        (lambda: losses.linear_ramp(1, total_steps=9, peak=2.0), "peak must lie in"),
        (lambda: losses.dft(LOGITS, LABELS + 7), r"labels must lie in \[0, 7\)"),
        (lambda: losses.asft(LOGITS, REFERENCE, LABELS, kl_weight=-1), "kl_weight must lie in"),
        (lambda: losses.asft(LOGITS, REFERENCE[:, :4], LABELS), "teacher_logits must have"),
        (lambda: losses.one_token_rollout(LOGITS, LABELS, wrong_reward=2), "wrong_reward must lie"),
        (lambda: losses.one_token_rollout(LOGITS, LABELS, num_samples=0), "num_samples must lie"),
        (lambda: losses.one_token_rollout(LOGITS, LABELS, temperature=0), "temperature must be"),
        (
            lambda: losses.temperature_for_entropy(LOGITS, LABELS, min_temperature=2.0),
            "min_temperature must be at most max_temperature 1.5",
        ),
        (lambda: losses.temperature_for_entropy(LOGITS, LABELS, top_k=0), "top_k must lie in"),
        (lambda: losses.temperature_for_entropy(LOGITS, 1.0), "target_entropy must have shape"),
        (lambda: losses.curio_sft(LOGITS, REFERENCE, LABELS, entropy_gain=-1), "entropy_gain must"),
        (
            lambda: losses.curio_sft(LOGITS, REFERENCE[:, :5], LABELS),
            "teacher_logits must have the",
        ),
        (
            lambda: from_hidden.curio_sft(LOGITS, LOGITS, LOGITS, LOGITS[:, :4], LABELS % 6),
            "teacher_head of layout 'vd' must have width 7",
        ),
        (
            lambda: from_hidden.one_token_rollout(LOGITS, LOGITS, LABELS % 6, wrong_reward=2.0),
            "wrong_reward must lie",
        ),
        (lambda: losses.key_token_weights(1, 1), r"mask must have shape \[..., T\]"),
        (lambda: losses.key_token_weights(LABELS[:2], LABELS), "key_mask must have shape"),
        (lambda: losses.key_token_weights(LABELS, LABELS, max_weight=0.5), "max_weight must lie"),
        (lambda: losses.unlikelihood(LOGITS, LABELS, vocab_size=1), "labels must lie|at least 2"),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        losses.dft,
        lambda logits, labels: losses.asft(logits, REFERENCE, labels),
        losses.one_token_rollout,
        functools.partial(losses.one_token_rollout, key=KEY),
        lambda logits, labels: losses.curio_sft(logits, REFERENCE, labels),
        losses.unlikelihood,
    ],
)
def test_label_out_of_range_is_removed_by_a_mask(loss) -> None:
    """Under jit it gives NaN at its place; masked, neither value nor gradient knows of it."""
    labels, mask = LABELS.copy(), np.ones(LABELS.shape)
    labels[1], mask[1] = -100, 0

    @jax.jit
    def run(logits: jax.Array, labels: jax.Array) -> tuple:
        def mean(logits: jax.Array) -> tuple:
            values = loss(logits, labels)
            return losses.token_mean(values, mask).mean(), values

        return jax.value_and_grad(mean, has_aux=True)(logits)

    (mean, values), gradient = run(LOGITS, labels)
    np.testing.assert_array_equal(np.isnan(values), mask == 0)
    assert np.isfinite(mean)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[1].any()
