"""CurioSFT from hidden states: the student through the head kernel, the teacher tile by tile."""

from typing import Unpack

import jax

from jaxdistill.kernels.over_tokens import Model, over_tokens
from jaxdistill.losses import curio
from jaxdistill.losses.from_hidden.cross_entropy import log_probs
from jaxdistill.losses.from_hidden.preference import HeadOptions


def curio_sft(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    distillation_weight: jax.typing.ArrayLike = 1.0,
    entropy_gain: float = 0.5,
    slope: float = 2.0,
    pivot: float = 1.2,
    entropy_floor: float = 0.03,
    min_temperature: float = 1.1,
    max_temperature: float = 1.5,
    top_k: int | None = None,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """CurioSFT from hidden states; see `losses.curio_sft`.

        -l + distillation_weight (l - q)^2 / 2

    No gradient flows into the teacher, so its logits need no second look: a tile of tokens at a
    time they give q and are gone.

    Args:
      hidden, teacher_hidden: `[..., D]`, of the model and of its slow copy.
      head, teacher_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size), as for `from_hidden.dft`.
      distillation_weight, entropy_gain, slope, pivot, entropy_floor, min_temperature,
        max_temperature, top_k: see `losses.curio_sft`.
      vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.dft`, of both models;
        implementation is the student's.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.curio_sft(hidden, head, hidden, head, np.array([1])).round(4))
      [1.3863]
    """
    log_prob = log_probs(hidden, head, labels, **head_options)

    def flattened(logits: jax.Array, label: jax.Array) -> jax.Array:
        return curio.flattened_log_probs(
            logits,
            label,
            entropy_gain=entropy_gain,
            slope=slope,
            pivot=pivot,
            entropy_floor=entropy_floor,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            top_k=top_k,
        )

    teacher = Model(
        "teacher_",
        teacher_hidden,
        teacher_head,
        head_options.get("vocab_size"),
        head_options.get("soft_cap"),
        frozen=True,
    )
    layout = head_options.get("head_layout", "vd")
    of_teacher = over_tokens(flattened, (teacher,), {"labels": labels}, head_layout=layout)
    return curio.near_teacher(log_prob, of_teacher, distillation_weight)
