"""The losses as functions of hidden states and a head: equal to the logits forms, never the logits.

Train with these: memory grows with a tile of about 64 MiB, not with [tokens, vocabulary].
"""

import jax
import jax.numpy as jnp

from jaxdistill.kernels import linear_cross_entropy, linear_divergence
from jaxdistill.losses import checks

__all__ = ["cross_entropy", "forward_kl", "log_probs", "reverse_kl"]


def cross_entropy(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Negative log-likelihood of each label, `losses.cross_entropy(hidden @ head.T, labels)`.

        -log p_label + z (log sum_v exp logits_v)^2
        logits = soft_cap * tanh(hidden @ head.T / soft_cap), p = softmax(logits), z = z_loss

    Args:
      hidden: `[..., D]`.
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
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
    checks.check_between("z_loss", z_loss, 0.0, float("inf"))
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


def forward_kl(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Forward KL divergence KL(P || Q) from hidden states; see `losses.forward_kl`.

        sum_v P_v (log P_v - log Q_v)        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_hidden, teacher_hidden: `[..., Ds]` and `[..., Dt]`, same leading shape.
      student_head, teacher_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      temperature: scalar above 0, for both sides.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
      student_soft_cap, teacher_soft_cap: bounds of the raw logits; default no bound.
      head_layout, implementation: see `jaxdistill.kernels.linear_divergence`.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> print(from_hidden.forward_kl(hidden, student_head, hidden, teacher_head).round(4))
      [0.3681 0.    ]
    """
    divergence = linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        kind="forward_kl",
        temperature=temperature,
        vocab_size=vocab_size,
        student_soft_cap=student_soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    return divergence * _factor(temperature, scale_by_temperature_squared)


def reverse_kl(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Reverse KL divergence KL(Q || P) from hidden states; see `losses.reverse_kl`.

        sum_v Q_v (log Q_v - log P_v)        (* temperature^2)

    Arguments, result, errors and stopped gradients are those of `from_hidden.forward_kl`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> print(from_hidden.reverse_kl(hidden, student_head, hidden, teacher_head).round(4))
      [0.5108 0.    ]
    """
    divergence = linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        kind="reverse_kl",
        temperature=temperature,
        vocab_size=vocab_size,
        student_soft_cap=student_soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    return divergence * _factor(temperature, scale_by_temperature_squared)


def _factor(temperature: jax.typing.ArrayLike, scale_by_temperature_squared: bool) -> jax.Array:
    exponent = 2.0 if scale_by_temperature_squared else 0.0
    return jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32)) ** exponent
