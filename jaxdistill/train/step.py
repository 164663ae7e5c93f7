"""One compiled training step: a loss function in, a donated and sharded update out.

The loss is a sum and a weight, never a mean, so that microbatches of unequal masks add up exactly;
the division happens once a step, after the last microbatch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdistill.losses import Weighted
from jaxdistill.train.partition import Params, merge, partition

__all__ = ["TrainState", "init_state", "make_train_step", "merge", "partition", "state_sharding"]

LossFunction = Callable[[Any, Any, jax.Array], tuple[Weighted, dict[str, Weighted]]]
RESERVED_METRICS = ("loss", "grad_norm", "learning_rate", "weight", "skipped")


class TrainState(NamedTuple):
    """What a step changes and a checkpoint keeps.

    step: int32 [], steps taken, counting the skipped ones. params: the trainable parameters.
    opt_state: optax state of `params`. skipped: int32 [], steps whose update was refused because
    the loss or the gradient norm was not finite.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Args:
        params: the trainable parameters, on the devices where they are to stay. They are copied,
            because the step donates its state and the caller may share arrays with a teacher.
        optimizer: any optax transformation.

    Returns:
        A TrainState whose optimizer state is sharded like the parameters.

    >>> state = init_state({"w": jnp.ones(3)}, optax.adam(1e-3))
    >>> int(state.step), int(state.skipped)
    (0, 0)
    """
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), dict(params))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
    )
    return _on_one_mesh(state)


def state_sharding(state: TrainState) -> TrainState | None:
    """The shardings a step must give its new state, or None on a single device.

    Without them the compiler may choose others, and the next call would compile again.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    single = isinstance(state.step.sharding, jax.sharding.SingleDeviceSharding)
    return None if single else shardings


def _on_one_mesh(state: TrainState) -> TrainState:
    """Replicates the counters over the parameters' mesh, where the first step leaves them."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    if not meshes:
        return state
    replicated = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())

    def place(leaf: jax.Array) -> jax.Array:
        placed = isinstance(leaf.sharding, jax.sharding.NamedSharding)
        return leaf if placed else jax.device_put(leaf, replicated)

    return jax.tree.map(place, state)


def make_train_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    state_sharding: TrainState | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, frozen, batch) -> (state, metrics)` that donates only the state.

    With microbatches m = 1..k, gradient = sum_m grad(sum_m) / sum_m weight_m: the gradient of the
    loss over the whole batch, however ragged the masks. A step whose loss or gradient norm is not
    finite leaves parameters and optimizer state as they were and adds one to `skipped`.

    Args:
        loss_fn: (params, batch, key) -> (Weighted, dict of Weighted). It sees the merged tree of
            trainable and frozen parameters. key = fold_in(fold_in(key(seed), step), microbatch).
        optimizer: the optax transformation that made the state.
        seed: of every random number drawn in the loss.
        accumulation: microbatches a step; the batch's leading axis must be a multiple of it.
        max_grad_norm: the gradient is scaled down to this global norm when it is longer.
        state_sharding: a TrainState of shardings that the new state keeps, from the function
            of that name; None on one device.

    Returns:
        The step. Its metrics are float32 scalars: loss and each user metric (means), grad_norm
        (before clipping), weight (what the loss was divided by, usually tokens), learning_rate
        (if the optimizer's state holds it) and skipped (steps refused so far).

    Raises:
        ValueError: accumulation below 1 or max_grad_norm not positive; at the first call, a batch
            that does not divide or a user metric with a reserved name.

    >>> def loss_fn(params, batch, key):
    ...     return Weighted(jnp.sum((params["w"] - batch["x"]) ** 2), jnp.float32(2)), {}
    >>> step = make_train_step(loss_fn, optax.sgd(0.5), seed=0)
    >>> state = init_state({"w": jnp.zeros(2)}, optax.sgd(0.5))
    >>> state, metrics = step(state, {}, {"x": jnp.ones(2)})
    >>> float(metrics["loss"]), state.params["w"].tolist()
    (1.0, [0.5, 0.5])
    """
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, got {accumulation}; use 1 for none")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = _gradient_of_sum(loss_fn, frozen)
        grads, loss, user_metrics = _accumulate(gradient, state.params, batch, key, accumulation)
        grads, norm = _finish_gradient(grads, loss.weight, max_grad_norm)
        mean = loss.mean()
        state = _update(state, grads, optimizer, jnp.isfinite(mean) & jnp.isfinite(norm))
        metrics = {"loss": mean, "grad_norm": norm, "weight": loss.weight, "skipped": state.skipped}
        rates = optax.tree.get_all_with_path(state.opt_state, "learning_rate")
        if rates:
            metrics["learning_rate"] = rates[0][1]
        metrics |= {name: value.mean() for name, value in user_metrics.items()}
        return state, _as_float32(metrics)

    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None))


