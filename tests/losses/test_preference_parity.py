"""The preference objectives against TRL's, by running its loss methods on given log-probabilities.

TRL computes its losses inside trainer methods. They are called here on the smallest stand-in for a
trainer and for a model's output that lets them run.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

# TRL and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PAIRS, LENGTH = 5, 7


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def accelerator(torch):
    same = lambda x: x  # noqa: E731 - one process has nothing to gather
    return types.SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
    )


def batch(seed: int = 0):
    """Per-token log-probabilities of policy and reference, chosen before rejected, and a mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (2 * PAIRS, 1))
    policy, reference = (-rng.exponential(1.5, mask.shape) * mask for _ in range(2))
    return policy.astype(np.float32), reference.astype(np.float32), mask


def halves(values: np.ndarray) -> list[np.ndarray]:
    return [values[:PAIRS], values[PAIRS:]]


def head_output(torch, per_token):
    """What TRL's fused head returns; only log_probs enters the loss, the rest is logged."""
    zeros = torch.zeros_like(per_token)
    return types.SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def stand_in(torch, reference, **settings):
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        ref_model=lambda **_: head_output(torch, torch.tensor(reference)),
        accelerator=accelerator(torch),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.__dict__.update(settings)
    return trainer


def model_inputs(torch, mask):
    """Tokens with one prompt token in front, as the losses expect them."""
    completion = torch.tensor(np.pad(mask, ((0, 0), (1, 0))).astype(np.int64))
    ids = torch.zeros_like(completion)
    return {"input_ids": ids, "attention_mask": completion, "completion_mask": completion}


def trl_dpo(trl, torch, policy, reference, mask, loss_type, label_smoothing):
    """TRL's mean loss and its gradient in the per-token log-probabilities."""
    trainer = stand_in(
        torch,
        reference,
        beta=0.1,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    sums = torch.tensor(reference.sum(1))
    inputs = model_inputs(torch, mask)
    inputs |= {"ref_chosen_logps": sums[:PAIRS], "ref_rejected_logps": sums[PAIRS:]}
    tokens = torch.tensor(policy, requires_grad=True)
    model = lambda **_: head_output(torch, tokens)  # noqa: E731
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return loss.item(), tokens.grad.numpy() * mask


def ours_dpo(policy, reference, mask, lengths, **options):
    if lengths:
        chosen, rejected = halves(mask.sum(1))
        options |= {"chosen_length": chosen, "rejected_length": rejected}

    def mean(tokens):
        sums = losses.sequence_log_prob(tokens, mask)
        frozen = losses.sequence_log_prob(reference, mask)
        return jnp.mean(losses.dpo(*halves(sums), *halves(frozen), **options))

    return jax.value_and_grad(mean)(policy)


@pytest.mark.parametrize(
    ("loss_type", "variant", "label_smoothing", "lengths"),
    [
        ("sigmoid", "sigmoid", 0.0, False),
        ("sigmoid_norm", "sigmoid", 0.0, True),
        ("hinge", "hinge", 0.0, False),
        ("ipo", "ipo", 0.0, True),
        ("robust", "robust", 0.1, False),
        ("exo_pair", "exo", 0.1, False),
        ("nca_pair", "nca", 0.0, False),
        ("bco_pair", "bco", 0.0, False),
        ("sppo_hard", "sppo", 0.0, False),
        ("aot", "aot", 0.1, False),
        ("aot_unpaired", "aot_unpaired", 0.1, False),
        ("apo_zero", "apo_zero", 0.0, False),
        ("apo_down", "apo_down", 0.0, False),
        ("discopop", "discopop", 0.0, False),
    ],
)
def test_dpo_variant(trl, torch, loss_type, variant, label_smoothing, lengths) -> None:
    data = batch()
    expected, expected_gradient = trl_dpo(trl, torch, *data, loss_type, label_smoothing)
    value, gradient = ours_dpo(*data, lengths, variant=variant, label_smoothing=label_smoothing)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_trl_ignores_label_smoothing_in_its_sigmoid_loss(trl, torch) -> None:
    """A peer's surprise: only its robust, exo and aot losses read it. Ours is cDPO."""
    data = batch()
    plain, _ = trl_dpo(trl, torch, *data, "sigmoid", 0.0)
    assert trl_dpo(trl, torch, *data, "sigmoid", 0.3)[0] == plain
    assert abs(ours_dpo(*data, False, label_smoothing=0.3)[0] - plain) > 1e-3


def test_trl_discopop_is_nan_at_extreme_margins(trl, torch) -> None:
    policy, reference, mask = batch()
    policy[:PAIRS] *= 1000.0
    assert np.isnan(trl_dpo(trl, torch, policy, reference, mask, "discopop", 0.0)[0])
    value, gradient = ours_dpo(policy, reference, mask, False, variant="discopop")
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_rpo_is_trl_sigmoid_and_sft_but_for_the_token_mean(trl, torch) -> None:
    """Equal where all chosen answers are as long; where not, TRL lets the long ones weigh more."""
    policy, reference, mask = batch()
    for same_length in (True, False):
        if same_length:
            mask[:PAIRS] = True
        else:
            policy, reference, mask = batch()
        parts = [
            trl_dpo(trl, torch, policy, reference, mask, name, 0.0)[0]
            for name in ("sigmoid", "sft")
        ]
        sums = [halves((x * mask).sum(1)) for x in (policy, reference)]
        value = jnp.mean(losses.rpo(*sums[0], *sums[1], mask[:PAIRS].sum(1)))
        if same_length:
            np.testing.assert_allclose(value, sum(parts), rtol=1e-5)
        else:
            assert abs(value - sum(parts)) > 1e-2


@pytest.mark.parametrize(("loss_type", "mean_kl"), [("kto", 0.8), ("kto", -0.8), ("apo", 0.8)])
def test_kto(trl, torch, loss_type, mean_kl) -> None:
    policy, reference, mask = batch()
    desirable = np.arange(2 * PAIRS) % 3 != 0
    kl = np.linspace(-1, 1, 2 * PAIRS, dtype=np.float32) + np.float32(mean_kl)
    trainer = stand_in(
        torch,
        reference,
        beta=0.1,
        loss_type={"kto": "kto", "apo": "apo_zero_unpaired"}[loss_type],
        calculate_KL=loss_type == "kto",
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: torch.tensor(kl),
    )
    inputs = model_inputs(torch, mask)
    inputs |= {
        "label": torch.tensor(desirable),
        "ref_logps": torch.tensor(reference.sum(1)),
        "ref_KL_logps": torch.zeros(2 * PAIRS),
    }
    tokens = torch.tensor(policy, requires_grad=True)
    model = lambda **_: head_output(torch, tokens)  # noqa: E731
    expected = trl.KTOTrainer._compute_loss(trainer, model, inputs, False)
    expected.backward()

    def mean(tokens):
        point = kl.mean() if loss_type == "kto" else 0.0
        sums = losses.sequence_log_prob(tokens, mask), losses.sequence_log_prob(reference, mask)
        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
        return jnp.mean(losses.kto(*sums, desirable, point, **weights))

    value, gradient = jax.value_and_grad(mean)(policy)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, tokens.grad.numpy() * mask, rtol=1e-5, atol=1e-7)


