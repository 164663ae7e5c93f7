"""Preference objectives from hidden states and heads: log-probabilities by the lean head.

A pair is one row, `[B, 2, T, D]` with the chosen answer at 0 and the rejected one at 1: the model
runs on the same arrays as `[2 B, T]`, and when B is sharded a pair stays on its device. labels and
mask are those of `losses.shift`: the mask is not 0 where the label is a token of the answer.
"""

from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import preference, reduce, reference_free
from jaxdistill.losses.from_hidden.cross_entropy import log_probs

ArrayLike = jax.typing.ArrayLike


class HeadOptions(TypedDict, total=False):
    """Options of the head, `jaxdistill.kernels.linear_cross_entropy`; the same for both models."""

    vocab_size: int | None
    soft_cap: float | None
    head_layout: str
    implementation: str


def sequence_log_prob(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    average: bool = False,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """Log-probability of each sequence, `losses.sequence_log_prob` of `from_hidden.log_probs`.

        sum_t mask_t log p(label_t)        (/ sum_t mask_t if average)

    Compute a reference's once with this, keep the numbers, and train with `losses.dpo`.

    Args:
      hidden: `[..., T, D]`.
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[..., T]` integers in [0, vocab_size), whatever the mask: outside jit a label out of
        range raises, inside jit it gives NaN, which the mask removes.
      mask: `[..., T]`, boolean or weights.
      average: whether to divide by the kept tokens.
      vocab_size, soft_cap, head_layout, implementation: see
        `jaxdistill.kernels.linear_cross_entropy`.

    Returns:
      `[...]`, float32, nats, or nats per token if average; 0 for a sequence without a kept token.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[0, 5, 7]]), np.array([[0, 1, 1]])
      >>> print(from_hidden.sequence_log_prob(hidden, head, labels, mask).round(4))  # 2 log(1/8)
      [-4.1589]
    """
    values = log_probs(hidden, head, labels, **head_options)
    return reduce.sequence_log_prob(values, mask, average=average)


def dpo(
    hidden: ArrayLike,
    head: ArrayLike,
    reference_hidden: ArrayLike,
    reference_head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    variant: str = "sigmoid",
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    discopop_temperature: ArrayLike = 0.05,
    average: bool = False,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """DPO and its variants from hidden states; see `losses.dpo` for the formulas.

    The reference is a constant: no gradient flows into its hidden states or its head.

    Args:
      hidden, reference_hidden: `[B, 2, T, D]` and `[B, 2, T, E]`, chosen and rejected.
      head, reference_head: `[V, D]` and `[V, E]` ("vd"), or transposed ("dv").
      labels: `[B, 2, T]` integers in [0, vocab_size), as in `sequence_log_prob`.
      mask: `[B, 2, T]`, not 0 on the tokens of the answers.
      variant, beta, label_smoothing, discopop_temperature: as in `losses.dpo`.
      average: whether log-ratios are averages over tokens, `losses.dpo` with lengths.
      vocab_size, soft_cap, head_layout, implementation: of both heads.

    Returns:
      `[B]`, float32, one a pair.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 3, 4), np.float32), np.eye(8, 4, dtype=np.float32)
      >>> labels, mask = np.array([[[0, 5, 7], [0, 6, 0]]]), np.array([[[0, 1, 1], [0, 1, 0]]])
      >>> print(from_hidden.dpo(hidden, head, hidden, head, labels, mask).round(4))
      [0.6931]
    """
    policy = _pair(hidden, head, labels, mask, head_options)
    reference = _frozen(reference_hidden, reference_head, labels, mask, head_options)
    lengths = _lengths(mask) if average else (None, None)
    return preference.dpo(
        *policy,
        reference[..., 0],
        reference[..., 1],
        variant=variant,
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_temperature=discopop_temperature,
        chosen_length=lengths[0],
        rejected_length=lengths[1],
    )


def rpo(
    hidden: ArrayLike,
    head: ArrayLike,
    reference_hidden: ArrayLike,
    reference_head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    nll_weight: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """DPO plus the chosen answer's likelihood from hidden states; see `losses.rpo`.

    Arguments, result, errors and stopped gradients are those of `from_hidden.dpo`; beta,
    nll_weight and label_smoothing those of `losses.rpo`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[[0, 5, 7], [0, 6, 0]]]), np.array([[[0, 1, 1], [0, 1, 0]]])
      >>> print(from_hidden.rpo(hidden, head, hidden, head, labels, mask).round(4))  # log 2 + log 8
      [2.7726]
    """
    reference = _frozen(reference_hidden, reference_head, labels, mask, head_options)
    return preference.rpo(
        *_pair(hidden, head, labels, mask, head_options),
        reference[..., 0],
        reference[..., 1],
        _lengths(mask)[0],
        beta=beta,
        nll_weight=nll_weight,
        label_smoothing=label_smoothing,
    )


def kto(
    hidden: ArrayLike,
    head: ArrayLike,
    reference_hidden: ArrayLike,
    reference_head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    desirable: ArrayLike,
    reference_point: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """KTO from hidden states; see `losses.kto` for the formula and the last arguments.

    The reference is a constant: no gradient flows into its hidden states, its head or the point.

    Args:
      hidden, reference_hidden: `[B, T, D]` and `[B, T, E]`: single answers, not pairs.
      head, reference_head: `[V, D]` and `[V, E]` ("vd"), or transposed ("dv").
      labels: `[B, T]` integers in [0, vocab_size), as in `sequence_log_prob`.
      mask: `[B, T]`, not 0 on the tokens of the answers.
      desirable, reference_point: `[B]` and a scalar, as in `losses.kto`.
      beta, desirable_weight, undesirable_weight: as in `losses.kto`.
      vocab_size, soft_cap, head_layout, implementation: of both heads.

    Returns:
      `[B]`, float32, in [0, weight].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 3, 4), np.float32), np.eye(8, 4, dtype=np.float32)
      >>> inputs = hidden, head, hidden, head, np.array([[0, 5, 7]]), np.array([[0, 1, 1]])
      >>> print(from_hidden.kto(*inputs, np.array([True]), 0.0))
      [0.5]
    """
    return preference.kto(
        sequence_log_prob(hidden, head, labels, mask, **head_options),
        _frozen(reference_hidden, reference_head, labels, mask, head_options),
        desirable,
        reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def orpo(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """ORPO from hidden states; see `losses.orpo`, here with the likelihood of the answer alone.

    Args:
      hidden: `[B, 2, T, D]`, chosen and rejected.
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[B, 2, T]` integers in [0, vocab_size), as in `sequence_log_prob`.
      mask: `[B, 2, T]`, not 0 on the tokens of the answers.
      beta: as in `losses.orpo`.
      vocab_size, soft_cap, head_layout, implementation: see
        `jaxdistill.kernels.linear_cross_entropy`.

    Returns:
      `[B]`, float32, nats per token.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[[0, 5, 7], [0, 6, 0]]]), np.array([[[0, 1, 1], [0, 1, 0]]])
      >>> print(from_hidden.orpo(hidden, head, labels, mask).round(4))  # log 8 + 0.1 log 2
      [2.1488]
    """
    pair = _pair(hidden, head, labels, mask, head_options)
    return reference_free.orpo(*pair, *_lengths(mask), beta=beta)


def simpo(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 0.5,
    label_smoothing: ArrayLike = 0.0,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """SimPO from hidden states; see `losses.simpo`.

    Arguments, result and errors are those of `from_hidden.orpo`; beta, gamma and label_smoothing
    those of `losses.simpo`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[[0, 5, 7], [0, 6, 0]]]), np.array([[[0, 1, 1], [0, 1, 0]]])
      >>> print(from_hidden.simpo(hidden, head, labels, mask, gamma=0.0).round(4))
      [0.6931]
    """
    return reference_free.simpo(
        *_pair(hidden, head, labels, mask, head_options),
        *_lengths(mask),
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
    )


def cpo(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    nll_weight: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """CPO from hidden states; see `losses.cpo`.

    Arguments, result and errors are those of `from_hidden.orpo`; beta, nll_weight and
    label_smoothing those of `losses.cpo`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[[0, 5, 7], [0, 6, 0]]]), np.array([[[0, 1, 1], [0, 1, 1]]])
      >>> print(from_hidden.cpo(hidden, head, labels, mask).round(4))  # log 2 + log 8
      [2.7726]
    """
    return reference_free.cpo(
        *_pair(hidden, head, labels, mask, head_options),
        _lengths(mask)[0],
        beta=beta,
        nll_weight=nll_weight,
        label_smoothing=label_smoothing,
    )


def redi(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    alpha: ArrayLike = 0.8,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """REDI from hidden states; see `losses.redi`.

    Arguments, result and errors are those of `from_hidden.orpo`; alpha is that of `losses.redi`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[[0, 5, 7], [0, 6, 0]]]), np.array([[[0, 1, 1], [0, 1, 0]]])
      >>> print(from_hidden.redi(hidden, head, labels, mask).round(4))  # 0.2 log 8
      [0.4159]
    """
    pair = _pair(hidden, head, labels, mask, head_options)
    return reference_free.redi(*pair, *_lengths(mask), alpha=alpha)


def _pair(
    hidden: ArrayLike, head: ArrayLike, labels: ArrayLike, mask: ArrayLike, options: HeadOptions
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the chosen and of the rejected answers."""
    shape = jnp.shape(labels)
    if len(shape) < 2 or shape[-2] != 2:
        raise ValueError(
            f"labels must have shape [B, 2, T], chosen and rejected, but the shape is {shape}"
        )
    log_prob = sequence_log_prob(hidden, head, labels, mask, **options)
    return log_prob[..., 0], log_prob[..., 1]


def _frozen(
    hidden: ArrayLike, head: ArrayLike, labels: ArrayLike, mask: ArrayLike, options: HeadOptions
) -> jax.Array:
    """Log-probabilities under the reference, of which nothing is kept for a backward pass."""
    hidden, head = lax.stop_gradient((jnp.asarray(hidden), jnp.asarray(head)))
    return sequence_log_prob(hidden, head, labels, mask, **options)


def _lengths(mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Kept tokens of the chosen and of the rejected answers."""
    length = jnp.sum(jnp.asarray(mask).astype(jnp.float32), axis=-1)
    return length[..., 0], length[..., 1]
