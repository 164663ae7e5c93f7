"""Self-supervised losses of two views of each example, over the batches of all devices.

The other examples of the batch are the negatives of one, so a value depends on the whole batch.
Inside `shard_map`, `axis_name` makes the batch that of all devices on these mesh axes; without it,
under plain jit on sharded arrays, it is the whole batch anyway.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.feature_arguments import (
    ArrayLike,
    as_features,
    product,
    row_mask,
    unit,
    zero_where_dropped,
)
from jaxdistill.losses.reduce import Weighted

AxisName = str | tuple[str, ...]


def nt_xent(
    first: ArrayLike,
    second: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 0.1,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """SimCLR's NT-Xent: tell the other view of an example from all other views of the batch.

        (l(a, b) + l(b, a)) / 2,  a = first_i, b = second_i
        l(a, b) = -log(exp(cos(a, b) / temperature) / sum_{c != a} exp(cos(a, c) / temperature))

    c runs over both views of the whole batch but a itself. The mean over rows is the paper's, over
    2N anchors; the authors' code adds the two directions, which gives twice that. Negatives of
    other devices are gathered, and the gradient flows through them; optax's ntxent sees those of
    its own device alone. A microbatch has fewer negatives: accumulation does not give the value of
    the large batch.

    Args:
      first, second: `[N, D]`, one view each of N examples; normalised here.
      mask: `[N]`, boolean: which examples exist. The others are nobody's negatives; their value is
        to be masked in the reduction too.
      temperature: scalar above 0; 0.1 in SimCLR v2, 0.5 on CIFAR.
      axis_name: mesh axes over which the batch is split, inside shard_map.

    Returns:
      `[N]`, float32, nats, one a row of this device.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: SimCLR v2, arXiv 2006.10029.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import nt_xent
      >>> views = np.eye(3)
      >>> print(nt_xent(views, views, temperature=1.0).round(4))  # log(1 + 4 / e)
      [0.9048 0.9048 0.9048]
    """
    checks.check_positive("temperature", temperature)
    one, other, keep = _views(first, second, mask)
    one, other = unit(one), unit(other)
    scale = 1.0 / lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    anchors = jnp.stack([one, other])
    rows, views, exists = jnp.arange(one.shape[0]), anchors, keep
    if axis_name is not None:
        rows += lax.axis_index(axis_name) * one.shape[0]
        views = lax.all_gather(anchors, axis_name, axis=1, tiled=True)
        exists = lax.all_gather(keep, axis_name, axis=0, tiled=True)
    logits = product("abd,vnd->abvn", anchors, views) * scale
    same_row = (rows[:, None] == jnp.arange(views.shape[1])[None, :])[None, :, None, :]
    same_view = jnp.eye(2, dtype=bool)[:, None, :, None]
    is_positive = same_row & ~same_view
    # An example that does not exist keeps its positive, so that its value, unused, is finite.
    is_candidate = ~(same_row & same_view) & (exists[None, None, None, :] | is_positive)
    logits = jnp.where(is_candidate, logits, -jnp.inf)
    positive = jnp.sum(jnp.where(is_positive, logits, 0.0), axis=(2, 3))
    return jnp.mean(jax.nn.logsumexp(logits, axis=(2, 3)) - positive, axis=0)


def barlow_twins(
    first: ArrayLike,
    second: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    off_diagonal_weight: ArrayLike = 5e-3,
    axis_name: AxisName | None = None,
) -> Weighted:
    """Barlow Twins: features of two views agree, and different features are not correlated.

        sum_i (1 - C_ii)^2 + off_diagonal_weight sum_{i != j} C_ij^2
        C_ij = mean_n z^A_ni z^B_nj,  z = (x - mean_n x) / sqrt(var_n x + 1e-5)

    One value for the batch, which depends on all its rows; it is weighted by them, so the mean over
    microbatches is that of their values, each with its own correlations.

    Args:
      first, second: `[N, D]`, one view each of N examples; standardised here.
      mask: `[N]`, boolean: which examples exist; it is needed here as the means are over them.
      off_diagonal_weight: at least 0.
      axis_name: mesh axes over which the batch is split, inside shard_map; every device returns the
        value of all, with the weight of its own rows.

    Returns:
      Weighted, in examples.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2103.03230.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import barlow_twins
      >>> views = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
      >>> print(barlow_twins(views, views).mean().round(4))
      0.0
      >>> print(barlow_twins(views, views[:, ::-1], off_diagonal_weight=0.1).mean().round(4))
      2.2
    """
    checks.check_between("off_diagonal_weight", off_diagonal_weight, 0.0, float("inf"))
    one, other, keep = _views(first, second, mask)
    own_rows = jnp.sum(keep.astype(jnp.float32))

    def everywhere(total: jax.Array) -> jax.Array:
        return total if axis_name is None else lax.psum(total, axis_name)

    count = jnp.maximum(everywhere(own_rows), 1.0)

    def standardised(rows: jax.Array) -> jax.Array:
        mean = everywhere(jnp.sum(rows, axis=0, keepdims=True)) / count
        centred = zero_where_dropped(rows - mean, keep)
        variance = everywhere(jnp.sum(centred**2, axis=0, keepdims=True)) / count
        return centred * lax.rsqrt(variance + 1e-5)

    correlation = everywhere(product("ni,nj->ij", standardised(one), standardised(other))) / count
    diagonal = jnp.eye(correlation.shape[0], dtype=bool)
    weight = jnp.asarray(off_diagonal_weight, jnp.float32)
    terms = jnp.where(diagonal, (1.0 - correlation) ** 2, weight * correlation**2)
    return Weighted(jnp.sum(terms) * own_rows, own_rows)


def _views(
    first: ArrayLike, second: ArrayLike, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both views with dropped rows set to 0, and which rows are kept."""
    one = as_features("first", first, "[N, D]")
    other = as_features("second", second, "[N, D]")
    checks.check_same_shape("second", other, "first", one)
    keep = row_mask(mask, one.shape[:1])
    return zero_where_dropped(one, keep), zero_where_dropped(other, keep), keep
