"""The oracle: full float32 logits, differentiated by jax."""

import jax
import jax.numpy as jnp
from jax import lax

ABSENT = -1e30  # logit of a column that does not exist: no probability, and finite, unlike -inf


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    *,
    vocab_size: int,
    soft_cap: float | None,
    with_entropy: bool,
    vocab_axis: int,
    num_valid: jax.Array | None = None,
    **_tiling: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-prob, log-sum-exp and entropy `[...]`; `[..., vocab_size]` logits are in memory.

    Of these columns those from `num_valid` on have no probability, unless none has any.
    """
    if num_valid is not None:
        exist = jnp.arange(head.shape[vocab_axis]) < num_valid
        head = jnp.where(jnp.expand_dims(exist, 1 - vocab_axis), head, jnp.zeros_like(head))
    logits = full_logits(hidden, head, temperature, vocab_size, soft_cap, vocab_axis)
    if num_valid is not None:
        counts = jnp.broadcast_to(exist[:vocab_size], logits.shape)
        logits = jnp.where(counts, logits, ABSENT)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    index = jnp.clip(labels, 0, vocab_size - 1)
    label_logit = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    log_prob = jnp.where(index == labels, label_logit - log_sum_exp, jnp.nan)
    if not with_entropy:
        return log_prob, log_sum_exp, None
    log_probs = jax.nn.log_softmax(logits)
    return log_prob, log_sum_exp, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def full_logits(
    hidden: jax.Array,
    head: jax.Array,
    temperature: jax.Array,
    vocab_size: int,
    soft_cap: float | None,
    vocab_axis: int,
) -> jax.Array:
    """Logits `[..., vocab_size]` after soft cap and temperature, float32."""
    head = lax.slice_in_dim(head, 0, vocab_size, axis=vocab_axis)
    by_column = head if vocab_axis == 1 else head.T
    logits = jnp.matmul(
        hidden.astype(jnp.float32),
        by_column.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits / temperature
