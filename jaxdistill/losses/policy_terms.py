"""What a policy gradient has besides its ratio: KL estimates, entropy, importance weights."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.policy_arguments import check_not_negative, check_option

ESTIMATORS = ("k1", "k2", "k3")
# A larger log-ratio says nothing but that two policies have parted, and its exp must stay finite.
LOG_RATIO_LIMIT = 20.0


def kl_estimate(
    log_prob: jax.typing.ArrayLike,
    reference_log_prob: jax.typing.ArrayLike,
    *,
    kind: str = "k3",
    gradient: str | None = None,
) -> jax.Array:
    """KL(policy || reference) at each token, estimated from the one token the policy sampled.

        k1 = -u;  k2 = u^2 / 2;  k3 = exp(u) - u - 1;  u = reference_log_prob - log_prob

    As values k1 and k3 are unbiased, k2 is not. As losses on the policy's own samples, k1 has an
    expected gradient of 0, k2 that of KL(policy || reference), k3 that of KL(reference || policy):
    so k1 belongs in the reward and k2 in a loss. `gradient` names the estimator to differentiate
    instead (straight-through): kind="k3", gradient="k2" is unbiased to read and to train with. All
    are of one token given those before it; what a token does to the KL of later ones is in none of
    their gradients, only in that of k1 as a reward.

    No gradient flows into the reference. exp(u) ends at exp(20), where its gradient is 0.

    Args:
      log_prob: `[...]`.
      reference_log_prob: `[...]`.
      kind: whose value, "k1", "k2" or "k3".
      gradient: whose gradient; default that of `kind`.

    Returns:
      `[...]`, float32, nats; 0 where both agree.

    Raises:
      ValueError: shapes differ, or an unknown name.

    Source: values, J. Schulman, "Approximating KL divergence", 2020; gradients, arXiv 2506.09477.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import kl_estimate
      >>> print(kl_estimate(np.array([-2.0]), np.array([-1.0])).round(4))  # e - 1 - 1
      [0.7183]
    """
    check_option("kind", kind, ESTIMATORS)
    log_prob = jnp.asarray(log_prob).astype(jnp.float32)
    reference = checks.as_tokens("reference_log_prob", reference_log_prob, log_prob.shape)
    u = lax.stop_gradient(reference) - log_prob
    value = _estimate(u, kind)
    if gradient is None:
        return value
    check_option("gradient", gradient, ESTIMATORS)
    path = _estimate(u, gradient)
    return lax.stop_gradient(value) + (path - lax.stop_gradient(path))


def _estimate(u: jax.Array, kind: str) -> jax.Array:
    if kind == "k1":
        return -u
    if kind == "k2":
        return 0.5 * jnp.square(u)
    return jnp.expm1(jnp.minimum(u, LOG_RATIO_LIMIT)) - u


def entropy_bonus(entropy: jax.typing.ArrayLike, *, weight: jax.typing.ArrayLike) -> jax.Array:
    """The reward for staying undecided, as a loss: it is lower where the entropy is higher.

        -weight H

    Args:
      entropy: `[...]`, from `losses.entropy` or a head.
      weight: at least 0; 1e-3 is common.

    Returns:
      `[...]`, float32, nats times the weight.

    Raises:
      ValueError: weight is negative.

    Source: arXiv 1602.01783.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import entropy_bonus
      >>> print(entropy_bonus(np.array([2.0]), weight=0.5))
      [-1.]
    """
    check_not_negative("weight", weight)
    return -jnp.asarray(weight, jnp.float32) * jnp.asarray(entropy).astype(jnp.float32)


def importance_weights(
    log_prob: jax.typing.ArrayLike,
    rollout_log_prob: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    level: str = "token",
    mode: str = "truncate",
    cap: float = 2.0,
    floor: float = 0.0,
    segment_ids: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Weights for samples of an engine whose probabilities are not quite the trained model's.

        w = exp(d_t) at each token, or exp(sum_t d_t);  d = log_prob - rollout_log_prob
        "truncate": min(max(w, floor), cap);  "mask": w if floor <= w <= cap, else 0

    Multiply the token losses with them: `weight` of `policy_gradient`. Stop-gradient: a constant.

    Args:
      log_prob: `[..., T]`, the trained model's under the snapshot that sampled (old_log_prob).
      rollout_log_prob: `[..., T]`, as the engine reported it.
      mask: `[..., T]`, boolean or weights: the tokens the policy generated.
      level: "token" or "sequence".
      mode: "truncate" or "mask".
      cap: above 0; verl truncates tokens at 2, TRL masks sequences at 3.
      floor: in [0, cap].
      segment_ids: `[..., T]` integers where sequences are packed into rows.

    Returns:
      `[..., T]`, float32, in [0, cap]; 1 where the mask is 0.

    Raises:
      ValueError: shapes differ, an unknown name, or cap or floor out of range.

    Source: truncation, F. Yao et al. (verl pull request 2953), 2025; sequences and masks,
    J. Liu et al., "When Speed Kills Stability", 2025.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import importance_weights
      >>> log_prob, rollout = np.array([[-1.0, 0.0]]), np.array([[-1.0, -5.0]])
      >>> print(importance_weights(log_prob, rollout, np.ones((1, 2))))  # 1, min(e^5, 2)
      [[1. 2.]]
    """
    check_option("level", level, ("token", "sequence"))
    check_option("mode", mode, ("truncate", "mask"))
    checks.check_positive("cap", cap)
    checks.check_between("floor", floor, 0.0, cap)
    log_prob = jnp.asarray(log_prob).astype(jnp.float32)
    rollout = checks.as_tokens("rollout_log_prob", rollout_log_prob, log_prob.shape)
    keep = checks.as_tokens("mask", mask, log_prob.shape) != 0
    difference = jnp.where(keep, log_prob - rollout, 0.0)
    if level == "sequence":
        difference = sequence_totals(difference, segment_ids)
    weight = bounded_ratio(difference)
    inside = (weight >= floor) & (weight <= cap)
    weight = jnp.clip(weight, floor, cap) if mode == "truncate" else jnp.where(inside, weight, 0.0)
    return lax.stop_gradient(jnp.where(keep, weight, 1.0))


def bounded_ratio(log_ratio: jax.Array) -> jax.Array:
    """exp of a log-ratio, finite whatever the two policies are."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def sequence_totals(values: jax.Array, segment_ids: jax.typing.ArrayLike | None) -> jax.Array:
    """The sum over each sequence, `[..., T]`, repeated at its tokens; a row is one by default."""
    if segment_ids is None:
        return jnp.broadcast_to(values.sum(-1, keepdims=True), values.shape)
    ids = checks.as_segments(segment_ids, values.shape)
    starts = jnp.concatenate([ids[..., :1] != 0, ids[..., 1:] != ids[..., :-1]], axis=-1)
    runs = jnp.cumsum(starts.astype(jnp.int32), axis=-1)
    length = values.shape[-1]

    def one_row(values: jax.Array, runs: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, runs, num_segments=length + 1)[runs]

    rows = jax.vmap(one_row)(values.reshape(-1, length), runs.reshape(-1, length))
    return rows.reshape(values.shape)
