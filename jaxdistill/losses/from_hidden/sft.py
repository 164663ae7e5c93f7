"""The supervised fine-tuning objectives that need only log-probabilities and divergences."""

from typing import Unpack

import jax
import jax.numpy as jnp

from jaxdistill.losses import checks, sft
from jaxdistill.losses.from_hidden.cross_entropy import log_probs
from jaxdistill.losses.from_hidden.divergence import forward_kl
from jaxdistill.losses.from_hidden.preference import HeadOptions

# Of 1 - p: from log p in float32 no smaller one can be told from 0.
SMALLEST_REST = 1e-6


def dft(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """Dynamic fine-tuning from hidden states; see `losses.dft`.

        -stop_gradient(p_label) log p_label

    Args:
      hidden: `[..., D]`.
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      vocab_size, soft_cap, head_layout, implementation: see
        `jaxdistill.kernels.linear_cross_entropy`.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.dft(hidden, head, np.array([0, 3])).round(4))  # log(4) / 4
      [0.3466 0.3466]
    """
    return sft.weighted_by_probability(log_probs(hidden, head, labels, **head_options))


def asft(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    reference_hidden: jax.typing.ArrayLike,
    reference_head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    kl_weight: jax.typing.ArrayLike = 0.05,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Anchored supervised fine-tuning from hidden states; see `losses.asft`.

        -stop_gradient(p_label) log p_label + kl_weight KL(p_ref || p)

    No gradient flows into the reference. The head runs twice, once for each term.

    Args:
      hidden, reference_hidden: `[..., D]`, of the model and of its frozen start.
      head, reference_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size), as for `from_hidden.dft`.
      kl_weight: scalar of at least 0.
      vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.dft`, of both models.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.asft(hidden, head, hidden, head, np.array([0, 3])).round(4))
      [0.3466 0.3466]
    """
    checks.check_between("kl_weight", kl_weight, 0.0, float("inf"))
    anchor = forward_kl(
        hidden,
        head,
        reference_hidden,
        reference_head,
        vocab_size=vocab_size,
        student_soft_cap=soft_cap,
        teacher_soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    imitation = dft(
        hidden,
        head,
        labels,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    return imitation + jnp.asarray(kl_weight, jnp.float32) * anchor


def unlikelihood(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """Unlikelihood of tokens from hidden states; see `losses.unlikelihood`.

        -log(max(1 - p_label, 1e-6))

    The lean head gives log p alone, and where 1 - p is below 1e-6 float32 cannot tell it from 0:
    the value ends there at 13.8 nats, and its gradient is 0. The logits form has no such end.

    Arguments, result and errors are those of `from_hidden.dft`.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.unlikelihood(hidden, head, np.array([0, 3])).round(4))  # -log(3/4)
      [0.2877 0.2877]
    """
    rest = -jnp.expm1(log_probs(hidden, head, labels, **head_options))
    return -jnp.log(jnp.maximum(rest, SMALLEST_REST))
