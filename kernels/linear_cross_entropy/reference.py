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
    with_rest: bool,
    vocab_axis: int,
    num_valid: jax.Array | None = None,
    **_tiling: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Log-prob of labels `[..., K]`, log-sum-exp, entropy and the log-sum-exp of the rest, `[...]`.

    `[..., vocab_size]` logits are in memory. Of these columns those from `num_valid` on have no
    probability, unless none has any.
    """
    exist = jnp.arange(head.shape[vocab_axis]) < (vocab_size if num_valid is None else num_valid)
    if num_valid is not None:
        head = jnp.where(jnp.expand_dims(exist, 1 - vocab_axis), head, jnp.zeros_like(head))
    logits = full_logits(hidden, head, temperature, vocab_size, soft_cap, vocab_axis)
    counts = jnp.broadcast_to(exist[:vocab_size], logits.shape)
    if num_valid is not None:
        logits = jnp.where(counts, logits, ABSENT)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    index = jnp.clip(labels, 0, vocab_size - 1)
    label_logits = jnp.take_along_axis(logits, index, axis=-1)
    log_prob = jnp.where(index == labels, label_logits - log_sum_exp[..., None], jnp.nan)
    entropy = rest = None
    if with_entropy:
        log_probs = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    if with_rest:
        rest = _log_sum_exp_where(counts & ~_is_label(labels, counts), logits)
    return log_prob, log_sum_exp, entropy, rest


def _is_label(labels: jax.Array, like: jax.Array) -> jax.Array:
    """Which columns `[..., V]` are among the labels `[..., K]`; one out of range is none."""
    index = jnp.where(labels >= 0, labels, like.shape[-1])
    no = jnp.zeros_like(like)
    return jnp.put_along_axis(no, index, True, axis=-1, inplace=False, mode="drop")


def _log_sum_exp_where(wanted: jax.Array, logits: jax.Array) -> jax.Array:
    """log sum exp of the wanted columns, -inf where there is none."""
    some = jnp.any(wanted, axis=-1)
    # Where all is -inf the derivative of logsumexp is 0 / 0.
    safe = jnp.where(some[..., None], jnp.where(wanted, logits, -jnp.inf), 0.0)
    return jnp.where(some, jax.nn.logsumexp(safe, axis=-1), -jnp.inf)


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
