"""The policy family against TRL: the loss methods of its GRPO and RLOO trainers, same tensors.

The trainers need a model, a tokenizer and data to be built; their loss methods need only settings,
so each runs here on a bare object that holds these and hands back fixed log-probabilities.
"""

import types
from collections import defaultdict

import numpy as np
import pytest

from jaxdistill import losses

pytestmark = pytest.mark.parity

ROWS, LENGTH = 6, 5
SETTINGS = {
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "loss_type": "grpo",
    "max_completion_length": 9,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "aux_loss_enabled": False,
    "_entropy_bonus_enabled": False,
    "use_adaptive_entropy": False,
    "entropy_coef": 0.0,
    "current_gradient_accumulation_steps": 1,
    "vllm_importance_sampling_correction": False,
}
ARGUMENTS = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}


def rollouts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    log_prob = -rng.exponential(1.0, (ROWS, LENGTH))
    arrays = {
        "log_prob": log_prob,
        "old_log_prob": log_prob + rng.normal(0, 0.5, log_prob.shape),
        "advantage": rng.normal(size=ROWS),
        "mask": (np.arange(LENGTH) < np.arange(ROWS)[:, None] % LENGTH + 1).astype(float),
        "reference": -rng.exponential(1.0, (ROWS, LENGTH)),
        "entropy": rng.uniform(0, 2, (ROWS, LENGTH)),
        "weight": rng.uniform(0.5, 1.5, (ROWS, LENGTH)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def identity_accelerator() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
    )


def trl_loss(
    trainer: str, arguments: dict | None = None, rows: slice = slice(None), **settings: object
):
    """Value and gradient of a TRL trainer's loss on the rollouts, or on a microbatch of them."""
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    tensors = {name: torch.tensor(array[rows]) for name, array in rollouts().items()}
    log_prob = tensors["log_prob"].requires_grad_(True)
    scored = log_prob, tensors["entropy"], None
    bare = types.SimpleNamespace(
        **{**SETTINGS, **settings},
        args=types.SimpleNamespace(**{**ARGUMENTS, **(arguments or {})}),
        accelerator=identity_accelerator(),
        model=types.SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: scored,
    )
    mask = tensors["mask"]
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": tensors["advantage"],
        "old_per_token_logps": tensors["old_log_prob"],
        "old_logps": (tensors["old_log_prob"] * mask).sum(1),
        "ref_per_token_logps": tensors["reference"],
        "importance_sampling_ratio": tensors["weight"],
        "num_items_in_batch": mask.sum(),
    }
    loss = getattr(trl, trainer)._compute_loss(bare, None, inputs)
    loss.backward()
    return loss.detach().numpy(), log_prob.grad.numpy()


def our_loss(objective, **options: object):
    """Value and gradient of ours."""
    import jax

    arrays = rollouts()
    rest = [arrays[name] for name in ("old_log_prob", "advantage", "mask")]
    return jax.value_and_grad(lambda x: objective(x, *rest, **options).mean())(arrays["log_prob"])


def assert_equal(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def extras(*names: str) -> dict[str, np.ndarray]:
    arrays = rollouts()
    public = {"reference": "reference_log_prob"}
    return {public.get(name, name): arrays[name] for name in names}


@pytest.mark.parametrize(
    ("objective", "options", "settings"),
    [
        (losses.grpo, {}, {}),
        (losses.grpo, {"clip_high": 0.3}, {"epsilon_high": 0.3}),
        (losses.dr_grpo, {"divisor": 9}, {"loss_type": "dr_grpo"}),
        (losses.dapo, {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        (losses.dapo, {"clip_high": 0.2}, {"loss_type": "bnpo"}),
        (losses.cispo, {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
        (
            losses.gspo,
            {},
            {
                "importance_sampling_level": "sequence",
                "epsilon_low": 3e-4,
                "epsilon_high": 4e-4,
            },
        ),
    ],
    ids=["grpo", "grpo clip-higher", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"],
)
def test_objective(objective, options: dict, settings: dict) -> None:
    assert_equal(our_loss(objective, **options), trl_loss("GRPOTrainer", **settings))


@pytest.mark.parametrize(("name", "options"), [("grpo", {}), ("dr_grpo", {"divisor": 9})])
def test_kl_in_the_loss(name: str, options: dict) -> None:
    ours = our_loss(getattr(losses, name), kl_weight=0.04, **extras("reference"), **options)
    assert_equal(ours, trl_loss("GRPOTrainer", loss_type=name, beta=0.04))


def test_importance_weights_of_the_engine() -> None:
    engine = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    ours = our_loss(losses.dapo, clip_high=0.2, kl_weight=0.1, **extras("weight", "reference"))
    assert_equal(ours, trl_loss("GRPOTrainer", loss_type="dapo", beta=0.1, **engine))


def test_delta_is_the_dual_clip() -> None:
    options = {"clip": "dual", "dual_bound": 1.4, "aggregation": "sequence"}
    assert_equal(
        our_loss(losses.policy_gradient, **options), trl_loss("GRPOTrainer", {"delta": 1.4})
    )


def test_entropy_bonus_agrees_where_the_loss_is_a_token_mean() -> None:
    """TRL averages the entropy over tokens under every loss type, ours as the loss is averaged."""
    bonus = {"_entropy_bonus_enabled": True, "entropy_coef": 0.1}
    options = {"entropy_weight": 0.1, **extras("entropy")}
    ours = our_loss(losses.dapo, clip_high=0.2, **options)
    assert_equal(ours, trl_loss("GRPOTrainer", loss_type="dapo", **bonus))
    ours, theirs = our_loss(losses.grpo, **options), trl_loss("GRPOTrainer", **bonus)
    assert abs(float(ours[0] - theirs[0])) > 1e-3
    arrays = rollouts()
    plain = our_loss(losses.grpo)[0]
    over_tokens = losses.token_mean(arrays["entropy"], arrays["mask"]).mean()
    np.testing.assert_allclose(theirs[0], plain - 0.1 * over_tokens, rtol=1e-5)


def test_rloo() -> None:
    assert_equal(our_loss(losses.rloo), trl_loss("RLOOTrainer"))


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_group_advantages(scale: str) -> None:
    """TRL's three lines are inside a method that also generates; its nanstd is public."""
    torch = pytest.importorskip("torch")
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    theirs = torch.tensor(rewards)
    spread = {
        "std": nanstd(theirs, dim=1, keepdim=True) + 1e-4,
        "none": torch.tensor(1.0),
        "batch": nanstd(theirs) + 1e-4,
    }[scale]
    expected = (theirs - theirs.mean(1, keepdim=True)) / spread
    found = losses.group_advantages(rewards, scale=scale)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_mean_over_a_microbatch_is_not_the_mean_over_the_batch() -> None:
    """TRL's bnpo divides by the tokens of each microbatch, so a step of two is a mean of means."""
    arrays = [rollouts()[name] for name in ("log_prob", "old_log_prob", "advantage", "mask")]
    whole = our_loss(losses.dapo, clip_high=0.2)[0]
    halves = slice(0, 2), slice(2, 6)
    ours = [losses.dapo(*(x[rows] for x in arrays), clip_high=0.2) for rows in halves]
    np.testing.assert_allclose((ours[0] + ours[1]).mean(), whole, rtol=1e-5)
    theirs = [trl_loss("GRPOTrainer", rows=rows, loss_type="bnpo")[0] for rows in halves]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.mean(), other, rtol=1e-5)
    assert abs(float(np.mean(theirs) - whole)) > 1e-2
