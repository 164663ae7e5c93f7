"""LoRAMoE's balance of experts by type of sample."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.feature_arguments import ArrayLike, as_features, row_mask
from jaxdistill.losses.reduce import Weighted, by_sequence


def localized_balance(
    gates: ArrayLike,
    sample_type: ArrayLike,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    *,
    delta: float = 0.1,
    form: str = "squared_mean",
    average_tokens: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Weighted:
    """LoRAMoE's localised balancing constraint: experts equally used within their half.

        form "squared_mean":  var(Z) / (mean(Z)^2 + 1e-10)        form "mean":  var(Z) / mean(Z)
        Z_mi = I_mi sum_t gates_mti,  I_mi = 1 + delta if expert i is of sample m's half
        else 1 - delta

    Variance (with count - 1) and mean are over samples and experts. Type 1 goes with the first half
    of the experts, type 0 with the second, as in the authors' code. At the minimum Z is constant,
    so the half marked 1 + delta is used *less* on its type: the halves specialise, under swapped
    names. One value for the batch and for one layer; add those of all layers, times beta.

    Args:
      gates: `[B, T, E]`, each token's softmax over E experts, E even.
      sample_type: `[B]` integers, or `[B, T]` with segment_ids: 0 for world knowledge (closed-book
        answers), 1 for other tasks.
      mask: `[B, T]`, boolean: tokens that count; a sample without any does not. The authors' code
        has no mask, so there padding and prompts count.
      segment_ids: `[B, T]` integers where several samples are packed into a row, 0 for padding;
        default a row is a sample.
      delta: in [0, 1]; 0 is the plain balance of experts.
      form: "squared_mean" as in the authors' code, "mean" as the paper writes.
      average_tokens: whether the mean over tokens takes the place of the sum, with which long
        samples dominate.
      axis_name: mesh axes over which the batch is split, inside shard_map, for the statistics of
        all devices; by default, as in the authors' code, each device has its own.

    Returns:
      Weighted, in samples.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2312.09979.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import localized_balance
      >>> gates = np.array([[[0.4, 0.6]], [[0.6, 0.4]]])
      >>> print(localized_balance(gates, np.array([1, 0]), delta=0.2).mean().round(4))
      0.0
      >>> print(localized_balance(gates, np.array([0, 1]), delta=0.2).mean().round(4))
      0.1972
    """
    checks.check_between("delta", delta, 0.0, 1.0)
    checks.check_option("form", form, ("squared_mean", "mean"))
    gates = as_features("gates", gates, "[B, T, E]")
    if gates.shape[-1] % 2:
        raise ValueError(
            f"gates must have an even number of experts, but they have {gates.shape[-1]}"
        )
    types = _types(sample_type, gates.shape[: 1 if segment_ids is None else 2])
    marked = _marked(types.reshape(types.shape[0], -1), gates.shape[-1])
    z, tokens = _by_sample(
        gates * jnp.where(marked, 1.0 + delta, 1.0 - delta),
        row_mask(mask, gates.shape[:-1]),
        segment_ids,
    )
    if average_tokens:
        z /= jnp.maximum(tokens, 1.0)
    return _dispersion(z, (tokens > 0).astype(jnp.float32), form, axis_name)


def _types(sample_type: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Checked integers of this shape, 0 or 1 where that can be seen."""
    types = jnp.asarray(sample_type)
    if types.shape != shape or not jnp.issubdtype(types.dtype, jnp.integer):
        raise ValueError(
            f"sample_type must be integers with shape {shape}, "
            f"but they are {types.dtype} with shape {types.shape}"
        )
    if checks.is_concrete(types):
        others = np.setdiff1d(np.asarray(types), (0, 1))
        if others.size:
            raise ValueError(f"sample_type must be 0 or 1, but {others[0]} is among them")
    return types


def _marked(types: jax.Array, experts: int) -> jax.Array:
    """`[..., E]`, whether an expert is of the half that goes with the type."""
    in_first_half = jnp.arange(experts) < experts // 2
    return (types[..., None] == 1) == jnp.broadcast_to(in_first_half, (*types.shape, experts))


def _by_sample(
    gates: jax.Array, keep: jax.Array, segment_ids: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Sums over each sample's tokens, and their number: `[B, E, S]` of S samples a row."""
    gates = jnp.moveaxis(gates, -1, -2)
    if segment_ids is not None:
        ids = checks.as_segments(segment_ids, keep.shape)
        segment_ids = jnp.broadcast_to(ids[:, None], gates.shape)
    return by_sequence(gates, jnp.broadcast_to(keep[:, None], gates.shape), segment_ids)


def _dispersion(
    z: jax.Array, counted: jax.Array, form: str, axis_name: str | tuple[str, ...] | None
) -> Weighted:
    """Variance of what is counted over its mean, or the square of that."""

    def everywhere(total: jax.Array) -> jax.Array:
        return total if axis_name is None else lax.psum(total, axis_name)

    count = everywhere(jnp.sum(counted))
    mean = everywhere(jnp.sum(z)) / jnp.maximum(count, 1.0)
    squares = everywhere(jnp.sum((z - mean) ** 2 * counted))
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    scale = mean**2 + 1e-10 if form == "squared_mean" else jnp.where(mean > 0, mean, 1.0)
    samples = jnp.sum(counted[:, 0])
    return Weighted(variance / scale * samples, samples)
