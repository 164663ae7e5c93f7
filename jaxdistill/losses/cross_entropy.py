"""Cross-entropy against labels or against a soft target distribution, and top-k accuracy."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import label_value


def cross_entropy(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Negative log-likelihood of each label.

        -(1 - a) log p_label - (a / V) sum_v log p_v + z (log sum_v exp logits_v)^2
        p = softmax(logits), a = label_smoothing, z = z_loss, V = vocab_size

    Args:
      logits: `[..., V]`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      label_smoothing: in [0, 1]; the share of the target spread evenly over the vocabulary.
      z_loss: at least 0; keeps the log-normaliser near 0 (1e-4 is common).
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: label smoothing arXiv 1512.00567; z-loss arXiv 2204.02311.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import cross_entropy
      >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> print(cross_entropy(logits, np.array([0, 1])).round(4))
      [0.2395 1.0986]
    """
    checks.check_between("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.check_between("z_loss", z_loss, 0.0, float("inf"))
    logits = checks.as_logits("logits", logits, vocab_size)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    loss = log_normalizer - label_value(logits, labels)
    if label_smoothing:
        spread = log_normalizer - jnp.mean(logits, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    if z_loss:
        loss += z_loss * log_normalizer**2
    return loss


def soft_cross_entropy(
    logits: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    *,
    vocab_size: int | None = None,
) -> jax.Array:
    """Cross-entropy against a distribution.

        -sum_v targets_v log softmax(logits)_v

    No gradient flows into the targets.

    Args:
      logits: `[..., V]`.
      targets: `[..., V]` probabilities; they are used as given and not normalised.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import soft_cross_entropy
      >>> print(soft_cross_entropy(np.zeros((1, 4)), np.full((1, 4), 0.25)).round(4))
      [1.3863]
    """
    log_q = jax.nn.log_softmax(checks.as_logits("logits", logits, vocab_size))
    targets = lax.stop_gradient(checks.as_logits("targets", targets, vocab_size))
    checks.check_same_shape("targets", targets, "logits", log_q)
    return -jnp.sum(jnp.where(targets != 0, targets * log_q, 0.0), axis=-1)


def top_k_accuracy(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    k: int = 1,
    vocab_size: int | None = None,
) -> jax.Array:
    """Whether each label is among the k largest logits; its mean is the top-k accuracy.

        1 if #(v: logits_v > logits_label, or equal and v < label) < k, else 0

    Equal logits rank by their index, as in argmax, so constant logits do not pass for right. No
    gradient flows into it.

    Args:
      logits: `[..., V]`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      k: at least 1 and at most vocab_size.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, 0 or 1; NaN where a logit is NaN.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import top_k_accuracy
      >>> logits = np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
      >>> print(top_k_accuracy(logits, np.array([2, 1]), k=2))
      [1. 0.]
    """
    logits = lax.stop_gradient(checks.as_logits("logits", logits, vocab_size))
    checks.check_between("k", k, 1, logits.shape[-1])
    own = label_value(logits, labels)[..., None]
    column = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    before = column < jnp.asarray(labels, jnp.int32)[..., None]
    ahead = jnp.sum(((logits > own) | ((logits == own) & before)).astype(jnp.int32), axis=-1)
    invalid = jnp.isnan(logits).any(-1) | jnp.isnan(own[..., 0])
    return jnp.where(invalid, jnp.nan, (ahead < k).astype(jnp.float32))
