"""Corruption of the input of supervised fine-tuning, and the schedule of its rate."""

import jax
import jax.numpy as jnp

from jaxdistill.losses import checks


def mask_thought(
    tokens: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    key: jax.Array,
    *,
    rate: jax.typing.ArrayLike,
    mask_id: int | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """Masked thought: replace some tokens of the solution in what the model reads.

        tokens_t where M_t = 0, mask_id or a uniformly random id where M_t = 1
        M_t ~ Bernoulli(rate) where mask_t is not 0, else 0; all independent

    The labels stay those of the true tokens and every one of them is scored, replaced or not:

        labels, target_mask = shift(tokens, mask, segment_ids)       # the true tokens
        corrupted = mask_thought(tokens, mask, key, rate=rate, mask_id=mask_id)    # to the model

    A replacement changes predictions of later positions alone. Pass a new key at every step;
    inside shard_map one that differs by device, or all draw the same pattern.

    Args:
      tokens: `[...]` integers.
      mask: `[...]`, not 0 where the token belongs to the solution: the mask before `shift`.
      key: of jax.random.
      rate: scalar in [0, 1], such as `linear_ramp(step, ...)`; the paper has 0.2 to 0.4.
      mask_id: the token that replaces; its embedding is best started at the mean of all.
      vocab_size: instead of mask_id: replace by an id drawn from [0, vocab_size), which may be the
        token itself.

    Returns:
      `[...]`, integers of the type of `tokens`.

    Raises:
      ValueError: an argument of the wrong shape, type or range, or not exactly one of mask_id and
        vocab_size.

    Source: arXiv 2403.02178.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from jaxdistill.losses import mask_thought
      >>> tokens, mask = np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1])
      >>> print(mask_thought(tokens, mask, jax.random.key(0), rate=1.0, mask_id=9))
      [5 6 9 9]
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, but they are {tokens.dtype}")
    of_solution = checks.as_tokens("mask", mask, tokens.shape) != 0
    checks.check_between("rate", rate, 0.0, 1.0)
    if (mask_id is None) == (vocab_size is None):
        raise ValueError(
            f"exactly one of mask_id and vocab_size must be given, but they are {mask_id} and "
            f"{vocab_size}: mask_id to replace by one token, vocab_size by random ones"
        )
    which, what = jax.random.split(key)
    if vocab_size is not None:
        checks.check_between("vocab_size", vocab_size, 1, float("inf"))
        noise = jax.random.randint(what, tokens.shape, 0, vocab_size, tokens.dtype)
    elif mask_id is not None:
        checks.check_between("mask_id", mask_id, 0, float("inf"))
        noise = jnp.full_like(tokens, mask_id)
    chosen = jax.random.uniform(which, tokens.shape) < jnp.asarray(rate, jnp.float32)
    return jnp.where(chosen & of_solution, noise, tokens)


def linear_ramp(
    step: jax.typing.ArrayLike,
    *,
    total_steps: jax.typing.ArrayLike,
    peak: jax.typing.ArrayLike,
    fraction: jax.typing.ArrayLike = 0.66,
) -> jax.Array:
    """A rate that grows from 0 to its peak over the first part of the training, and stays.

        peak * min(1, step / (fraction * total_steps + 1))

    Args:
      step: `[...]`, of the optimizer, from 0; usually a scalar, and may be traced.
      total_steps: scalar above 0.
      peak: scalar in [0, 1].
      fraction: scalar in [0, 1], of the training that the growth takes.

    Returns:
      `[...]`, float32, in [0, peak]; no gradient flows into it.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2403.02178 and its code, which has the 1 in the divisor.

    Example:
      >>> from jaxdistill.losses import linear_ramp
      >>> print(linear_ramp(33, total_steps=100, peak=0.4).round(4))  # 0.4 * 33 / 67
      0.197
    """
    checks.check_positive("total_steps", total_steps)
    checks.check_between("peak", peak, 0.0, 1.0)
    checks.check_between("fraction", fraction, 0.0, 1.0)
    total, top, share = (jnp.asarray(x, jnp.float32) for x in (total_steps, peak, fraction))
    progress = jnp.asarray(step).astype(jnp.float32) / (share * total + 1.0)
    return jax.lax.stop_gradient(top * jnp.clip(progress, 0.0, 1.0))
