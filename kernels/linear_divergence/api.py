"""The linear divergence head: two hidden states and two heads in, a divergence per token out."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments, dispatch
from jaxdistill.kernels.linear_divergence import reference, xla

IMPLEMENTATIONS = {"xla": xla.linear_divergence, "reference": reference.linear_divergence}
KINDS = ("forward_kl", "reverse_kl")


def linear_divergence(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    teacher_hidden: jax.typing.ArrayLike,
    teacher_head: jax.typing.ArrayLike,
    *,
    kind: str = "forward_kl",
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

        s = student logits / temperature, Q = softmax(s);  t, P the same of the teacher
        forward_kl = sum_v P (log P - log Q);  reverse_kl = sum_v Q (log Q - log P)

    No gradient flows into the teacher's arguments or the temperature.

    Args:
      student_hidden, teacher_hidden: `[..., Ds]` and `[..., Dt]`, floating, same leading shape.
      student_head, teacher_head: `[V, D]` ("vd") or `[D, V]` ("dv"). Their padded vocabularies may
        differ where `vocab_size` says how many columns the two share.
      kind: "forward_kl" or "reverse_kl".
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

    Source: the forward KL is the objective of arXiv 1503.02531, the reverse of arXiv 2306.08543.

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
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, but it is {kind!r}")
    columns = [
        arguments.check_head("student_", student_hidden, student_head, head_layout, vocab_size),
        arguments.check_head("teacher_", teacher_hidden, teacher_head, head_layout, vocab_size),
    ]
    if columns[0] != columns[1]:
        raise ValueError(
            f"student_head and teacher_head must have one vocabulary, but they have {columns[0]} "
            f"and {columns[1]} columns: if they share the first ones, say how many by vocab_size"
        )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must have leading shape {student_hidden.shape[:-1]} as "
            f"student_hidden has, but its shape is {teacher_hidden.shape}"
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
        kind=kind,
        vocab_size=columns[0],
        student_soft_cap=student_soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocab_axis=arguments.VOCABULARY_AXIS[head_layout],
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
