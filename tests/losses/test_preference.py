"""What the preference objectives promise beyond the contract: limits, margins, empty answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import from_hidden
from jaxdistill.losses.preference import VARIANTS

LOG_2 = np.log(2)
PAIR = [np.array([-20.0, -3.5, -7.0]), np.array([-12.0, -9.0, -7.5])]
REFERENCE = [np.array([-18.0, -4.0, -6.0]), np.array([-13.0, -8.0, -9.0])]
LENGTHS = [np.array([10, 2, 3]), np.array([5, 4, 3])]


def options(variant: str) -> dict:
    return {"variant": variant, "label_smoothing": 0.1 if variant == "exo" else 0.0}


def total(loss):
    return lambda *inputs, **settings: jnp.sum(loss(*inputs, **settings))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("sigmoid", LOG_2),
        ("hinge", 1.0),
        ("ipo", 1 / (4 * 0.1**2)),
        ("robust", LOG_2),
        ("exo", -0.5 * np.log(4 * 0.9 * 0.1)),
        ("nca", 2 * LOG_2),
        ("bco", 2 * LOG_2),
        ("sppo", 2 / (4 * 0.1**2)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.5 * LOG_2 + 0.5),
        ("aot", LOG_2),
    ],
)
def test_value_where_the_policy_is_the_reference(variant: str, expected: float) -> None:
    values = losses.dpo(*PAIR, *PAIR, **options(variant))
    np.testing.assert_allclose(values, np.full(3, expected), rtol=1e-5)


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_extreme_margins_have_the_right_value_and_gradient(size: float) -> None:
    """-log s(h) is -h with slope -beta far on the wrong side, and nothing on the right side."""
    margins = np.array([-size, size], np.float32)
    zeros = np.zeros(2, np.float32)
    run = jax.value_and_grad(total(losses.dpo), argnums=(0, 1))
    value, gradients = run(margins, zeros, zeros, zeros)
    assert value == np.float32(0.1 * size)
    np.testing.assert_allclose(gradients[0], [-0.1, 0.0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [0.1, 0.0], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_finite_at_extreme_margins(variant: str) -> None:
    pair = np.array(np.meshgrid([-1e6, -1e3, 1e3, 1e6], [-1e6, -1e3, 1e3, 1e6])).reshape(2, -1)
    zeros = np.zeros(pair.shape[1])
    run = jax.value_and_grad(total(losses.dpo), argnums=(0, 1))
    value, gradients = run(*pair, zeros, zeros, **options(variant))
    assert np.isfinite(value)
    assert np.isfinite(gradients).all()


def test_discopop_does_not_multiply_infinity_by_zero() -> None:
    """The blend as it is written (and as peers compute it) is NaN once exp(-h) overflows."""
    margin = np.float32(-200.0)
    with np.errstate(over="ignore"):
        weight, exponential = 1 / (1 + np.exp(-margin / np.float32(0.05))), np.exp(-margin)
    assert weight == 0
    assert exponential == np.inf
    zero = np.zeros(1)
    value = losses.dpo(np.array([-2000.0]), zero, zero, zero, variant="discopop")
    np.testing.assert_allclose(value, [200.0], rtol=1e-6)


def test_orpo_is_finite_where_an_answer_is_empty() -> None:
    """Peers return inf here: the average log-probability is 0, and its odds are infinite."""
    chosen, rejected = np.array([0.0, -2.0, 0.0, -2.0]), np.array([-3.0, 0.0, 0.0, 0.0])
    lengths = np.array([0, 2, 0, 2]), np.array([3, 0, 0, 1])
    run = jax.value_and_grad(total(losses.orpo), argnums=(0, 1))
    value, gradients = run(chosen, rejected, *lengths)
    assert np.isfinite(value)
    assert np.isfinite(gradients).all()
    # What the empty or certain answer holds has no odds to improve: only the likelihood pulls.
    np.testing.assert_allclose(gradients[0][jnp.array([0, 2])], [-1.0, -1.0])
    np.testing.assert_array_equal(gradients[1][1:], [0.0, 0.0, 0.0])
    assert gradients[0][1] < -0.5


def test_orpo_of_near_certain_answers_keeps_its_precision() -> None:
    """log(1 - p) for p next to 1 is where float32 loses everything if it is written like that."""
    log_p = np.array([-1e-5, -1e-3, -1e-1])
    value = losses.orpo(log_p, np.full(3, -0.5), np.ones(3), np.ones(3), chosen_nll=np.zeros(3))
    odds = log_p - np.log(-np.expm1(log_p)) - (-0.5 - np.log(-np.expm1(-0.5)))
    np.testing.assert_allclose(value, 0.1 * np.logaddexp(0, -odds), rtol=1e-5)


def test_orpo_takes_the_likelihood_of_another_text() -> None:
    nll = np.array([3.0, 2.0, 1.0])
    swapped = losses.orpo(*PAIR, *LENGTHS, chosen_nll=nll)
    np.testing.assert_allclose(
        swapped - losses.orpo(*PAIR, *LENGTHS), nll + PAIR[0] / LENGTHS[0], atol=1e-5
    )


@pytest.mark.parametrize("loss", [losses.simpo, losses.redi, losses.orpo])
def test_an_empty_answer_counts_as_one_token(loss) -> None:
    zeros = np.zeros(2)
    empty = loss(zeros - 1, zeros, np.ones(2), np.zeros(2, np.int32))
    np.testing.assert_array_equal(empty, loss(zeros - 1, zeros, np.ones(2), np.ones(2)))
    assert np.isfinite(empty).all()


def test_redi_between_fine_tuning_and_the_limit_of_simpo() -> None:
    gradient = jax.grad(total(losses.redi))(*PAIR, *LENGTHS, alpha=0.0)
    np.testing.assert_allclose(gradient, -1 / LENGTHS[0], rtol=1e-6)

    def both(loss, **settings):
        return np.stack(jax.grad(total(loss), argnums=(0, 1))(*PAIR, *LENGTHS, **settings))

    simpo = both(losses.simpo, beta=1e-4, gamma=0.0) / 1e-4
    np.testing.assert_allclose(simpo, 0.5 * both(losses.redi, alpha=1.0), rtol=1e-3)


def test_quantiles_follow_their_pair_when_the_batch_is_permuted() -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.normal(-20, 6, 16) for _ in range(4)]
    order = rng.permutation(16)
    for variant in ("aot", "aot_unpaired"):
        values = losses.dpo(*inputs, variant=variant)
        moved = losses.dpo(*(x[order] for x in inputs), variant=variant)
        np.testing.assert_allclose(moved, np.asarray(values)[order], rtol=1e-6)
    shuffled = losses.dpo(inputs[0], inputs[1], inputs[2][order], inputs[3][order], variant="aot")
    np.testing.assert_allclose(shuffled, losses.dpo(*inputs, variant="aot"), rtol=1e-6)


def test_kto_stops_at_the_reference_point() -> None:
    desirable = np.array([True, False, True])
    gradient = jax.grad(lambda point: total(losses.kto)(PAIR[0], REFERENCE[0], desirable, point))
    assert gradient(1.5) == 0
    at = [losses.kto(PAIR[0], REFERENCE[0], desirable, point) for point in (-3.0, 0.0, 3.0)]
    np.testing.assert_array_equal(at[0], at[1])
    assert (np.abs(at[2] - at[1]) > 1e-3).all()


def test_kto_without_a_reference_point_is_unpaired_apo_zero() -> None:
    good = losses.kto(PAIR[0], REFERENCE[0], np.ones(3), 0.0)
    bad = losses.kto(PAIR[1], REFERENCE[1], np.zeros(3), 0.0)
    expected = losses.dpo(*PAIR, *REFERENCE, variant="apo_zero")
    np.testing.assert_allclose(good + bad, expected, rtol=1e-6)


def test_likelihood_terms_do_not_depend_on_the_split_into_microbatches() -> None:
    """A token mean of each microbatch, which TRL takes for CPO and DPO + NLL, does."""
    log_prob, length = PAIR[0], LENGTHS[0]
    halves = [slice(0, 1), slice(1, 3)]
    token_means = [-log_prob[half].sum() / length[half].sum() for half in halves]
    whole = -log_prob.sum() / length.sum()
    assert abs(np.average(token_means, weights=[1, 2]) - whole) > 0.02
    split = [losses.cpo(log_prob[half], PAIR[1][half], length[half]) for half in halves]
    expected = losses.cpo(*PAIR, length)
    np.testing.assert_allclose(np.concatenate(split), expected, rtol=1e-6)


def test_a_traced_beta_needs_one_program() -> None:
    traces = []

    @jax.jit
    def run(beta):
        traces.append(beta)
        return losses.dpo(*PAIR, *REFERENCE, beta=beta)

    for beta in (0.1, 0.2):
        np.testing.assert_allclose(run(beta), losses.dpo(*PAIR, *REFERENCE, beta=beta), rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_hidden_states_give_the_value_and_gradient_of_the_logits_form(name: str) -> None:
    rng = np.random.default_rng(0)
    hidden, reference = (rng.normal(size=(3, 2, 5, 4)).astype(np.float32) for _ in range(2))
    head = rng.normal(size=(11, 4)).astype(np.float32)
    labels = rng.integers(0, 11, (3, 2, 5))
    mask = np.arange(5) < np.array([[[5], [2]], [[0], [4]], [[3], [3]]])
    referenced = name == "dpo"

    def from_logits(hidden, head):
        def pair(states, columns):
            values = losses.log_probs(states @ columns.T, labels)
            return jnp.moveaxis(losses.sequence_log_prob(values, mask), 1, 0)

        frozen = (*pair(reference, 2 * head),) if referenced else ()
        lengths = () if referenced else mask.sum(-1).T
        return getattr(losses, name)(*pair(hidden, head), *frozen, *lengths)

    def from_states(hidden, head):
        frozen = (reference, 2 * head) if referenced else ()
        return getattr(from_hidden, name)(hidden, head, *frozen, labels, mask)

    def run(form):
        return jax.jit(jax.value_and_grad(total(form), argnums=(0, 1)))(hidden, head)

    # The reference's head is made of the same array: frozen, it adds nothing to the gradient.
    for actual, expected in zip(
        *map(jax.tree.leaves, (run(from_states), run(from_logits))), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


INVALID = [
    (lambda: losses.dpo(*PAIR, *REFERENCE, variant="apo"), "variant must be one of"),
    (lambda: losses.dpo(*PAIR, *REFERENCE, beta=0.0), "beta must be finite and above 0"),
    (lambda: losses.dpo(*PAIR, *REFERENCE, label_smoothing=0.5), r"must lie in \[0, 0.5\)"),
    (
        lambda: losses.dpo(*PAIR, *REFERENCE, variant="hinge", label_smoothing=0.1),
        "label_smoothing must be 0 for variant 'hinge', but it is 0.1",
    ),
    (lambda: losses.dpo(*PAIR, *REFERENCE, variant="exo"), "label_smoothing must be above 0"),
    (
        lambda: losses.dpo(*PAIR, *REFERENCE, chosen_length=LENGTHS[0]),
        "chosen_length and rejected_length must be given together",
    ),
    (lambda: losses.dpo(*PAIR, *REFERENCE, discopop_temperature=2.0), "discopop_temperature must"),
    (lambda: losses.dpo(PAIR[0], PAIR[1][:2], *REFERENCE), "rejected_log_prob must have shape"),
    (
        lambda: losses.dpo(*PAIR, *(x[:2] for x in REFERENCE)),
        r"reference_chosen_log_prob must have the shape of chosen_log_prob, \(3,\)",
    ),
    (lambda: losses.dpo(*LENGTHS, *REFERENCE), "chosen_log_prob must be floating"),
    (lambda: losses.rpo(*PAIR, *REFERENCE, LENGTHS[0], nll_weight=-1.0), "nll_weight must lie"),
    (lambda: losses.kto(PAIR[0], REFERENCE[0], np.ones(3), np.ones(3)), "reference_point must be"),
    (lambda: losses.kto(PAIR[0], REFERENCE[0], np.ones(2), 0.0), "desirable must have shape"),
    (lambda: losses.orpo(*PAIR, *LENGTHS, beta=-0.1), "beta must lie"),
    (lambda: losses.simpo(*PAIR, *LENGTHS, gamma=-0.1), "gamma must lie"),
    (lambda: losses.simpo(*PAIR, LENGTHS[0], np.ones(2)), "rejected_length must have shape"),
    (lambda: losses.cpo(*PAIR, LENGTHS[0], label_smoothing=0.7), "label_smoothing must lie"),
    (lambda: losses.redi(*PAIR, *LENGTHS, alpha=1.5), r"alpha must lie in \[0.0, 1.0\]"),
    (
        lambda: from_hidden.orpo(
            np.ones((3, 5, 4)), np.ones((7, 4)), np.ones((3, 5), int), np.ones((3, 5))
        ),
        r"labels must have shape \[B, 2, T\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[message for _, message in INVALID])
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
