"""Divergences of two models from their hidden states and heads."""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from jaxdistill.kernels import arguments, linear_divergence
from jaxdistill.kernels.over_tokens import Model, over_tokens
from jaxdistill.losses import divergence
from jaxdistill.losses.distribution import times_temperature_squared

ArrayLike = jax.typing.ArrayLike


class TileOptions(TypedDict, total=False):
    """Options of both heads, whichever way the logits are gone through."""

    vocab_size: int | None
    student_soft_cap: float | None
    teacher_soft_cap: float | None
    head_layout: str


class KernelOptions(TileOptions, total=False):
    """Options of `jaxdistill.kernels.linear_divergence`."""

    temperature: ArrayLike
    implementation: str


def forward_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[KernelOptions],
) -> jax.Array:
    """Forward KL divergence KL(P || Q) from hidden states; see `losses.forward_kl`.

        sum_v P_v (log P_v - log Q_v)        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_hidden, teacher_hidden: `[..., Ds]` and `[..., Dt]`, same leading shape.
      student_head, teacher_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      scale_by_temperature_squared: whether to multiply by temperature^2.
      temperature: scalar above 0, for both sides; default 1.
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
    models = student_hidden, student_head, teacher_hidden, teacher_head
    values = linear_divergence(*models, kind="forward_kl", **options)
    return _scaled(values, scale_by_temperature_squared, options)


def reverse_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[KernelOptions],
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
    models = student_hidden, student_head, teacher_hidden, teacher_head
    values = linear_divergence(*models, kind="reverse_kl", **options)
    return _scaled(values, scale_by_temperature_squared, options)


def symmetric_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[KernelOptions],
) -> jax.Array:
    """The mean of forward and reverse KL from hidden states; see `losses.symmetric_kl`.

        (KL(P || Q) + KL(Q || P)) / 2        (* temperature^2)

    Arguments, result, errors and stopped gradients are those of `from_hidden.forward_kl`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> print(from_hidden.symmetric_kl(hidden, student_head, hidden, teacher_head).round(4))
      [0.4394 0.    ]
    """
    models = student_hidden, student_head, teacher_hidden, teacher_head
    values = linear_divergence(*models, kind="symmetric_kl", **options)
    return _scaled(values, scale_by_temperature_squared, options)


def jensen_shannon(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[KernelOptions],
) -> jax.Array:
    """Generalised Jensen-Shannon divergence from hidden states; see `losses.jensen_shannon`.

        beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q        (* temperature^2)

    Arguments, result, errors and stopped gradients are those of `from_hidden.forward_kl`;
    beta: scalar in (0, 1).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> print(from_hidden.jensen_shannon(hidden, student_head, hidden, teacher_head).round(4))
      [0.1017 0.    ]
    """
    divergence.check_share("beta", beta, includes_zero=False)
    models = student_hidden, student_head, teacher_hidden, teacher_head
    values = linear_divergence(*models, kind="jensen_shannon", share=beta, **options)
    return _scaled(values, scale_by_temperature_squared, options)


def skew_forward_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    skew: ArrayLike = 0.1,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[KernelOptions],
) -> jax.Array:
    """Skew forward KL divergence from hidden states; see `losses.skew_forward_kl`.

        KL(P || skew P + (1 - skew) Q)        (* temperature^2)

    Arguments, result, errors and stopped gradients are those of `from_hidden.forward_kl`;
    skew: scalar in [0, 1).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> print(from_hidden.skew_forward_kl(hidden, student_head, hidden, teacher_head).round(4))
      [0.3071 0.    ]
    """
    divergence.check_share("skew", skew, includes_zero=True)
    models = student_hidden, student_head, teacher_hidden, teacher_head
    values = linear_divergence(*models, kind="skew_forward_kl", share=skew, **options)
    return _scaled(values, scale_by_temperature_squared, options)


def skew_reverse_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    skew: ArrayLike = 0.1,
    fixed_mixture: bool = False,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[KernelOptions],
) -> jax.Array:
    """Skew reverse KL divergence from hidden states; see `losses.skew_reverse_kl`.

        KL(Q || (1 - skew) P + skew Q)        (* temperature^2)

    Arguments, result, errors and stopped gradients are those of `from_hidden.forward_kl`;
    skew: scalar in [0, 1); fixed_mixture: whether the mixture is a constant.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> print(from_hidden.skew_reverse_kl(hidden, student_head, hidden, teacher_head).round(4))
      [0.3653 0.    ]
    """
    divergence.check_share("skew", skew, includes_zero=True)
    kind = "skew_reverse_kl_fixed_mixture" if fixed_mixture else "skew_reverse_kl"
    models = student_hidden, student_head, teacher_hidden, teacher_head
    values = linear_divergence(*models, kind=kind, share=skew, **options)
    return _scaled(values, scale_by_temperature_squared, options)


def total_variation(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    **options: Unpack[KernelOptions],
) -> jax.Array:
    """Total variation distance from hidden states; see `losses.total_variation`.

        sum_v |P_v - Q_v| / 2

    Arguments, result, errors and stopped gradients are those of `from_hidden.forward_kl`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden = np.eye(2, dtype=np.float32)
      >>> teacher_head = np.log(np.array([[0.9, 0.5], [0.1, 0.5]], np.float32))
      >>> student_head = np.zeros((2, 2), np.float32)
      >>> values = from_hidden.total_variation(hidden, student_head, hidden, teacher_head)
      >>> print(np.asarray(values).round(4))
      [0.4 0. ]
    """
    models = student_hidden, student_head, teacher_hidden, teacher_head
    return linear_divergence(*models, kind="total_variation", **options)


def adaptive_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    head_mass: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[TileOptions],
) -> jax.Array:
    """AKL from hidden states, a tile of tokens at a time; see `losses.adaptive_kl`.

        (g_H KL(P || Q) + g_T KL(Q || P)) / (g_H + g_T)        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_hidden, student_head, teacher_hidden, teacher_head: as for `from_hidden.forward_kl`.
      head_mass: scalar in [0, 1].
      temperature, scale_by_temperature_squared, vocab_size, student_soft_cap, teacher_soft_cap,
        head_layout: as for `from_hidden.forward_kl`.

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
      >>> print(from_hidden.adaptive_kl(hidden, student_head, hidden, teacher_head).round(4))
      [0.4394 0.    ]
    """

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return divergence.adaptive_kl(
            student,
            teacher,
            head_mass=head_mass,
            temperature=temperature,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )

    models = student_hidden, student_head, teacher_hidden, teacher_head
    return over_student_and_teacher(loss, *models, **options)


def over_student_and_teacher(
    function: Callable[..., Any],
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    per_token: Mapping[str, jax.Array] | None = None,
    *,
    vocab_size: int | None = None,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    head_layout: str = "vd",
) -> Any:
    """function(student logits, teacher logits, *per_token) by tiles; the teacher is a constant."""
    student = jnp.asarray(student_hidden), jnp.asarray(student_head)
    teacher = jnp.asarray(teacher_hidden), jnp.asarray(teacher_head)
    arguments.check_two_heads(student, teacher, head_layout, vocab_size)
    models = (
        Model("student_", *student, vocab_size, student_soft_cap),
        Model("teacher_", *teacher, vocab_size, teacher_soft_cap, frozen=True),
    )
    return over_tokens(function, models, per_token, head_layout=head_layout)


def _scaled(
    values: jax.Array, scale_by_temperature_squared: bool, options: KernelOptions
) -> jax.Array:
    temperature = options.get("temperature", 1.0)
    return times_temperature_squared(values, temperature, scale_by_temperature_squared)
