"""The oracle: full float32 logits of both models, differentiated by jax."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels.linear_cross_entropy.reference import full_logits
from jaxdistill.kernels.linear_divergence.kinds import MIXTURES, teacher_share


def linear_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
    share: jax.Array,
    *,
    kind: str,
    vocab_size: int,
    student_soft_cap: float | None,
    teacher_soft_cap: float | None,
    vocab_axis: int,
    axis_name: str | None = None,
    **_options: jax.Array | int | None,
) -> jax.Array:
    """Divergence `[...]`; two arrays of logits `[..., vocab_size]` are in memory.

    With an axis name the heads are one device's part of a vocabulary of `vocab_size` columns.
    """
    if axis_name is not None:
        whole = functools.partial(lax.all_gather, axis_name=axis_name, axis=vocab_axis, tiled=True)
        student_head, teacher_head = whole(student_head), whole(teacher_head)
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
    values = _of_logs(kind, log_q, log_p, share)
    # Every device has them, the whole of each: the mean tells their gradients apart from a sum.
    return values if axis_name is None else lax.pmean(values, axis_name)


def _of_logs(kind: str, log_q: jax.Array, log_p: jax.Array, share: jax.Array) -> jax.Array:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "total_variation":
        return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)
    if kind in MIXTURES:
        return _of_mixture(kind, log_q, log_p, share)
    forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
    terms = {"forward_kl": forward, "reverse_kl": reverse}.get(kind, 0.5 * (forward + reverse))
    return jnp.sum(terms, axis=-1)


def _of_mixture(kind: str, log_q: jax.Array, log_p: jax.Array, share: jax.Array) -> jax.Array:
    weight = teacher_share(kind, share)
    mixture = jnp.logaddexp(jnp.log(weight) + log_p, jnp.log1p(-weight) + log_q)
    if kind == "skew_reverse_kl_fixed_mixture":
        mixture = lax.stop_gradient(mixture)
    of_teacher = jnp.sum(jnp.exp(log_p) * (log_p - mixture), axis=-1)
    of_student = jnp.sum(jnp.exp(log_q) * (log_q - mixture), axis=-1)
    if kind == "jensen_shannon":
        return share * of_teacher + (1 - share) * of_student
    return of_teacher if kind == "skew_forward_kl" else of_student
