"""The oracle: full float32 logits of both models, differentiated by jax."""

import jax
import jax.numpy as jnp
from jaxdistill.kernels.linear_cross_entropy.reference import full_logits


def linear_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
    *,
    kind: str,
    vocab_size: int,
    student_soft_cap: float | None,
    teacher_soft_cap: float | None,
    vocab_axis: int,
    **_tiling: int | None,
) -> jax.Array:
    """Divergence `[...]`; two arrays of logits `[..., vocab_size]` are in memory."""
    log_q = jax.nn.log_softmax(
        full_logits(
            student_hidden, student_head, temperature, vocab_size, student_soft_cap, vocab_axis
        )
    )
    log_p = jax.nn.log_softmax(
        full_logits(
            teacher_hidden, teacher_head, temperature, vocab_size, teacher_soft_cap, vocab_axis
        )
    )
    if kind == "reverse_kl":
        log_p, log_q = log_q, log_p
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
