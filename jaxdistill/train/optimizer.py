"""Optimizers and learning-rate schedules by configuration, all made of optax parts."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What to optimise with.

    >>> OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=10).name
    'adamw'
    """

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    """the method"""
    learning_rate: float = 1e-3
    """the peak"""
    schedule: Literal["constant", "cosine", "linear", "warmup-stable-decay"] = "cosine"
    """how the learning rate goes on after the warm-up"""
    warmup_steps: int = 0
    """steps of linear increase to the peak"""
    final_fraction: float = 0.0
    """of the peak, at the end of the decay"""
    decay_fraction: float = 0.1
    """of all steps, spent decaying (warmup-stable-decay only)"""
    b1: float = 0.9
    """decay of the first moment; the momentum of sgd"""
    b2: float = 0.999
    """decay of the second moment"""
    epsilon: float = 1e-8
    """keeps adam's divisor from zero"""
    weight_decay: float = 0.0
    """times the learning rate; norms, scales and biases are not decayed"""

    def __post_init__(self) -> None:
        for field, names in (("name", _DIRECTIONS), ("schedule", _DECAYS)):
            if getattr(self, field) not in names:
                given = getattr(self, field)
                raise ValueError(f"{field} must be one of {sorted(names)}, got {given!r}")
        for field, low, high in (
            ("learning_rate", 0.0, float("inf")),
            ("warmup_steps", 0, float("inf")),
            ("final_fraction", 0.0, 1.0),
            ("decay_fraction", 0.0, 1.0),
            ("weight_decay", 0.0, float("inf")),
        ):
            if not low <= getattr(self, field) <= high:
                given = getattr(self, field)
                raise ValueError(f"{field} must be between {low} and {high}, got {given}")
        if self.name == "adam" and self.weight_decay:
            raise ValueError(
                f"adam takes no weight decay, got {self.weight_decay}; use adamw for it"
            )


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    With peak r, W warm-up steps, T steps in all and u = (t - W) / (T - W):
    warm-up r (t + 1) / W for t < W, then constant r; linear r (1 - (1 - f) u);
    cosine r (f + (1 - f) (1 + cos(pi u)) / 2); warmup-stable-decay r until the last
    `decay_fraction` T steps, then linear to f r.

    Raises:
        ValueError: total_steps below 1 or the warm-up not shorter than the run.

    >>> float(make_schedule(OptimizerConfig(learning_rate=1.0, schedule="linear"), 4)(1))
    0.75
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if config.warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps} but the run has {total_steps} steps; "
            "warm up for fewer"
        )
    warmup = config.warmup_steps
    start = warmup
    if config.schedule == "warmup-stable-decay":
        start = max(warmup, total_steps - round(config.decay_fraction * total_steps))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        ramp = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
        progress = jnp.clip((count - start) / max(total_steps - start, 1), 0.0, 1.0)
        decay = _DECAYS[config.schedule](progress)
        kept = config.final_fraction + (1.0 - config.final_fraction) * decay
        return config.learning_rate * ramp * kept

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optax transformation; its state holds `learning_rate`, which the train step reports.

    Raises:
        ValueError: as `make_schedule`.

    >>> optimizer = make_optimizer(OptimizerConfig(name="sgd", b1=0.0, learning_rate=1.0), 10)
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = optimizer.update({"w": jnp.full(2, 0.5)}, optimizer.init(params), params)
    >>> updates["w"].tolist()
    [-0.5, -0.5]
    """
    return optax.chain(
        _DIRECTIONS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=_is_decayed),
        _scale_by_learning_rate(make_schedule(config, total_steps)),
    )


class LearningRateState(NamedTuple):
    """Updates made so far, and the learning rate of the last one (of the first, before it)."""

    updates: jax.Array
    learning_rate: jax.Array


def _scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformation:
    """update = -schedule(count) direction, and the rate stays in the state for all to read."""

    def init(params: Any) -> LearningRateState:
        count = jnp.zeros((), jnp.int32)
        return LearningRateState(count, schedule(count))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LearningRateState]:
        rate = schedule(state.updates)
        updates = jax.tree.map(lambda u: (-rate * u.astype(jnp.float32)).astype(u.dtype), updates)
        return updates, LearningRateState(state.updates + 1, rate)

    return optax.GradientTransformation(init, update)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Factored second moments (arXiv 1804.04235), updates relative to the size of the parameter."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)


_DIRECTIONS = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": lambda config: optax.trace(config.b1) if config.b1 else optax.identity(),
    "lion": lambda config: optax.scale_by_lion(b1=config.b1, b2=config.b2),
    "adafactor": _adafactor,
}

# Each falls from 1 at progress 0 to 0 at progress 1.
_DECAYS = {
    "constant": jnp.ones_like,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "warmup-stable-decay": lambda progress: 1.0 - progress,
}


def _is_decayed(params: Any) -> Any:
    """True for the leaves that weight decay pulls to zero: not norms, scales or biases."""

    def decayed(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] not in ("scale", "bias") and not any("norm" in name for name in names)

    return jax.tree_util.tree_map_with_path(decayed, params)
