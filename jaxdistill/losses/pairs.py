"""What the preference objectives share: their checks, averages over tokens, the smoothed loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import log_sigmoid

from jaxdistill.losses import checks

ArrayLike = jax.typing.ArrayLike
Pair = tuple[jax.Array, jax.Array]


def as_log_prob(name: str, values: ArrayLike, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Floating numbers, of this shape if one is given, as float32.

    Integers are taken for a mistake: tokens in the place of log-probabilities.
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, but its type is {values.dtype}")
    return checks.as_tokens(name, values, values.shape if shape is None else shape)


def check_pair(prefix: str, chosen: ArrayLike, rejected: ArrayLike) -> Pair:
    """The log-probabilities of chosen and rejected answers, as float32 of one shape."""
    chosen = as_log_prob(f"{prefix}chosen_log_prob", chosen)
    return chosen, as_log_prob(f"{prefix}rejected_log_prob", rejected, chosen.shape)


def check_label_smoothing(label_smoothing: ArrayLike) -> None:
    """Raise ValueError unless a concrete scalar lies in [0, 0.5): at half, pairs say nothing."""
    checks.check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    if checks.is_concrete(label_smoothing) and float(np.asarray(label_smoothing)) == 0.5:
        raise ValueError("label_smoothing must lie in [0, 0.5), but it is 0.5")


def mean_log_prob(name: str, log_prob: jax.Array, length: ArrayLike) -> jax.Array:
    """Log-probability per token; an empty answer has sum 0 and counts as one token, so gives 0."""
    length = lax.stop_gradient(checks.as_tokens(name, length, log_prob.shape))
    return log_prob / jnp.maximum(length, 1.0)


def smoothed_log_sigmoid(margin: jax.Array, label_smoothing: ArrayLike) -> jax.Array:
    """-(1 - e) log s(margin) - e log s(-margin): the Bradley-Terry loss when a share e is wrong."""
    wrong = jnp.asarray(label_smoothing, jnp.float32)
    return -(1.0 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin)
