"""What the policy losses do with their arguments before any formula: names, masks, aggregations."""

import math
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.reduce import Weighted, sequence_mean, sequence_sum, token_mean

CLIPS = ("none", "symmetric", "asymmetric", "dual", "cispo")
AGGREGATIONS = ("token", "sequence", "constant")


def check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the allowed names."""
    if value not in allowed:
        names = ", ".join(f'"{option}"' for option in allowed)
        raise ValueError(f"{name} must be one of {names}, but it is {value!r}")


def check_not_negative(name: str, value: jax.typing.ArrayLike) -> None:
    """Raise ValueError unless a concrete scalar is at least 0; a tracer passes unseen."""
    checks.check_between(name, value, 0.0, math.inf)


def needs(
    array: jax.typing.ArrayLike | None, name: str, weight_name: str, weight: jax.typing.ArrayLike
) -> TypeGuard[jax.typing.ArrayLike]:
    """Whether a term counts: not where its weight is seen to be 0. It must then be given."""
    if checks.is_concrete(weight) and float(np.asarray(weight)) == 0.0:
        return False
    if array is None:
        raise ValueError(f"{name} must be given when {weight_name} is {weight}, but it is None")
    return True


def clip_range(
    clip: str, clip_low: float, clip_high: float | None, dual_bound: float
) -> tuple[float, float]:
    """How far a ratio may go below and above 1 under this clip."""
    check_option("clip", clip, CLIPS)
    checks.check_between("clip_low", clip_low, 0.0, 1.0)
    high = clip_low if clip_high is None else clip_high
    check_not_negative("clip_high", high)
    if clip == "symmetric" and high != clip_low:
        raise ValueError(
            f'clip_high must be None or {clip_low}, as clip_low, when clip is "symmetric", '
            f'but it is {clip_high}: name the clip "asymmetric"'
        )
    if clip == "dual":
        checks.check_between("dual_bound", dual_bound, 1.0 + high, math.inf)
    return clip_low, high


def policy_tokens(
    log_prob: jax.typing.ArrayLike, mask: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """log_prob `[..., T]`, 0 off the mask, and where the mask is on.

    What the mask leaves out is replaced before it enters a formula: were it NaN, or -inf, a mask
    on the result would save the value but not the gradient.
    """
    log_prob = jnp.asarray(log_prob).astype(jnp.float32)
    if log_prob.ndim < 1:
        raise ValueError("log_prob must have shape [..., T], but it is a scalar")
    keep = checks.as_tokens("mask", mask, log_prob.shape) != 0
    return jnp.where(keep, log_prob, 0.0), keep


def kept(name: str, values: jax.typing.ArrayLike, keep: jax.Array) -> jax.Array:
    """Values of the mask's shape, 0 off the mask."""
    return jnp.where(keep, checks.as_tokens(name, values, keep.shape), 0.0)


def old_or_same(
    old_log_prob: jax.typing.ArrayLike | None, log_prob: jax.Array, keep: jax.Array
) -> jax.Array:
    """The log-probability under the policy that sampled, as a constant; None is log_prob's own."""
    old = log_prob if old_log_prob is None else kept("old_log_prob", old_log_prob, keep)
    return lax.stop_gradient(old)


def per_token(
    name: str,
    values: jax.typing.ArrayLike,
    keep: jax.Array,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """One value a sequence or a token, as a constant `[..., T]`, 0 off the mask."""
    values = lax.stop_gradient(jnp.asarray(values).astype(jnp.float32))
    packed = segment_ids is not None
    if values.shape == keep.shape[:-1] and not packed:
        values = jnp.broadcast_to(values[..., None], keep.shape)
    if values.shape != keep.shape:
        expected = f"{keep.shape}" if packed else f"{keep.shape[:-1]} or {keep.shape}"
        raise ValueError(f"{name} must have shape {expected}, but its shape is {values.shape}")
    return jnp.where(keep, values, 0.0)


def check_aggregation(aggregation: str, divisor: float | None) -> None:
    """Raise ValueError unless the name is known and a divisor is given exactly where needed."""
    check_option("aggregation", aggregation, AGGREGATIONS)
    if (aggregation == "constant") != (divisor is not None):
        raise ValueError(
            'divisor must be given if aggregation is "constant" and only then, '
            f"but divisor is {divisor} and aggregation is {aggregation!r}"
        )


def aggregate(
    loss: jax.Array,
    mask: jax.typing.ArrayLike,
    aggregation: str,
    divisor: float | None,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> Weighted:
    """The reduction of this name."""
    check_aggregation(aggregation, divisor)
    if aggregation == "token":
        return token_mean(loss, mask)
    if aggregation == "sequence":
        return sequence_mean(loss, mask, segment_ids)
    return sequence_sum(loss, mask, 1.0 if divisor is None else divisor, segment_ids)
