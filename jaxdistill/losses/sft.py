"""Supervised fine-tuning with other weights than the likelihood's: per token, from logits.

`cross_entropy` is the plain one. What a model needs to see differently is in masked_thought.py,
distillation from a slow copy of itself in curio.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import label_value, log_softmax
from jaxdistill.losses.divergence import forward_kl
from jaxdistill.losses.reduce import log_probs
from jaxdistill.losses.sampling import draw_at


def dft(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    vocab_size: int | None = None,
) -> jax.Array:
    """Dynamic fine-tuning: likelihood weighted by the probability the token already has.

        -stop_gradient(p_label) log p_label,  p = softmax(logits)

    The gradient is that of -p_label. The weights are not part of the normaliser: reduce with
    `token_mean(values, mask)`. The value says little of the fit, log `cross_entropy` beside it.
    TRL's loss_type="dft" divides by the tokens of a microbatch if not told those of the step.

    Args:
      logits: `[..., V]`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats; in [0, 1/e].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2508.05629.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dft
      >>> print(dft(np.zeros((2, 4)), np.array([0, 3])).round(4))  # log(4) / 4
      [0.3466 0.3466]
    """
    return weighted_by_probability(log_probs(logits, labels, vocab_size=vocab_size))


def weighted_by_probability(log_prob: jax.Array) -> jax.Array:
    """-stop_gradient(p) log p, and 0 where p is."""
    weight = lax.stop_gradient(jnp.exp(log_prob))
    return -weight * jnp.where(log_prob == -jnp.inf, 0.0, log_prob)


def asft(
    logits: jax.typing.ArrayLike,
    reference_logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    kl_weight: jax.typing.ArrayLike = 0.05,
    vocab_size: int | None = None,
) -> jax.Array:
    """Anchored supervised fine-tuning: `dft` held near the model it started from.

        -stop_gradient(p_label) log p_label + kl_weight KL(p_ref || p)

    The divergence is over the whole vocabulary at each position. No gradient flows into the
    reference, which is the frozen start of the fine-tuning and no moving average.

    Args:
      logits: `[..., V]`.
      reference_logits: `[..., V]`; see teacher_logits of `forward_kl`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      kl_weight: scalar of at least 0; 0 gives `dft`.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2509.23753.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import asft
      >>> reference = np.log(np.array([[0.9, 0.1]]))
      >>> print(asft(np.zeros((1, 2)), reference, np.array([0]), kl_weight=0.1).round(4))
      [0.3834]
    """
    checks.check_between("kl_weight", kl_weight, 0.0, float("inf"))
    anchor = forward_kl(logits, reference_logits, vocab_size=vocab_size)
    imitation = dft(logits, labels, vocab_size=vocab_size)
    return imitation + jnp.asarray(kl_weight, jnp.float32) * anchor


def one_token_rollout(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    key: jax.Array | None = None,
    num_samples: int = 256,
    temperature: jax.typing.ArrayLike = 1.3,
    wrong_reward: jax.typing.ArrayLike = -0.1,
    vocab_size: int | None = None,
) -> jax.Array:
    """One-token rollout: policy gradient with each token a trajectory and the label its reward.

        sampled: -(1/K) sum_j R(a_j) log p_{a_j},  a_1 .. a_K ~ p' independently
        exact:   -sum_a p'_a R(a) log p_a, what the sampled form is on average
        p = softmax(logits), p' = softmax(logits / temperature), R(label) = 1, else wrong_reward

    No gradient flows through p', the samples or the rewards. With wrong_reward 0 and temperature 1
    the exact form is `dft`. Pass a new key at every step; inside shard_map one that differs by
    device, or all draw the same numbers.

    Args:
      logits: `[..., V]`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      key: of jax.random, for the sampled form; without it the exact form.
      num_samples: K, at least 1; without a key of no effect.
      temperature: scalar above 0, of the sampling alone; no gradient flows into it.
      wrong_reward: scalar below 1. Above 0 it would strengthen whatever is sampled. That the paper
        has -0.1 could not be confirmed.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats; not comparable with a likelihood, and below 0 where wrong tokens
      weigh more.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2509.26313.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from jaxdistill.losses import one_token_rollout
      >>> logits, labels = np.zeros((1, 4)), np.array([2])
      >>> print(one_token_rollout(logits, labels).round(4))  # log(4) (1 - 0.1 * 3) / 4
      [0.2426]
      >>> print(one_token_rollout(logits, labels, key=jax.random.key(0)).shape)
      (1,)
    """
    checks.check_between("num_samples", num_samples, 1, float("inf"))
    checks.check_between("wrong_reward", wrong_reward, float("-inf"), 1.0)
    log_p = log_softmax("logits", logits, 1.0, vocab_size)
    explored = log_softmax("logits", logits, temperature, vocab_size)
    uniform = None if key is None else jax.random.uniform(key, (*log_p.shape[:-1], num_samples))
    return rollout_of(log_p, explored, labels, uniform, wrong_reward)


def rollout_of(
    log_p: jax.Array,
    explored: jax.Array,
    labels: jax.typing.ArrayLike,
    uniform: jax.Array | None,
    wrong_reward: jax.typing.ArrayLike,
) -> jax.Array:
    """`one_token_rollout` from log p and log p', sampled at uniform numbers `[..., K]` if any."""
    explored = lax.stop_gradient(explored)
    of_label = label_value(log_p, labels)
    labels = jnp.asarray(labels, jnp.int32)[..., None]
    if uniform is None:
        actions = jnp.broadcast_to(jnp.arange(log_p.shape[-1]), log_p.shape)
        scores, weights = log_p, jnp.exp(explored)
    else:
        actions = draw_at(uniform, explored)
        scores = jnp.take_along_axis(log_p, actions, -1)
        weights = jnp.full(scores.shape, 1 / scores.shape[-1], jnp.float32)
    reward = jnp.where(actions == labels, 1.0, jnp.asarray(wrong_reward, jnp.float32))
    # A token of probability 0 has a score of -inf and is never met: it counts for nothing.
    scores = jnp.where(scores > -jnp.inf, scores, 0.0)
    loss = -jnp.sum(weights * reward * scores, axis=-1)
    return jnp.where(jnp.isnan(of_label), jnp.nan, loss)