def trl_cpo(torch, chosen, rejected, **settings):
    """TRL's CPO and SimPO losses of each pair, without the likelihood its trainer adds."""
    from trl.experimental.cpo import CPOTrainer

    trainer = types.SimpleNamespace(accelerator=accelerator(torch), alpha=0.0, **settings)
    return CPOTrainer.cpo_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


def test_simpo_and_cpo(trl, torch) -> None:
    policy, _, mask = batch()
    sums, lengths = halves(policy.sum(1)), halves(mask.sum(1))
    averages = [x / n.astype(np.float32) for x, n in zip(sums, lengths, strict=True)]
    settings = {"beta": 2.0, "label_smoothing": 0.1}
    expected = trl_cpo(torch, *averages, loss_type="simpo", simpo_gamma=0.5, **settings)
    np.testing.assert_allclose(losses.simpo(*sums, *lengths, gamma=0.5, **settings), expected, 1e-5)
    settings = {"beta": 0.1, "label_smoothing": 0.1}
    expected = trl_cpo(torch, *sums, loss_type="sigmoid", **settings)
    found = losses.cpo(*sums, lengths[0], nll_weight=0.0, **settings)
    np.testing.assert_allclose(found, expected, 1e-5)


def trl_orpo(torch, chosen, rejected):
    from trl.experimental.orpo import ORPOTrainer

    trainer = types.SimpleNamespace(accelerator=accelerator(torch), beta=0.1)
    inputs = torch.tensor(chosen), torch.tensor(rejected)
    return -ORPOTrainer.odds_ratio_loss(trainer, *inputs)[0].numpy()


def test_orpo(trl, torch) -> None:
    policy, _, mask = batch()
    sums, lengths = halves(policy.sum(1)), halves(mask.sum(1))
    averages = [x / n.astype(np.float32) for x, n in zip(sums, lengths, strict=True)]
    found = losses.orpo(*sums, *lengths, chosen_nll=np.zeros(PAIRS))
    np.testing.assert_allclose(found, trl_orpo(torch, *averages), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses.orpo(*sums, *lengths), found - averages[0], rtol=1e-5)


def test_trl_orpo_is_infinite_on_an_empty_answer_and_ours_is_not(trl, torch) -> None:
    zero, one = np.zeros(1, np.float32), -np.ones(1, np.float32)
    assert trl_orpo(torch, one, zero) == np.inf
    assert np.isfinite(losses.orpo(one, zero, np.ones(1), np.zeros(1))).all()


def test_bradley_terry_is_torch_logsigmoid(torch) -> None:
    chosen, rejected = np.linspace(-60, 60, 9, dtype=np.float32), np.zeros(9, np.float32)
    expected = -torch.nn.functional.logsigmoid(torch.tensor(chosen - rejected)).numpy()
    np.testing.assert_allclose(losses.bradley_terry(chosen, rejected), expected, 1e-5, 1e-30)
