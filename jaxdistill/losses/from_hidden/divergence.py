"""Divergences of two models from their hidden states and heads."""

import jax
import jax.numpy as jnp

from jaxdistill.kernels import linear_divergence


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