def key_token_weights(
    key_mask: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    value_end_mask: jax.typing.ArrayLike | None = None,
    max_weight: float = 9.0,
) -> jax.Array:
    """Weights that let the few tokens which decide a tool call count as much as all the others.

        w = min(O / K, max_weight) on key tokens if K < O, else 1;  1 on the others
        K = key tokens of the row, O = its others, without the ends of argument values

    The weights belong into the normaliser, as mask of a reduction. The paper's is

        sequence_mean(cross_entropy(logits, labels), key_token_weights(key_mask, mask))

    Args:
      key_mask: `[..., T]`, not 0 on key tokens: the first of the tool's name and those where the
        names of the offered tools part. Where mask is 0 it counts for nothing.
      mask: `[..., T]`, not 0 on the trained tokens; one trained turn a row, not packed. Both are
        aligned with the labels, as `shift` returns them.
      value_end_mask: `[..., T]`, not 0 on the last token of each argument's value; these weigh 1
        and are no part of O. Default none.
      max_weight: at least 1.

    Returns:
      `[..., T]`, float32; 0 where mask is 0. No gradient flows into it.

    Raises:
      ValueError: shapes differ, the arrays have no axis, or the option is out of range.

    Source: arXiv 2412.15495.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import key_token_weights
      >>> print(key_token_weights(np.array([0, 1, 0, 0, 0]), np.array([1, 1, 1, 1, 0])))
      [1. 3. 1. 1. 0.]
    """
    checks.check_between("max_weight", max_weight, 1.0, float("inf"))
    if jnp.ndim(mask) < 1:
        raise ValueError("mask must have shape [..., T], but it is a scalar")
    shape = jnp.shape(mask)
    kept = checks.as_tokens("mask", mask, shape) != 0
    is_key = (checks.as_tokens("key_mask", key_mask, shape) != 0) & kept
    is_other = kept & ~is_key
    if value_end_mask is not None:
        is_other &= checks.as_tokens("value_end_mask", value_end_mask, shape) == 0
    keys, others = (jnp.sum(x.astype(jnp.float32), -1, keepdims=True) for x in (is_key, is_other))
    weight = jnp.clip(others / jnp.maximum(keys, 1.0), 1.0, max_weight)
    return jnp.where(is_key, weight, kept.astype(jnp.float32))


def unlikelihood(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    vocab_size: int | None = None,
) -> jax.Array:
    """Unlikelihood: the labels are tokens the model must not produce.

        -log(1 - p_label),  p = softmax(logits)

    Add it to the `cross_entropy` of the true tokens; the labels are then a repeated token or one
    of a wrong answer, with a mask of its own. 1 - p is summed over the other tokens, not
    subtracted, so value and gradient hold where p rounds to 1 and the common clamp has gradient 0.

    Args:
      logits: `[..., V]`, V at least 2.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1908.04319.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import unlikelihood
      >>> print(unlikelihood(np.zeros((1, 4)), np.array([2])).round(4))  # -log(3/4)
      [0.2877]
    """
    logits = checks.as_logits("logits", logits, vocab_size)
    columns = logits.shape[-1]
    if columns < 2:
        raise ValueError(f"logits must have at least 2 columns that count, but they have {columns}")
    of_label = label_value(logits, labels)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_label = column == jnp.asarray(labels, jnp.int32)[..., None]
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return of_odds(of_label, others)


def of_odds(of_label: jax.Array, of_others: jax.Array) -> jax.Array:
    """-log(1 - p_label) from log-sums of the label and of the others, which share any constant."""
    # log(1 + p / (1 - p)) with p / (1 - p) = exp(label - others). NaN joins after the softplus,
    # whose derivative there would make the gradient NaN under every mask.
    out_of_range = jnp.isnan(of_label)
    loss = jax.nn.softplus(jnp.where(out_of_range, 0.0, of_label - of_others))
    return jnp.where(out_of_range, jnp.nan, loss)
