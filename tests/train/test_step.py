"""The step against float64 numpy, and its promises: exact sums, one trace, nothing lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.losses import Weighted
from jaxdistill.parallel.mesh import make_mesh, sharding
from jaxdistill.train.step import init_state, make_train_step, state_sharding

ROWS, WIDTH = 8, 5


def squared_error(params, batch, key):
    """Masked squared error of a linear model, as a sum and a number of targets."""
    error = batch["x"] @ params["w"] - batch["y"]
    total = Weighted(jnp.sum(batch["mask"] * error**2), jnp.sum(batch["mask"]))
    return total, {"absolute": Weighted(jnp.sum(batch["mask"] * jnp.abs(error)), total.weight)}


def ragged_batch(seed=0):
    """Rows with 0 to 4 targets; the rows of one microbatch of 4 (0 and 4) have none at all."""
    rng = np.random.default_rng(seed)
    counts = np.array([0, 4, 1, 3, 0, 2, 4, 1])
    return {
        "x": rng.normal(size=(ROWS, 4, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(ROWS, 4)).astype(np.float32),
        "mask": (np.arange(4) < counts[:, None]).astype(np.float32),
    }


def oracle(batch, w):
    """Loss, mean absolute error and gradient in float64, from the formula."""
    x, y, mask = (batch[name].astype(np.float64) for name in ("x", "y", "mask"))
    error = x @ w - y
    weight = mask.sum()
    gradient = 2 * np.einsum("btd,bt->d", x, mask * error) / weight
    return (mask * error**2).sum() / weight, (mask * abs(error)).sum() / weight, gradient


def one_step(batch, w, **options):
    optimizer = optax.sgd(1.0)
    step = make_train_step(squared_error, optimizer, seed=0, **options)
    state, metrics = step(init_state({"w": jnp.asarray(w)}, optimizer), {}, batch)
    return np.asarray(state.params["w"], np.float64), jax.device_get(metrics)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_ragged_microbatches_give_the_gradient_of_the_whole_batch(accumulation):
    batch, w = ragged_batch(), np.linspace(-1, 1, WIDTH, dtype=np.float32)
    loss, absolute, gradient = oracle(batch, w)
    new_w, metrics = one_step(batch, w, accumulation=accumulation)
    np.testing.assert_allclose(new_w, w - gradient, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["absolute"], absolute, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    assert metrics["weight"] == batch["mask"].sum()


def test_low_precision_gradients_are_summed_in_float32():
    # 512 ones: a bfloat16 sum sticks at 256.
    def loss_fn(params, batch, key):
        return Weighted(params["w"] * jnp.sum(batch), jnp.float32(1)), {}

    optimizer = optax.sgd(1.0)
    step = make_train_step(loss_fn, optimizer, seed=0, accumulation=512)
    state = init_state({"w": jnp.zeros((), jnp.bfloat16)}, optimizer)
    state, metrics = step(state, {}, jnp.ones(512, jnp.bfloat16))
    assert metrics["grad_norm"] == 1.0
    assert state.params["w"] == -1.0
    assert state.params["w"].dtype == jnp.bfloat16


def test_an_all_masked_batch_is_a_zero_gradient_not_nan():
    batch = ragged_batch() | {"mask": np.zeros((ROWS, 4), np.float32)}
    w = np.ones(WIDTH, np.float32)
    new_w, metrics = one_step(batch, w, accumulation=2)
    np.testing.assert_array_equal(new_w, w)
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped"]) == (0, 0, 0)


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_scales_to_the_norm_and_reports_the_norm_before(limit):
    batch, w = ragged_batch(), np.ones(WIDTH, np.float32)
    gradient = oracle(batch, w)[2]
    norm = np.linalg.norm(gradient)
    new_w, metrics = one_step(batch, w, max_grad_norm=limit)
    clipped = gradient * min(1.0, limit / norm)
    np.testing.assert_allclose(w - new_w, clipped, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)


def test_the_key_is_folded_from_seed_step_and_microbatch():
    def loss_fn(params, batch, key):
        draw = jax.random.uniform(key)
        return Weighted(params["w"], jnp.float32(1)), {"draw": Weighted(draw, jnp.float32(1))}

    optimizer = optax.sgd(0.0)
    step = make_train_step(loss_fn, optimizer, seed=7, accumulation=2)
    state = init_state({"w": jnp.zeros(())}, optimizer)
    for number in range(3):
        state, metrics = step(state, {}, jnp.zeros(2))
        key = jax.random.fold_in(jax.random.PRNGKey(7), number)
        draws = [jax.random.uniform(jax.random.fold_in(key, m)) for m in (0, 1)]
        assert metrics["draw"] == np.mean(draws)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nonfinite_loss_changes_nothing_and_is_counted(accumulation):
    optimizer = optax.adam(0.1)
    step = make_train_step(squared_error, optimizer, seed=0, accumulation=accumulation)
    good = ragged_batch()
    bad = good | {"y": np.where(np.arange(4) == 0, np.nan, good["y"]).astype(np.float32)}
    state, _ = step(init_state({"w": jnp.ones(WIDTH)}, optimizer), {}, good)
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, {}, bad)
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
    assert np.isnan(metrics["loss"])
    assert (int(state.step), int(state.skipped), metrics["skipped"]) == (2, 1, 1)
    state, metrics = step(state, {}, good)
    assert np.isfinite(metrics["loss"])
    assert int(state.skipped) == 1
    assert not np.array_equal(state.params["w"], before[0]["w"])


def test_a_nonfinite_gradient_of_a_finite_loss_is_skipped_too():
    def loss_fn(params, batch, key):
        return Weighted(jnp.sum(jnp.sqrt(params["w"])), jnp.float32(1)), {}

    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn, optimizer, seed=0, max_grad_norm=1.0)
    state, metrics = step(init_state({"w": jnp.zeros(2)}, optimizer), {}, {})
    assert metrics["loss"] == 0
    assert int(state.skipped) == 1
    assert state.params["w"].tolist() == [0, 0]


def test_only_the_state_is_donated_and_frozen_parameters_have_no_gradient():
    def loss_fn(params, batch, key):
        return Weighted(jnp.sum(params["a"]["w"] * params["a"]["v"]), jnp.float32(1)), {}

    shared = jnp.full(3, 2.0)
    optimizer = optax.adam(0.1)
    state = init_state({"a": {"w": shared}}, optimizer)
    frozen = {"a": {"v": shared}}
    assert len(jax.tree.leaves(state.opt_state)) == 3  # count and two moments of one leaf
    step = make_train_step(loss_fn, optimizer, seed=0)
    new_state, _ = step(state, frozen, {})
    assert state.params["a"]["w"].is_deleted()
    assert not shared.is_deleted()
    step(new_state, frozen, {})
    np.testing.assert_array_equal(shared, np.full(3, 2.0))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_trace_and_one_compilation_a_run(accumulation):
    traces = []

    def loss_fn(params, batch, key):
        traces.append(1)
        return squared_error(params, batch, key)

    optimizer = optax.adamw(0.1)
    step = make_train_step(loss_fn, optimizer, seed=0, accumulation=accumulation, max_grad_norm=1.0)
    state = init_state({"w": jnp.ones(WIDTH)}, optimizer)
    for seed in range(4):
        state, _ = step(state, {}, ragged_batch(seed))
    assert len(traces) == 1
    assert step._cache_size() == 1


def mlp_loss(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["up"])
    error = (hidden @ params["down"] - batch["y"]) * batch["mask"]
    return Weighted(jnp.sum(error**2), jnp.sum(batch["mask"])), {}


def mlp_params():
    rng = np.random.default_rng(1)
    return {
        "up": rng.normal(size=(WIDTH - 1, 16)).astype(np.float32),
        "down": rng.normal(size=(16,)).astype(np.float32) / 4,
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_sharded_over_8_devices_equals_one_device(accumulation):
    mesh = make_mesh(fsdp=4, tensor=2)
    optimizer = optax.adamw(1e-2)
    axes = {"up": ("width", "mlp"), "down": ("mlp",)}
    shardings = {k: sharding(axes[k], v.shape, mesh) for k, v in mlp_params().items()}
    batch_sharding = sharding(("batch",), (ROWS,), mesh)

    def run(params, place):
        state = init_state(params, optimizer)
        step = make_train_step(
            mlp_loss,
            optimizer,
            seed=0,
            accumulation=accumulation,
            max_grad_norm=1.0,
            state_sharding=state_sharding(state),
        )
        for seed in range(3):
            batch = ragged_batch(seed)
            batch["x"] = batch["x"][..., : WIDTH - 1]
            state, metrics = step(state, {}, place(batch))
        assert step._cache_size() == 1
        return state, metrics

    single, metrics = run(jax.tree.map(jnp.asarray, mlp_params()), lambda batch: batch)
    sharded, sharded_metrics = run(
        jax.device_put(mlp_params(), shardings), lambda batch: jax.device_put(batch, batch_sharding)
    )
    for tree in (sharded.params, optax.tree.get(sharded.opt_state, "mu")):
        assert jax.tree.map(lambda x: x.sharding, tree) == shardings
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(single.params), jax.device_get(sharded.params))
    jax.tree.map(close, jax.device_get(metrics), jax.device_get(sharded_metrics))


def test_the_state_keeps_its_shardings_where_the_compiler_would_choose_others():
    mesh = make_mesh(tensor=8, fsdp=1)
    axes = {"up": ("head_dim", "layers"), "down": ("mlp",)}  # `up` whole, its gradient is not
    shardings = {k: sharding(axes[k], v.shape, mesh) for k, v in mlp_params().items()}
    optimizer = optax.sgd(1e-2)
    state = init_state(jax.device_put(mlp_params(), shardings), optimizer)
    kept = state_sharding(state)
    step = make_train_step(mlp_loss, optimizer, seed=0, state_sharding=kept)
    batch = ragged_batch()
    batch["x"] = batch["x"][..., : WIDTH - 1]
    for _ in range(2):
        state, _ = step(state, {}, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == kept
    assert step._cache_size() == 1


def test_errors_say_what_to_change():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulation must be at least 1, got 0"):
        make_train_step(squared_error, optimizer, seed=0, accumulation=0)
    with pytest.raises(ValueError, match=r"max_grad_norm must be positive or None, got 0\.0"):
        make_train_step(squared_error, optimizer, seed=0, max_grad_norm=0.0)
    state = init_state({"w": jnp.ones(WIDTH)}, optimizer)
    step = make_train_step(squared_error, optimizer, seed=0, accumulation=3)
    with pytest.raises(ValueError, match="8 rows does not divide into 3 microbatches"):
        step(state, {}, ragged_batch())

    def clashing(params, batch, key):
        loss, _ = squared_error(params, batch, key)
        return loss, {"loss": loss}

    with pytest.raises(ValueError, match=r"metric names \['loss'\] are the step's own"):
        make_train_step(clashing, optimizer, seed=0)(state, {}, ragged_batch())
