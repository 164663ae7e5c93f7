"""From logits to per-token values, and from per-token values to one number.

A mask enters only here. Reductions return `Weighted(sum, weight)`: add those of microbatches and
devices, and divide once at the very end.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import expectation, label_value, log_softmax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighted:
    """A sum and the weight it is to be divided by; scalars, float32.

    Example:
      >>> from jaxdistill.losses import Weighted, token_mean
      >>> import numpy as np
      >>> short = token_mean(np.array([3.0, 0.0]), np.array([1, 0]))
      >>> long = token_mean(np.array([1.0, 1.0]), np.array([1, 1]))
      >>> print((short + long).mean().round(4))  # 5 / 3, not the mean of the means 3 and 1
      1.6667
    """

    sum: jax.Array
    weight: jax.Array

    def __add__(self, other: "Weighted") -> "Weighted":
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    def mean(self) -> jax.Array:
        """sum / weight, and 0 where the weight is 0: a batch with nothing in it, not NaN."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.sum / jnp.where(empty, 1.0, self.weight))


def _kept(values: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Values and mask of one shape in float32; values are 0 where the mask is."""
    values = jnp.asarray(values).astype(jnp.float32)
    mask = checks.as_tokens("mask", mask, values.shape)
    return jnp.where(mask != 0, values, 0.0), mask


def by_sequence(
    values: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    segment_ids: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """Masked sums and weights of each sequence: `[..., 1]`, or `[..., T]` if rows are packed."""
    values, mask = _kept(values, mask)
    if values.ndim < 1:
        raise ValueError("values must have shape [..., T], but they are a scalar")
    if segment_ids is None:
        return jnp.sum(values * mask, -1, keepdims=True), jnp.sum(mask, -1, keepdims=True)
    ids = checks.as_segments(segment_ids, values.shape)
    changes = (ids[..., 1:] != ids[..., :-1]).astype(jnp.int32)
    runs = jnp.concatenate([jnp.zeros_like(ids[..., :1]), jnp.cumsum(changes, -1)], -1)
    mask = jnp.where(ids > 0, mask, 0.0)
    length = values.shape[-1]

    def sum_runs(x: jax.Array) -> jax.Array:
        def one_row(x: jax.Array, runs: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(x, runs, num_segments=length)

        rows = jax.vmap(one_row)(x.reshape(-1, length), runs.reshape(-1, length))
        return rows.reshape(values.shape)

    return sum_runs(values * mask), sum_runs(mask)


def token_mean(values: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> Weighted:
    """Mean over tokens: every token weighs the same, long sequences count for more.

        sum = sum_i mask_i values_i;  weight = sum_i mask_i

    Args:
      values: `[...]` of any rank.
      mask: `[...]` of the same shape, boolean or weights. Where it is 0 the value counts for
        nothing, be it NaN, and receives no gradient.

    Returns:
      Weighted, in the unit of `values` and in tokens.

    Raises:
      ValueError: shapes differ.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import token_mean
      >>> print(token_mean(np.array([1.0, 2.0, np.nan]), np.array([1, 1, 0])).mean())
      1.5
    """
    values, mask = _kept(values, mask)
    return Weighted(jnp.sum(values * mask), jnp.sum(mask))


def sequence_mean(
    values: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> Weighted:
    """Mean over sequences of each one's token mean: every sequence weighs the same.

        sum = sum_b (sum_t mask_bt values_bt / sum_t mask_bt);  weight = number of sequences

    A sequence without a kept token is padding and does not count.

    Args:
      values: `[..., T]`.
      mask: `[..., T]`, boolean or weights.
      segment_ids: `[..., T]` integers where several sequences are packed into a row: each run of
        one id is a sequence. Default: a row is a sequence.

    Returns:
      Weighted, in the unit of `values` and in sequences.

    Raises:
      ValueError: shapes differ, or the arrays have no axis.

    Source: the reduction of GRPO, arXiv 2402.03300.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sequence_mean
      >>> values, mask = np.array([[1.0, 3.0], [5.0, 9.0]]), np.array([[1, 1], [1, 0]])
      >>> print(sequence_mean(values, mask).mean())  # (2 + 5) / 2
      3.5
    """
    sums, weights = by_sequence(values, mask, segment_ids)
    counted = weights != 0
    means = jnp.where(counted, sums / jnp.where(counted, weights, 1.0), 0.0)
    return Weighted(jnp.sum(means), jnp.sum(counted.astype(jnp.float32)))


def sequence_sum(
    values: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    divisor: jax.typing.ArrayLike = 1.0,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> Weighted:
    """Mean over sequences of each one's token sum over a constant: no bias by length.

        sum = sum_bt mask_bt values_bt / divisor;  weight = number of sequences

    A sequence without a kept token is padding and does not count.

    Args:
      values: `[..., T]`.
      mask: `[..., T]`, boolean or weights.
      divisor: scalar above 0, such as the longest length allowed.
      segment_ids: as in `sequence_mean`.

    Returns:
      Weighted, in the unit of `values` and in sequences.

    Raises:
      ValueError: shapes differ, the arrays have no axis, or the divisor is not above 0.

    Source: the reduction of Dr. GRPO, arXiv 2503.20783.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sequence_sum
      >>> values, mask = np.array([[1.0, 3.0], [5.0, 9.0]]), np.array([[1, 1], [1, 0]])
      >>> print(sequence_sum(values, mask, divisor=2).mean())  # (4 + 5) / 2 / 2
      2.25
    """
    checks.check_positive("divisor", divisor)
    sums, weights = by_sequence(values, mask, segment_ids)
    total = jnp.sum(sums) / jnp.asarray(divisor, jnp.float32)
    return Weighted(total, jnp.sum((weights != 0).astype(jnp.float32)))


def sequence_log_prob(
    log_probs: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, average: bool = False
) -> jax.Array:
    """Log-probability of each sequence from those of its tokens: their sum, or their mean.

        sum_t mask_t log_probs_t        (/ sum_t mask_t if average)

    Args:
      log_probs: `[..., T]`; one sequence a row, not packed.
      mask: `[..., T]`, boolean or weights.
      average: whether to divide by the kept tokens, as length-normalised objectives do.

    Returns:
      `[...]`, float32, nats, or nats per token if average; 0 for a row without a kept token.

    Raises:
      ValueError: shapes differ, or the arrays have no axis.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sequence_log_prob
      >>> log_probs, mask = np.array([[-1.0, -2.0, -9.0]]), np.array([[1, 1, 0]])
      >>> print(sequence_log_prob(log_probs, mask))
      [-3.]
      >>> print(sequence_log_prob(log_probs, mask, average=True))
      [-1.5]
    """
    sums, weights = by_sequence(log_probs, mask, None)
    if average:
        sums = sums / jnp.where(weights == 0, 1.0, weights)
    return sums[..., 0]


class Shifted(NamedTuple):
    """What `shift` returns: `labels` int32 and `mask` float32, both `[..., T]`."""

    labels: jax.Array
    mask: jax.Array


def shift(
    tokens: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None = None,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> Shifted:
    """Pair positions with the token each one predicts: the only place where anything is shifted.

        labels[t] = tokens[t + 1];  mask[t] = mask[t + 1] [segment[t] = segment[t + 1] > 0]

    The last position predicts nothing: its label is 0 and masked out.

    Args:
      tokens: `[..., T]` integers.
      mask: `[..., T]`, boolean or weights: which tokens are targets. Default all.
      segment_ids: `[..., T]` integers of packed rows, 0 for padding. Default one sequence a row.

    Returns:
      Shifted(labels, mask), to be used with logits or hidden states of all T positions.

    Raises:
      ValueError: shapes differ, or `tokens` are not integers.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import shift
      >>> labels, mask = shift(np.array([5, 6, 7, 8]), segment_ids=np.array([1, 1, 2, 2]))
      >>> print(labels, mask)
      [6 7 8 0] [1. 0. 1. 0.]
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers with shape [..., T], "
            f"but they are {tokens.dtype} with shape {tokens.shape}"
        )
    kept = jnp.ones(tokens.shape, jnp.float32)
    if mask is not None:
        kept = checks.as_tokens("mask", mask, tokens.shape)
    shifted = _next(kept)
    if segment_ids is not None:
        segments = checks.as_segments(segment_ids, tokens.shape)
        shifted *= ((segments == _next(segments)) & (segments > 0)).astype(jnp.float32)
    return Shifted(_next(tokens).astype(jnp.int32), shifted)


def _next(array: jax.Array) -> jax.Array:
    """array[..., t + 1] at t, and 0 at the end."""
    return jnp.concatenate([array[..., 1:], jnp.zeros_like(array[..., :1])], axis=-1)


def log_probs(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Log-probability of each label.

        log softmax(logits / temperature)[label]

    Args:
      logits: `[..., V]`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      temperature: scalar above 0.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import log_probs
      >>> print(log_probs(np.zeros((2, 4)), np.array([0, 3])).round(4))  # log(1/4)
      [-1.3863 -1.3863]
    """
    log_p = log_softmax("logits", logits, temperature, vocab_size)
    return label_value(log_p, labels)


def entropy(
    logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Entropy of each position's distribution.

        -sum_v p_v log p_v,  p = softmax(logits / temperature)

    Args:
      logits: `[..., V]`; -inf is a column of probability 0.
      temperature: scalar above 0.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats, in [0, log V].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import entropy
      >>> print(entropy(np.zeros(4)).round(4))  # log 4
      1.3863
    """
    log_p = log_softmax("logits", logits, temperature, vocab_size)
    return -expectation(log_p, log_p)
