"""The linear divergence head: two hidden states and two heads in, a divergence per token out."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments, dispatch
from jaxdistill.kernels.linear_divergence import reference, xla
from jaxdistill.kernels.linear_divergence.kinds import KINDS, MIXTURES

IMPLEMENTATIONS = {"xla": xla.linear_divergence, "reference": reference.linear_divergence}


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

    No gradient flows into the teacher's arguments, the share or the temperature; nor into the
    mixture of "skew_reverse_kl_fixed_mixture", which else is as without the suffix.

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
      implementation: "auto", "xla" (lean) or "reference" (full logits). A name that cannot serve
        raises; "auto" logs what it chose at level INFO, once.
      chunk_tokens, chunk_vocab: size of the tile of logits that exists at a time ("xla" only);
        default about 64 MiB in float32.

    Returns:
      `[...]`, float32, nats. Sums run in float32, gradients come in the student's types.

    Raises:
      ValueError: an argument of the wrong shape, type or range, or an unknown implementation.

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
    student_hidden, student_head = jnp.asarray(student_hidden), jnp.asarray(student_head)
    teacher_hidden = lax.stop_gradient(jnp.asarray(teacher_hidden))
    teacher_head = lax.stop_gradient(jnp.asarray(teacher_head))
    _check_kind(kind, share)
    columns = arguments.check_two_heads(
        (student_hidden, student_head), (teacher_hidden, teacher_head), head_layout, vocab_size
    )
    arguments.check_positive("temperature", temperature)
    for name, cap in (
        ("student_soft_cap", student_soft_cap),
        ("teacher_soft_cap", teacher_soft_cap),
    ):
        if cap is not None:
            arguments.check_positive(name, cap)
    arguments.check_chunk("chunk_tokens", chunk_tokens)
    arguments.check_chunk("chunk_vocab", chunk_vocab)
    function = dispatch.choose("linear_divergence", implementation, IMPLEMENTATIONS)
    return function(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        lax.stop_gradient(jnp.asarray(temperature, jnp.float32)),
        lax.stop_gradient(jnp.asarray(0.0 if share is None else share, jnp.float32)),
        kind=kind,
        vocab_size=columns,
        student_soft_cap=student_soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocab_axis=arguments.VOCABULARY_AXIS[head_layout],
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )


def _check_kind(kind: str, share: jax.typing.ArrayLike | None) -> None:
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