def _gradient_of_sum(loss_fn: LossFunction, frozen: Any) -> Callable:
    """(trainable, batch, key) -> ((sum, (Weighted, metrics)), gradient of the sum)."""

    def loss_sum(trainable: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple]:
        loss, metrics = loss_fn(merge(trainable, frozen), batch, key)
        clash = sorted(set(metrics) & set(RESERVED_METRICS))
        if clash:
            raise ValueError(f"metric names {clash} are the step's own; rename them in loss_fn")
        return _as_float32(loss.sum), _as_float32((loss, metrics))

    return jax.value_and_grad(loss_sum, has_aux=True)


def _accumulate(
    gradient: Callable, params: Any, batch: Any, key: jax.Array, accumulation: int
) -> tuple[Any, Weighted, dict[str, Weighted]]:
    """The gradient of the summed loss in float32, the summed loss and the summed metrics."""
    if accumulation == 1:
        (_, (loss, metrics)), grads = gradient(params, batch, jax.random.fold_in(key, 0))
        return _as_float32(grads), loss, metrics

    def body(total: Any, microbatch: tuple[jax.Array, Any]) -> tuple[Any, tuple]:
        index, rows = microbatch
        (_, aux), grads = gradient(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, _as_float32(grads)), aux

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    rows = jax.tree.map(lambda x: _split_rows(x, accumulation), batch)
    grads, (loss, metrics) = jax.lax.scan(body, zeros, (jnp.arange(accumulation), rows))
    loss, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), (loss, metrics))
    return grads, loss, metrics


def _split_rows(rows: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]; microbatch i takes rows i, i + count, ..., so that a
    batch sharded over devices gives microbatches sharded over the same devices."""
    if rows.shape[0] % count:
        raise ValueError(
            f"a batch of {rows.shape[0]} rows does not divide into {count} microbatches; "
            "make the batch size a multiple of accumulation"
        )
    return jnp.swapaxes(rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]), 0, 1)


def _finish_gradient(
    grads: Any, weight: jax.Array, max_grad_norm: float | None
) -> tuple[Any, jax.Array]:
    """Sum -> mean, then clipped to `max_grad_norm`; returns the norm before clipping as well."""
    scale = 1.0 / jnp.where(weight == 0, 1.0, weight)
    grads = jax.tree.map(lambda g: g * scale, grads)
    norm = jnp.sqrt(sum((jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)), jnp.float32(0)))
    if max_grad_norm is not None:
        shrink = max_grad_norm / jnp.maximum(norm, max_grad_norm)
        grads = jax.tree.map(lambda g: g * shrink, grads)
    return grads, norm


def _update(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, finite: jax.Array
) -> TrainState:
    """The state after the step; only the counters move if the gradient was not finite."""
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    skipped = state.skipped + jnp.logical_not(finite).astype(jnp.int32)
    return TrainState(state.step + 1, params, opt_state, skipped)


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
