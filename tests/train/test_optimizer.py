"""Schedules against their formulas and updates against float64 numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.losses import Weighted
from jaxdistill.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxdistill.train.step import init_state, make_train_step

STEPS, WARMUP, PEAK, FINAL = 50, 5, 3e-3, 0.1


def expected_rate(name, t):
    """The formula of each schedule, in Python floats."""
    if t < WARMUP:
        return PEAK * (t + 1) / WARMUP
    u = min((t - WARMUP) / (STEPS - WARMUP), 1.0)
    if name == "constant":
        return PEAK
    if name == "linear":
        return PEAK * (1 - (1 - FINAL) * u)
    if name == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * u)) / 2)
    start = STEPS - 20
    v = min(max((t - start) / 20, 0.0), 1.0)
    return PEAK * (1 - (1 - FINAL) * v)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup-stable-decay"])
def test_schedule_follows_its_formula(name):
    config = OptimizerConfig(
        learning_rate=PEAK,
        schedule=name,
        warmup_steps=WARMUP,
        final_fraction=FINAL,
        decay_fraction=0.4,
    )
    rates = jax.vmap(make_schedule(config, STEPS))(jnp.arange(STEPS + 10))
    expected = [expected_rate(name, t) for t in range(STEPS + 10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[0] > 0


def direction(name, moments, g, p, t):
    """One float64 update direction; `moments` is changed in place."""
    if name in ("adam", "adamw"):
        moments["m"] = 0.8 * moments["m"] + 0.2 * g
        moments["v"] = 0.95 * moments["v"] + 0.05 * g**2
        m, v = moments["m"] / (1 - 0.8**t), moments["v"] / (1 - 0.95**t)
        return m / (np.sqrt(v) + 1e-6)
    if name == "sgd":
        moments["m"] = 0.8 * moments["m"] + g
        return moments["m"]
    sign = np.sign(0.8 * moments["m"] + 0.2 * g)
    moments["m"] = 0.95 * moments["m"] + 0.05 * g
    return sign


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_updates_follow_the_formula_and_decay_only_matrices(name):
    decay = 0.0 if name == "adam" else 0.1
    config = OptimizerConfig(
        name=name,
        learning_rate=0.05,
        schedule="linear",
        b1=0.8,
        b2=0.95,
        epsilon=1e-6,
        weight_decay=decay,
    )
    optimizer = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    params = {
        "mlp": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
        "final_norm": {"scale": rng.normal(size=3)},
        "norm": {"weight": rng.normal(size=3)},
    }
    as_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    state = init_state(as_float32(params), optimizer)
    loss_fn = lambda p, g, key: (  # noqa: E731
        Weighted(
            sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (p, g)), strict=True)), 1
        ),
        {},
    )
    step = make_train_step(loss_fn, optimizer, seed=0)
    moments = jax.tree.map(lambda x: {"m": 0.0, "v": 0.0}, params)
    decays = {"mlp": {"kernel": decay, "bias": 0.0}, "final_norm": {"scale": 0.0}}
    decays["norm"] = {"weight": 0.0}
    for t in range(1, 4):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        state, metrics = step(state, {}, as_float32(grads))
        rate = 0.05 * (1 - (t - 1) / 10)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        params = jax.tree.map(
            lambda p, g, m, w: p - rate * (direction(name, m, g, p, t) + w * p),  # noqa: B023
            params,
            grads,
            moments,
            decays,
        )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, jax.device_get(state.params), params)


def test_adafactor_keeps_factored_moments_and_descends():
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", learning_rate=0.1), 50)
    state = init_state({"w": jnp.ones((128, 130))}, optimizer)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 300
    loss_fn = lambda p, batch, key: (Weighted(jnp.sum(p["w"] ** 2), jnp.float32(1)), {})  # noqa: E731
    step = make_train_step(loss_fn, optimizer, seed=0)
    for _ in range(5):
        state, metrics = step(state, {}, {})
    assert metrics["loss"] < 128 * 130 * 0.5


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor"])
def test_parameter_types_are_kept_under_strict_promotion(name):
    optimizer = make_optimizer(
        OptimizerConfig(name=name, learning_rate=0.1, schedule="constant"), 10
    )
    params = {"w": jnp.ones((4, 4), jnp.bfloat16), "norm": {"scale": jnp.ones(4, jnp.float32)}}
    loss_fn = lambda p, batch, key: (  # noqa: E731
        Weighted(jnp.sum(p["w"]).astype(jnp.float32) + jnp.sum(p["norm"]["scale"]), 1),
        {},
    )
    step = make_train_step(loss_fn, optimizer, seed=0, accumulation=1)
    state, _ = step(init_state(params, optimizer), {}, {})
    state, _ = step(state, {}, {})
    assert step._cache_size() == 1
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.params["norm"]["scale"].dtype == jnp.float32
    assert float(state.params["w"][0, 0]) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamx"}, r"name must be one of \['adafactor', .*got 'adamx'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"learning_rate": -1.0}, "learning_rate must be between 0.0 and inf, got -1.0"),
        ({"final_fraction": 2.0}, "final_fraction must be between 0.0 and 1.0, got 2.0"),
        ({"name": "adam", "weight_decay": 0.1}, "adam takes no weight decay.*use adamw"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps is 10 but the run has 10 steps"):
        make_optimizer(OptimizerConfig(warmup_steps=10), 10)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        make_schedule(OptimizerConfig(), 0)


def test_the_rate_reported_is_the_one_used_even_after_a_skipped_step():
    optimizer = make_optimizer(OptimizerConfig(name="sgd", b1=0.0, schedule="linear"), 10)
    loss_fn = lambda p, x, key: (Weighted(jnp.sum(p["w"] * x), jnp.float32(1)), {})  # noqa: E731
    step = make_train_step(loss_fn, optimizer, seed=0)
    state = init_state({"w": jnp.zeros(1)}, optimizer)
    previous = 0.0
    for x, rate in ((1.0, 1e-3), (np.nan, 1e-3), (1.0, 0.9e-3)):
        state, metrics = step(state, {}, jnp.full(1, x, jnp.float32))
        moved = 0.0 if np.isnan(x) else rate
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        np.testing.assert_allclose(state.params["w"], previous - moved, rtol=1e-5)
        previous = float(state.params["w"][0])
    assert len(optax.tree.get_all_with_path(state.opt_state, "learning_rate")) == 1
