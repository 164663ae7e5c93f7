"""Advantages, distillation and hybrids: the identities between them, and what they refuse."""

import jax
import numpy as np
import pytest

from jaxdistill import losses
from tests.losses.test_policy import rollouts, value_and_gradient

IS_DEMO = np.array([True, False, False, True, False, False])


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_nothing(scale: str, baseline: str) -> None:
    """0.1 has no exact mean in float32; a group of it must not move the policy all the same."""
    rewards = np.array([[0.1] * 7, [1.0, 0.0] * 3 + [1.0], [1 / 3] * 7])
    found = losses.group_advantages(rewards, scale=scale, baseline=baseline, epsilon=1e-6)
    assert (np.asarray(found)[[0, 2]] == 0).all()
    assert (np.asarray(found)[1] != 0).all()
    np.testing.assert_array_equal(losses.filter_groups(rewards), [False, True, False])


def test_rloo_is_dr_grpo_scaled_up() -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    dr_grpo = losses.group_advantages(rewards, scale="none")
    rloo = losses.group_advantages(rewards, scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(rloo, dr_grpo * 5 / 4, rtol=1e-5, atol=1e-6)


def test_groups_may_have_leading_axes() -> None:
    """Continuations of plans of prompts: each row of the last axis is a group."""
    rewards = np.random.default_rng(0).normal(size=(2, 3, 4))
    flat = losses.group_advantages(rewards.reshape(6, 4))
    np.testing.assert_allclose(losses.group_advantages(rewards).reshape(6, 4), flat, rtol=1e-6)


def test_gae_without_a_critic_is_the_return_to_go() -> None:
    rewards, mask = np.array([[1.0, 2.0, 4.0]]), np.array([[1, 0, 1]])
    found = losses.gae(rewards, np.zeros((1, 3)), mask, discount=0.5, trace=1.0)
    np.testing.assert_allclose(found.advantages, [[3.0, 0.0, 4.0]])


def test_padding_does_not_change_whitened_returns() -> None:
    rewards, mask = np.array([1.0, -1.0, 0.5]), np.array([[1, 1], [1, 0], [1, 1]])
    found = losses.reinforce_plus_plus_advantages(rewards, mask)
    padded = losses.reinforce_plus_plus_advantages(rewards, np.pad(mask, ((0, 0), (3, 0))))
    np.testing.assert_allclose(np.asarray(padded)[:, 3:], found, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.group_advantages(np.ones((3, 1))), "groups of at least 2"),
        (lambda: losses.group_advantages(np.ones(4), scale="group"), "scale must be one of"),
        (lambda: losses.group_advantages(np.ones(4), baseline="min"), "baseline must be one of"),
        (lambda: losses.group_advantages(np.ones(4), epsilon=-1.0), "epsilon must lie in"),
        (lambda: losses.filter_groups(1.0), r"rewards must have shape \[..., G\]"),
        (lambda: losses.whiten(np.ones(4), np.ones(3)), r"mask must have shape \(4,\)"),
        (lambda: losses.whiten(np.ones(4), np.ones(4), epsilon=0.0), "epsilon must be finite"),
        (lambda: losses.token_rewards(np.ones(3), np.ones((2, 4))), r"rewards must have shape"),
        (
            lambda: losses.token_rewards(np.ones(2), np.ones((2, 4)), kl_weight=0.1),
            "kl must be given when kl_weight is 0.1",
        ),
        (lambda: losses.gae(*[np.ones((2, 3))] * 3, discount=1.1), "discount must lie in"),
        (lambda: losses.gae(*[np.ones((2, 3))] * 3, trace=-0.1), "trace must lie in"),
        (lambda: losses.gae(np.ones(3), np.ones(2), np.ones(3)), r"values must have shape \(3,\)"),
        (lambda: losses.overlong_penalty(np.ones(2), max_length=8, buffer=9), "buffer must lie"),
        (
            lambda: losses.on_policy_distillation(*[np.ones((2, 3))] * 4, form="kl"),
            "form must be one of",
        ),
        (
            lambda: losses.on_policy_distillation(
                *[np.ones((2, 3))] * 4, form="loss", discount=0.5
            ),
            'discount must be 0 for form "loss", but it is 0.5',
        ),
        (lambda: losses.pi_distill(*[np.ones((2, 3))] * 5, alpha=1.5), "alpha must lie in"),
        (lambda: losses.opsd(*[np.ones((2, 3))] * 5, beta=-1.0), "kl_weight must lie in"),
        (lambda: losses.policy_shaping(np.zeros(2), shaping=0.0), "shaping must be finite"),
        (lambda: losses.chord(*rollouts(), IS_DEMO, mu=1.5), "mu must lie in"),
        (
            lambda: losses.chord(*rollouts(), IS_DEMO, mu=0.5, token_weight="psi"),
            "token_weight must be one of",
        ),
        (
            lambda: losses.luffy(*rollouts(), np.ones(5), divisor=5),
            r"is_demo must have shape \(6,\) or \(6, 5\), but its shape is \(5,\)",
        ),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_pi_distill_without_information_is_one_policy() -> None:
    """Equal views: no KL, ratios of 1, and both terms have the gradient of the policy gradient."""
    log_prob, _, advantage, mask = rollouts()
    rest = advantage, mask

    def teacher_only(x: jax.Array) -> jax.Array:
        return losses.pi_distill(x, None, log_prob, *rest, alpha=1.0, beta=0.3).mean()

    def student_only(x: jax.Array) -> jax.Array:
        return losses.pi_distill(log_prob, None, x, *rest, alpha=0.0, beta=0.0).mean()

    value, gradient = value_and_gradient(losses.dapo, log_prob, None, *rest)
    for part in (teacher_only, student_only):
        np.testing.assert_allclose(part(log_prob), value, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(jax.grad(part)(log_prob), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("alpha", "silent"), [(1.0, 1), (0.0, 0)])
def test_pi_distill_trains_only_the_side_it_names(alpha: float, silent: int) -> None:
    """alpha 1 stops the student's log-probabilities, alpha 0 the teacher's."""
    teacher, student, advantage, mask = rollouts()

    def loss(teacher: jax.Array, student: jax.Array) -> jax.Array:
        return losses.pi_distill(teacher, None, student, advantage, mask, alpha=alpha).mean()

    gradients = jax.grad(loss, argnums=(0, 1))(teacher, student)
    assert not np.asarray(gradients[silent]).any()
    assert np.asarray(gradients[1 - silent])[mask].all()


def test_pi_distill_student_kl_is_imitation() -> None:
    teacher, student, _, mask = rollouts()
    nothing = np.zeros(6)

    def loss(student: jax.Array) -> jax.Array:
        return losses.pi_distill(teacher, None, student, nothing, mask, alpha=0.0, beta=1.0).mean()

    np.testing.assert_allclose(jax.grad(loss)(student), -1.0 * mask / mask.sum(), rtol=1e-6)


def test_luffy_without_demonstrations_is_dr_grpo_without_a_clip() -> None:
    arrays = rollouts()
    found = value_and_gradient(losses.luffy, *arrays, np.zeros(6, bool), divisor=5)
    expected = value_and_gradient(
        losses.policy_gradient, *arrays, clip="none", aggregation="constant", divisor=5.0
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_luffy_lifts_improbable_tokens_of_a_demonstration_most() -> None:
    log_prob, ones = np.log([[0.1, 0.5, 0.9]]), np.ones((1, 3))
    arguments = log_prob, None, np.array([1.0]), ones, np.array([True])
    _, gradient = value_and_gradient(losses.luffy, *arguments, divisor=1)
    by_probability = np.asarray(gradient)[0] / np.exp(log_prob[0])
    assert (np.diff(by_probability) > 0).all()
    np.testing.assert_allclose(by_probability, -0.1 / (np.array([0.1, 0.5, 0.9]) + 0.1) ** 2, 1e-5)


def test_hpt_gate_at_its_ends() -> None:
    """Gate -1 reinforces every rollout, and a gate of the group's size imitates every demo."""
    log_prob, old, advantage, mask = rollouts()
    arguments = log_prob, old, advantage, mask, IS_DEMO, np.array([0, 0, 0, 2, 2, 2])
    reinforced = losses.hpt(*arguments, divisor=5, gate=-1)
    rows = [x[~IS_DEMO] for x in (log_prob, old, advantage, mask)]
    expected = losses.policy_gradient(*rows, clip="none", aggregation="constant", divisor=5.0)
    np.testing.assert_allclose(reinforced.mean(), expected.mean(), rtol=1e-6)
    imitated = losses.hpt(*arguments, divisor=5, gate=2)
    sft = losses.sequence_sum(-log_prob[IS_DEMO], mask[IS_DEMO], 5.0)
    np.testing.assert_allclose(imitated.mean(), sft.mean(), rtol=1e-6)


def test_chord_at_its_ends() -> None:
    arrays = rollouts()
    log_prob, _, _, mask = arrays
    sft = losses.token_mean(-log_prob[IS_DEMO], mask[IS_DEMO]).mean()
    np.testing.assert_allclose(losses.chord(*arrays, IS_DEMO, mu=1.0).mean(), sft, rtol=1e-6)
    reinforced = losses.ppo_policy(*(x[~IS_DEMO] for x in arrays)).mean()
    np.testing.assert_allclose(losses.chord(*arrays, IS_DEMO, mu=0.0).mean(), reinforced, rtol=1e-5)


def test_chord_over_microbatches_needs_the_fraction_of_the_step() -> None:
    arrays = (*rollouts(), IS_DEMO)
    mask = arrays[3]
    whole = losses.chord(*arrays, mu=0.3).mean()
    fraction = mask[IS_DEMO].sum() / mask.sum()

    def split(demo_fraction: float | None) -> jax.Array:
        parts = [
            losses.chord(*(x[rows] for x in arrays), mu=0.3, demo_fraction=demo_fraction)
            for rows in (slice(0, 2), slice(2, 6))
        ]
        return (parts[0] + parts[1]).mean()

    np.testing.assert_allclose(split(fraction), whole, rtol=1e-5)
    assert abs(float(split(None) - whole)) > 1e-3


def test_uft_without_a_hint_is_grpo_with_a_token_mean() -> None:
    arrays = rollouts()
    found = losses.uft(*arrays, np.zeros_like(arrays[3])).mean()
    np.testing.assert_allclose(found, losses.ppo_policy(*arrays).mean(), rtol=1e-6)


def test_demonstrations_need_no_old_log_prob() -> None:
    """NaN where no policy sampled leaves value and gradient finite."""
    log_prob, old, advantage, mask = rollouts()
    old = np.where(IS_DEMO[:, None], np.float32(np.nan), old)
    arguments = old, advantage, mask, IS_DEMO
    for loss, options in ((losses.luffy, {"divisor": 5}), (losses.chord, {"mu": 0.5})):
        value, gradient = value_and_gradient(loss, log_prob, *arguments, **options)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert np.asarray(gradient)[IS_DEMO][mask[IS_DEMO]].all()


def test_hidden_form_takes_the_entropy_from_the_head() -> None:
    """A uniform head has entropy log V everywhere: the bonus is known without a forward pass."""
    hidden, head = np.ones((1, 2, 4), np.float32), np.zeros((8, 4), np.float32)
    arguments = hidden, head, np.array([[0, 7]]), None, np.zeros(1), np.ones((1, 2))
    loss = losses.from_hidden.grpo(*arguments, entropy_weight=0.5)
    np.testing.assert_allclose(loss.mean(), -0.5 * np.log(8), rtol=1e-6)


def test_hidden_form_refuses_what_neither_side_knows() -> None:
    hidden, head = np.ones((1, 2, 4), np.float32), np.zeros((8, 4), np.float32)
    arguments = hidden, head, np.array([[0, 7]]), None, np.zeros(1), np.ones((1, 2))
    with pytest.raises(TypeError, match="temprature"):
        losses.from_hidden.grpo(*arguments, temprature=2.0)


@pytest.mark.parametrize(
    ("name", "extra", "options"),
    [
        ("cispo", (), {"clip_high": 0.5}),
        ("dapo", (), {}),
        ("dr_grpo", (), {"divisor": 5.0}),
        (
            "grpo",
            (),
            {"kl_weight": 0.1, "reference_log_prob": rollouts(1)[0], "entropy_weight": 0.2},
        ),
        ("gspo", (), {"clip_low": 0.2, "clip_high": 0.3}),
        ("hpt", (IS_DEMO, np.arange(6) // 2), {"divisor": 5.0}),
        ("luffy", (IS_DEMO,), {"divisor": 5.0}),
        ("opsd", (), {"beta": 0.2}),
        ("ppo_policy", (), {}),
        ("reinforce_plus_plus", (), {}),
        ("rloo", (), {}),
        ("uft", (rollouts()[3][::-1] & ~rollouts()[3],), {"hint_weight": 0.5}),
    ],
)
def test_hidden_form_equals_log_prob_form(name: str, extra: tuple, options: dict) -> None:
    """Value, and gradient in hidden and head, at a temperature and with a padded vocabulary."""
    _, old, advantage, mask = rollouts()
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(6, 5, 3)).astype(np.float32)
    head = rng.normal(size=(8, 3)).astype(np.float32)
    labels = rng.integers(0, 7, (6, 5))
    rest = (old, *((rollouts(2)[0],) if name == "opsd" else ()), advantage, mask, *extra)
    objective, form = getattr(losses, name), getattr(losses.from_hidden, name)

    def of_hidden(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return form(hidden, head, labels, *rest, temperature=0.7, vocab_size=7, **options).mean()

    def of_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits, head_options = hidden @ head.T, {"temperature": 0.7, "vocab_size": 7}
        given = dict(options)
        if "entropy_weight" in given:
            given["entropy"] = losses.entropy(logits, **head_options)
        return objective(losses.log_probs(logits, labels, **head_options), *rest, **given).mean()

    found = jax.jit(jax.value_and_grad(of_hidden, argnums=(0, 1)))(hidden, head)
    expected = jax.jit(jax.value_and_grad(of_logits, argnums=(0, 1)))(hidden, head)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    assert any(np.asarray(x).any() for x in found[1])
