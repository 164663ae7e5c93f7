"""Objectives that imitate demonstrations and reinforce rollouts in one loss.

A batch holds both, one sequence a row; `is_demo` tells them apart. On a demonstration there is no
policy that sampled, so its old_log_prob is ignored and may be NaN. These reduce by a constant
divisor; `mixtures` holds those with a mean of their own for each part. ReLIFT needs no function:
`policy_gradient` with clip "none" and aggregation "constant", and SFT steps on the unsolved.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses import policy_arguments as arguments
from jaxdistill.losses.policy import policy_surrogate
from jaxdistill.losses.policy_terms import sequence_totals
from jaxdistill.losses.reduce import Weighted, sequence_sum


def policy_shaping(log_prob: jax.typing.ArrayLike, *, shaping: float = 0.1) -> jax.Array:
    """LUFFY's stand-in for the ratio on a demonstration: steepest at tokens that are improbable.

        p / (p + shaping),  p = exp(log_prob)

    Its gradient is shaping p / (p + shaping)^2 grad log_prob.

    Args:
      log_prob: `[...]`.
      shaping: gamma, above 0.

    Returns:
      `[...]`, float32, in [0, 1).

    Raises:
      ValueError: shaping is not above 0.

    Source: LUFFY, arXiv 2504.14945.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import policy_shaping
      >>> print(policy_shaping(np.log([0.1, 0.9])).round(4))
      [0.5 0.9]
    """
    checks.check_positive("shaping", shaping)
    log_prob = jnp.asarray(log_prob).astype(jnp.float32)
    return jax.nn.sigmoid(log_prob - jnp.log(jnp.asarray(shaping, jnp.float32)))


def luffy(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    is_demo: jax.typing.ArrayLike,
    *,
    divisor: float,
    shaping: float = 0.1,
) -> Weighted:
    """LUFFY: demonstrations join the group of the rollouts, with a shaped probability as ratio.

        rollout: -A rho_t;  demonstration: -A policy_shaping(log_prob_t);  token sums / divisor

    Advantages: `group_advantages(rewards, scale="none")` of groups with the demonstration inside.
    The authors' code divides by the padded length and not by the number of sequences, so its
    learning rate depends on the microbatch; here it is the mean over sequences.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      is_demo: `[...]`, one a sequence, boolean.
      divisor: above 0: the longest response allowed, in tokens.
      shaping: above 0.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: an argument of the wrong shape, or an option out of range.

    Source: arXiv 2504.14945.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import luffy
      >>> log_prob, is_demo = np.log([[0.5], [0.1]]), np.array([False, True])
      >>> loss = luffy(log_prob, None, np.array([-0.5, 0.5]), np.ones((2, 1)), is_demo, divisor=1)
      >>> print(loss.mean())  # (0.5 - 0.5 * 0.5) / 2
      0.125
    """
    tokens, keep = arguments.policy_tokens(log_prob, mask)
    demo = arguments.per_token("is_demo", is_demo, keep) != 0
    rollout_loss = policy_surrogate(log_prob, old_log_prob, advantage, keep & ~demo, clip="none")
    shaped = policy_shaping(tokens, shaping=shaping)
    demo_loss = -arguments.per_token("advantage", advantage, keep) * shaped
    return sequence_sum(jnp.where(demo, demo_loss, rollout_loss), mask, divisor)


def srft(
    log_prob: jax.typing.ArrayLike,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    is_demo: jax.typing.ArrayLike,
    correct: jax.typing.ArrayLike,
    entropy: jax.typing.ArrayLike,
    *,
    divisor: float,
    imitation: float = 0.5,
    exploration: float = 0.1,
    shaping: float = 0.1,
) -> Weighted:
    """SRFT: the entropy of each sequence sets how much it is imitated and how much reinforced.

        demonstration:    -imitation exp(-H) log_prob_t - A policy_shaping(log_prob_t)
        right rollout:    -exploration exp(H) log_prob_t
        wrong rollout:    log_prob_t
        H = stop_gradient(the mean entropy of the sequence's tokens);  token sums / divisor

    The paper's exploration constant is 0.1 in its re-implementation, or 0.5. Gradients flow
    through log_prob only.

    Args:
      log_prob, mask: as for `policy_gradient`.
      advantage: `[...]` or `[..., T]`, of the demonstrations; that of a rollout is not used.
      is_demo, correct: `[...]`, one a sequence, boolean; correct of a demonstration is not used.
      entropy: `[..., T]`, of the policy at each token.
      divisor: above 0: the longest response allowed, in tokens.
      imitation, exploration: at least 0.
      shaping: above 0.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: an argument of the wrong shape, or an option out of range.

    Source: arXiv 2506.19767.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import srft
      >>> log_prob, entropy = np.log([[0.5], [0.5]]), np.zeros((2, 1))
      >>> right, rollouts = np.array([True, False]), np.array([False, False])
      >>> loss = srft(log_prob, np.zeros(2), np.ones((2, 1)), rollouts, right, entropy, divisor=1)
      >>> print(loss.mean().round(4))  # (0.1 log 2 - log 2) / 2
      -0.3119
    """
    arguments.check_not_negative("imitation", imitation)
    arguments.check_not_negative("exploration", exploration)
    log_prob, keep = arguments.policy_tokens(log_prob, mask)
    demo = arguments.per_token("is_demo", is_demo, keep) != 0
    right = arguments.per_token("correct", correct, keep) != 0
    total = sequence_totals(arguments.kept("entropy", entropy, keep), None)
    count = sequence_totals(keep.astype(jnp.float32), None)
    mean_entropy = lax.stop_gradient(total / jnp.maximum(count, 1.0))
    shaped = arguments.per_token("advantage", advantage, keep) * policy_shaping(
        log_prob, shaping=shaping
    )
    demo_loss = -imitation * jnp.exp(-mean_entropy) * log_prob - shaped
    rollout_loss = jnp.where(right, -exploration * jnp.exp(mean_entropy), 1.0) * log_prob
    return sequence_sum(jnp.where(demo, demo_loss, rollout_loss), mask, divisor)


def hpt(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    is_demo: jax.typing.ArrayLike,
    successes: jax.typing.ArrayLike,
    *,
    divisor: float,
    gate: int = 0,
    sft_weight: float = 1.0,
) -> Weighted:
    """HPT: a prompt whose rollouts hardly ever succeed is learnt from its demonstration instead.

        successes <= gate:  -sft_weight log_prob_t on the demonstration, its rollouts are dropped
        successes > gate:   -A rho_t on the rollouts, its demonstration is dropped
        token sums / divisor; a dropped sequence does not count

    Advantages: `group_advantages(rewards, scale="none")` of the rollouts. gate -1 is RL alone, and
    a gate of the group's size SFT alone.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`.
      is_demo: `[...]`, one a sequence, boolean.
      successes: `[...]`, how many rollouts of the sequence's prompt were right.
      divisor: above 0: the longest response allowed, in tokens.
      gate: 0 for Qwen models and 2 for Llama in the paper.
      sft_weight: at least 0.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: an argument of the wrong shape, or an option out of range.

    Source: arXiv 2509.04419.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import hpt
      >>> log_prob, is_demo = np.log([[0.5], [0.1]]), np.array([False, True])
      >>> args = log_prob, None, np.array([1.0, 0.0]), np.ones((2, 1)), is_demo
      >>> print(hpt(*args, np.array([0, 0]), divisor=1).mean().round(4))  # log 10
      2.3026
      >>> print(hpt(*args, np.array([1, 1]), divisor=1).mean())
      -1.0
    """
    arguments.check_not_negative("sft_weight", sft_weight)
    tokens, keep = arguments.policy_tokens(log_prob, mask)
    demo = arguments.per_token("is_demo", is_demo, keep) != 0
    imitated = arguments.per_token("successes", successes, keep) <= gate
    rollout_loss = policy_surrogate(log_prob, old_log_prob, advantage, keep & ~demo, clip="none")
    loss = jnp.where(demo, -sft_weight * tokens, rollout_loss)
    weights = checks.as_tokens("mask", mask, keep.shape)
    return sequence_sum(loss, jnp.where(demo == imitated, weights, 0.0), divisor)
