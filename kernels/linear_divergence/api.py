"""The linear divergence head: two hidden states and two heads in, a divergence per token out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments, blocks, dispatch, on_tpu
from jaxdistill.kernels.linear_cross_entropy import sharded
from jaxdistill.kernels.linear_divergence import kinds, pallas_tpu, reference, xla
from jaxdistill.kernels.linear_divergence.kinds import KINDS, MIXTURES

IMPLEMENTATIONS = {
    "pallas": pallas_tpu.linear_divergence,
    "xla": xla.linear_divergence,
    "reference": reference.linear_divergence,
}
Model = tuple[jax.Array, jax.Array]  # hidden states and head


def linear_divergence(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    *,
    kind: str = "forward_kl",
    share: jax.typing.ArrayLike | None = None,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    head_layout: str = "vd",
    axis_name: str | None = None,
    teacher_gradient: bool = False,
    implementation: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> jax.Array:
    """Divergence of student and teacher distributions per token, without logits in memory.

        Q = softmax(student logits / temperature), P = softmax(teacher logits / temperature)
        forward_kl        KL(P || Q) = sum_v P (log P - log Q)
        reverse_kl        KL(Q || P)
        symmetric_kl      (KL(P || Q) + KL(Q || P)) / 2
        jensen_shannon    share KL(P || M) + (1 - share) KL(Q || M),  M = share P + (1 - share) Q
        skew_forward_kl   KL(P || share P + (1 - share) Q)
        skew_reverse_kl   KL(Q || (1 - share) P + share Q)
        total_variation   sum_v |P - Q| / 2

    No gradient flows into the share or the temperature, nor into the teacher's arguments unless
    asked for; nor ever into the mixture of "skew_reverse_kl_fixed_mixture", which else is as
    without the suffix.

    Args:
      student_hidden, teacher_hidden: `[..., Ds]` and `[..., Dt]`, floating, same leading shape.
      student_head, teacher_head: `[V, D]` ("vd") or `[D, V]` ("dv"). Their padded vocabularies may
        differ where `vocab_size` says how many columns the two share.
      kind: one of the names above. The KLs take one sweep over the vocabulary, the others two.
      share: scalar for the kinds with a mixture, of "jensen_shannon" in (0, 1), of the skew KLs in
        [0, 1). No other kind has one.
      temperature: scalar above 0, for both sides. The value is not multiplied by its square.
      vocab_size: columns from here on are padding and do not exist; default all count.
      student_soft_cap, teacher_soft_cap: bounds of the raw logits, `cap * tanh(raw / cap)`.
      head_layout: which way round both heads lie.
      axis_name: inside shard_map, the mesh axis over which both heads' vocabularies are split: V is
        then what one device has, vocab_size counts over all of them, and hidden states and the
        returned values are the same on every device of this axis.
      teacher_gradient: whether the teacher is trained too. Costs one more forward sweep (or two):
        its gradient is the student's of the kind with both models swapped.
      implementation: "auto", "pallas" (TPU kernels), "xla" (lean) or "reference" (full logits). A
        name that cannot serve raises; "auto" logs what it chose at level INFO, once. It takes
        "pallas" where the default backend is a TPU, in a process of one device or inside
        shard_map (a jit over several devices cannot split a kernel), and the arguments allow it.
      chunk_tokens, chunk_vocab: size of the tile of logits that exists at a time; default about 64
        MiB in float32 ("xla"), or what fits VMEM ("pallas": multiples of 16 and 128).

    Returns:
      `[...]`, float32, nats. Sums run in float32, gradients come in the types of the arguments.

    Raises:
      ValueError: an argument of the wrong shape, type or range.
      ImplementationError: a ValueError too: an unknown implementation, or one that cannot serve:
        "pallas" in a program lowered for anything but a TPU, or for types, chunks or widths it
        does not take.

    Source: arXiv 1503.02531 (forward), 2306.08543 (reverse), 2306.13649 (Jensen-Shannon),
      2402.03898 (skew), 2503.07067 (fixed mixture), 2403.00858 (total variation).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import linear_divergence
      >>> hidden = np.ones((1, 2), np.float32)
      >>> student, teacher = np.zeros((2, 2), np.float32), np.eye(2, dtype=np.float32)
      >>> print(linear_divergence(hidden, student, hidden, teacher))  # both uniform
      [0.]
    """
    student = jnp.asarray(student_hidden), jnp.asarray(student_head)
    teacher = jnp.asarray(teacher_hidden), jnp.asarray(teacher_head)
    check_kind(kind, share)
    columns = _count_columns(student, teacher, head_layout, vocab_size, axis_name)
    arguments.check_positive("temperature", temperature)
    soft_caps = student_soft_cap, teacher_soft_cap
    for name, cap in zip(("student_soft_cap", "teacher_soft_cap"), soft_caps, strict=True):
        if cap is not None:
            arguments.check_positive(name, cap)
    chunks = chunk_tokens, chunk_vocab
    for name, size in zip(("chunk_tokens", "chunk_vocab"), chunks, strict=True):
        arguments.check_chunk(name, size)
    own = columns if axis_name is None else student[1].shape[arguments.VOCABULARY_AXIS[head_layout]]
    available = on_tpu.best_first(
        IMPLEMENTATIONS,
        lambda: blocks.check("linear_divergence", (student, teacher), own, chunks),
    )
    function = functools.partial(
        dispatch.choose("linear_divergence", implementation, available),
        temperature=lax.stop_gradient(jnp.asarray(temperature, jnp.float32)),
        vocab_axis=arguments.VOCABULARY_AXIS[head_layout],
        vocab_size=columns,
        axis_name=axis_name,
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
    share = lax.stop_gradient(jnp.asarray(0.0 if share is None else share, jnp.float32))
    values = _towards_student(function, kind, share, student, teacher, soft_caps)
    if not teacher_gradient or kind not in kinds.SWAPPED:
        return values
    other, other_share = kinds.swapped(kind, share)
    swapped = _towards_student(function, other, other_share, teacher, student, soft_caps[::-1])
    return values + (swapped - lax.stop_gradient(swapped))  # 0 with the teacher's gradient


def _towards_student(
    function: Callable[..., jax.Array],
    kind: str,
    share: jax.Array,
    student: Model,
    teacher: Model,
    soft_caps: tuple[float | None, float | None],
) -> jax.Array:
    return function(
        *student,
        *lax.stop_gradient(teacher),
        kind=kind,
        share=share,
        student_soft_cap=soft_caps[0],
        teacher_soft_cap=soft_caps[1],
    )


def _count_columns(
    student: Model,
    teacher: Model,
    head_layout: str,
    vocab_size: int | None,
    axis_name: str | None,
) -> int:
    """The columns that count, on all devices together; ValueError where the models do not fit."""
    if axis_name is None:
        return arguments.check_two_heads(student, teacher, head_layout, vocab_size)
    own = arguments.check_two_heads(student, teacher, head_layout, None)
    for name, (hidden, head) in (("student", student), ("teacher", teacher)):
        sharded.check_axis(axis_name, head)
        if axis_name in jax.typeof(hidden).manual_axis_type.varying:
            raise ValueError(
                f"{name}_hidden must be the same on every device of axis {axis_name!r}, over which "
                "the head is split, but it varies over it: gather it first"
            )
    return sharded.count_columns(own, "the heads", axis_name, vocab_size)


def check_kind(kind: str, share: jax.typing.ArrayLike | None) -> None:
    """Raise ValueError unless the kind exists and has the share it needs."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, but it is {kind!r}")
    if kind not in MIXTURES:
        if share is not None:
            raise ValueError(f"share must be None for kind {kind!r}, but it is {share}")
        return
    if share is None or jnp.ndim(share) != 0:
        raise ValueError(f"share must be a scalar for kind {kind!r}, but it is {share}")
    if not arguments.is_concrete(share):
        return
    number, lowest = float(jax.device_get(share)), "(0" if kind == "jensen_shannon" else "[0"
    if not (0 < number < 1 or (number == 0 and lowest == "[0")):
        raise ValueError(f"share must lie in {lowest}, 1) for kind {kind!r}, but it is {number}")
