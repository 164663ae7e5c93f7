"""Cross-entropy and log-probabilities from hidden states and a head."""

import jax
import jax.numpy as jnp

from jaxdistill.kernels import linear_cross_entropy
from jaxdistill.kernels.over_tokens import over_labels
from jaxdistill.losses import checks
from jaxdistill.losses import cross_entropy as losses_of_logits


def cross_entropy(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Negative log-likelihood of each label, `losses.cross_entropy(hidden @ head.T, labels)`.

        -(1 - a) log p_label - (a / V) sum_v log p_v + z (log sum_v exp logits_v)^2
        logits = soft_cap * tanh(hidden @ head.T / soft_cap), p = softmax(logits)
        a = label_smoothing, z = z_loss, V = vocab_size

    Args:
      hidden: `[..., D]`.
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      label_smoothing: in [0, 1]; above 0 the loss goes over tiles of tokens, and has one
        implementation, "auto".
      z_loss: at least 0.
      vocab_size: columns from here on are padding and do not exist; default all count.
      soft_cap: bounds the raw logits; default no bound.
      head_layout, implementation: see `jaxdistill.kernels.linear_cross_entropy`.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> print(from_hidden.cross_entropy(hidden, head, np.array([0, 7])).round(4))
      [2.0794 2.0794]
    """
    checks.check_between("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.check_between("z_loss", z_loss, 0.0, float("inf"))
    if label_smoothing:

        def smoothed(logits: jax.Array, labels: jax.Array) -> jax.Array:
            return losses_of_logits.cross_entropy(
                logits, labels, label_smoothing=label_smoothing, z_loss=z_loss
            )

        return over_labels(
            smoothed,
            hidden,
            head,
            {"labels": labels},
            vocab_size=vocab_size,
            soft_cap=soft_cap,
            head_layout=head_layout,
            implementation=implementation,
        )
    out = linear_cross_entropy(
        hidden,
        head,
        labels,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    if not z_loss:
        return -out.log_prob
    return z_loss * out.log_sum_exp**2 - out.log_prob


def log_probs(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Log-probability of each label, `losses.log_probs(hidden @ head.T, labels)`.

    Arguments are those of `from_hidden.cross_entropy`, and `temperature`, a scalar above 0 by
    which the capped logits are divided and into which no gradient flows.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> print(from_hidden.log_probs(hidden, head, np.array([0, 7])).round(4))
      [-2.0794 -2.0794]
    """
    return linear_cross_entropy(
        hidden,
        head,
        labels,
        temperature=temperature,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    ).log_prob


def entropy(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Entropy of each position's distribution, `losses.entropy(hidden @ head.T)`.

        -sum_v p_v log p_v,  p = softmax(logits / temperature)

    Arguments are those of `from_hidden.log_probs`, without labels.

    Returns:
      `[...]`, float32, nats, in [0, log V].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.entropy(hidden, head).round(4))
      [1.3863 1.3863]
    """
    out = linear_cross_entropy(
        hidden,
        head,
        jnp.zeros(jnp.shape(hidden)[:-1], jnp.int32),
        temperature=temperature,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        with_entropy=True,
        head_layout=head_layout,
        implementation=implementation,
    )
    assert out.entropy is not None
    return out.entropy
