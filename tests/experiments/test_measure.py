"""What the table says and what the arms minimise, against float64 on full logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import measure, objectives
from experiments.lab.measure import Model
from jaxdistill.data import pipeline
from jaxdistill.data.packing import Example
from jaxdistill.losses import Weighted
from jaxdistill.models import DecoderConfig, decoder
from tests.experiments import tiny_quickstart
from tests.models import oracle
from tests.models.tiny import FULL, quick_jit, random_params

KEY = jax.random.key(0)
TEACHER = Model(random_params(FULL, seed=1), FULL)
# Another depth, cap and padding: what is the student's and what the teacher's cannot be exchanged.
CONFIG = dataclasses.replace(FULL, num_layers=2, logit_soft_cap=5.0, padded_vocab_size=None)
STUDENT = Model(random_params(CONFIG), CONFIG)


def documents() -> list[Example]:
    """Ragged texts, the first tokens of each a prompt that is no target."""
    rng = np.random.default_rng(0)
    found = []
    for size, prompt in ((5, 2), (3, 0), (7, 0), (2, 0), (8, 6), (4, 3)):
        mask = (np.arange(size) >= prompt).astype(np.float32)
        found.append(Example(rng.integers(0, FULL.vocab_size, size).astype(np.int32), mask))
    return found


def batches() -> list[pipeline.Batch]:
    options = {"length": 8, "batch_size": 2, "vocab_size": FULL.vocab_size}
    return list(pipeline.evaluation_batches(documents(), packing="first_fit", **options))


@functools.cache
def exact(temperature: float = 1.0) -> tuple[float, float]:
    """Mean cross-entropy and KL over all targets, each document by itself."""
    cross_entropy, kl = [], []
    for tokens, mask in documents():
        log_p, log_q = (
            log_softmax(oracle.forward(m.params, tokens[None], m.config)[2][0] / temperature)
            for m in (TEACHER, STUDENT)
        )
        for t in np.flatnonzero(mask[1:]):
            cross_entropy.append(-log_q[t, tokens[t + 1]])
            kl.append(np.sum(np.exp(log_p[t]) * (log_p[t] - log_q[t])))
    return float(np.mean(cross_entropy)), float(np.mean(kl))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_quality_is_a_mean_over_all_targets_of_all_batches() -> None:
    cross_entropy, kl = exact()
    found = measure.quality(STUDENT, TEACHER, batches())
    assert found.perplexity == pytest.approx(np.exp(cross_entropy), rel=1e-5)
    assert found.kl_to_teacher == pytest.approx(kl, rel=1e-5)
    alone = [measure.quality(STUDENT, TEACHER, [batch]).kl_to_teacher for batch in batches()]
    assert np.mean(alone) != pytest.approx(kl, rel=1e-2)  # so a mean of means would be seen


def minimised(loss_fn) -> float:
    """The loss over all batches, as the step adds it up."""
    run = quick_jit(loss_fn)
    params = {"student": STUDENT.params, "teacher": TEACHER.params}
    parts = [run(params, batch, KEY)[0] for batch in batches()]
    return float(functools.reduce(Weighted.__add__, parts).mean())


def test_the_arms_minimise_their_formulas() -> None:
    cross_entropy, _ = exact()
    assert minimised(objectives.cross_entropy(CONFIG)) == pytest.approx(cross_entropy, rel=1e-5)
    loss_fn = objectives.distillation(CONFIG, FULL, temperature=2.0)
    assert minimised(loss_fn) == pytest.approx(exact(2.0)[1], rel=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    loss_fn = objectives.distillation(CONFIG, FULL)
    params = {"student": STUDENT.params, "teacher": TEACHER.params}
    gradient = quick_jit(jax.grad(lambda p: loss_fn(p, batches()[0], KEY)[0].sum))(params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient["student"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["teacher"]))


@pytest.mark.parametrize("arm", ["ce", "kd"])
def test_no_arm_ever_holds_the_logits(arm: str) -> None:
    """At SmolLM2's vocabulary: no value of the step has a row of logits for every token."""
    config = DecoderConfig(
        vocab_size=49152,
        width=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=8,
        max_length=1024,
        tie_embeddings=True,
    )
    loss_fn = (
        objectives.cross_entropy(config) if arm == "ce" else objectives.distillation(config, config)
    )
    shapes = {"tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct((2, 1024), dtype)
        for name, dtype in (shapes | {"loss_mask": jnp.float32}).items()
    }
    models = {name: decoder.abstract_params(config) for name in ("student", "teacher")}
    step = jax.value_and_grad(lambda p, b: loss_fn(p, b, KEY)[0].sum)
    largest = max(sizes(jax.make_jaxpr(step)(models, batch).jaxpr))
    assert largest >= 49152 * 8  # the gradient of the embedding is seen
    assert largest < 2 * 1024 * 49152 / 4


def sizes(jaxpr: jax.extend.core.Jaxpr):
    """Elements of every value in a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(variable.aval.shape)) for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_an_answer_is_greedy_and_ends_before_its_stop_token() -> None:
    model, tokenizer = tiny_quickstart.teacher()
    free = measure.answer(model, tokenizer, "what is this?", new_tokens=6)
    assert free.tokens_per_second > 0
    prompt = tokenizer.encode("what is this?")
    written: list[int] = []
    for _ in range(6):
        tokens = np.array([prompt + written])
        _, _, logits = oracle.forward(model.params, tokens, model.config)
        written.append(int(logits[0, -1].argmax()))
    assert free.text == tokenizer.decode(written).strip()
    tokenizer.eos_id = written[2]
    end = written.index(written[2])
    stopped = measure.answer(model, tokenizer, "what is this?", new_tokens=6)
    assert stopped.text == tokenizer.decode(written[:end]).strip()


def test_a_row_that_is_there_is_not_measured_again(tmp_path) -> None:
    def never() -> dict:
        raise AssertionError("measured twice")

    path = tmp_path / "results.json"
    assert measure.Results(path).measure("a", lambda: {"x": 1}) == {"x": 1}
    again = measure.Results(path)
    assert again.measure("a", never) == {"x": 1}
    again.measure("b", lambda: {"x": 2})
    assert measure.Results(path).rows == {"a": {"x": 1}, "b": {"x": 2}}
