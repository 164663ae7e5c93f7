"""A head whose vocabulary is split over a mesh axis: each device has columns of its own.

Each device computes its own statistics; the log-sum-exps l_i, entropies H_i and the labels' logits,
each of which one device has, are combined with w_i = e^(l_i - l), the device's share of the
probability:

    l = log sum_i e^l_i;  log_prob = x_label - l;  entropy = sum_i w_i (H_i - log w_i)

The log-sum-exp of the columns that are no label is combined as l is.

Differentiating this gives device i the cotangent w_i of l_i, and w_i p_i is the probability under
the whole vocabulary, so every implementation's own backward pass is the right one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Outputs = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def check_axis(axis_name: str, head: jax.Array) -> None:
    """Raise ValueError unless `head` is one device's part along this axis."""
    varying = jax.typeof(head).manual_axis_type.varying
    if axis_name not in varying:
        raise ValueError(
            f"axis_name must be an axis over which shard_map splits head, with check_vma=True, but "
            f"it is {axis_name!r} and head is split over {sorted(varying) or 'none'}"
        )


def count_columns(own: int, heads: str, axis_name: str, vocab_size: int | None) -> int:
    """The columns that count on all devices, `own` on each; ValueError unless they have so many."""
    padded = own * lax.axis_size(axis_name)
    if vocab_size is not None and not 0 < vocab_size <= padded:
        raise ValueError(
            f"vocab_size must lie in [1, {padded}], the columns of {heads} over axis "
            f"{axis_name!r}, but it is {vocab_size}"
        )
    return padded if vocab_size is None else vocab_size


def linear_cross_entropy(
    local: Callable[..., Outputs],
    labels: jax.Array,
    *,
    axis_name: str,
    columns: int,
    vocab_size: int,
) -> Outputs:
    """Log-prob `[..., K]`, log-sum-exp, entropy, log-sum-exp of the rest `[...]`, of all devices.

    `local(labels, num_valid=...)` gives them over this device's `columns`, of which the first
    `num_valid` count (None: all do); labels are columns of the device, or -1.
    """
    start = lax.axis_index(axis_name) * columns
    padded = vocab_size < lax.axis_size(axis_name) * columns
    num_valid = jnp.clip(vocab_size - start, 0, columns) if padded else None
    position = labels - start
    mine = (position >= 0) & (position < columns)
    log_prob, own, entropy, rest = local(jnp.where(mine, position, -1), num_valid=num_valid)
    label_logits = lax.psum(jnp.where(mine, log_prob + own[..., None], 0.0), axis_name)

    log_sum_exp = _log_sum_exp(own, axis_name)
    exists = (labels >= 0) & (labels < vocab_size)
    log_prob = jnp.where(exists, label_logits - log_sum_exp[..., None], jnp.nan)
    if rest is not None:
        rest = _log_sum_exp(rest, axis_name)
    if entropy is None:
        return log_prob, log_sum_exp, None, rest
    log_share = own - log_sum_exp
    some = jnp.exp(log_share) != 0  # log 0 has no gradient: of padding alone there is no share
    log_share = jnp.where(some, log_share, 0.0)
    part = jnp.exp(log_share) * (entropy - log_share)
    return log_prob, log_sum_exp, lax.psum(jnp.where(some, part, 0.0), axis_name), rest


def _log_sum_exp(own: jax.Array, axis_name: str) -> jax.Array:
    """log sum_i e^l_i of all devices' l_i; -inf, with no gradient, where all are."""
    maximum = lax.pmax(lax.stop_gradient(own), axis_name)
    maximum = jnp.where(maximum != -jnp.inf, maximum, 0.0)
    total = lax.psum(jnp.exp(own - maximum), axis_name)
    log_total = jnp.log(jnp.where(total != 0, total, 1.0))
    return jnp.where(total != 0, maximum + log_total, -jnp.inf)
