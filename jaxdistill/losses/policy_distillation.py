"""Distillation as a policy gradient: a teacher's log-probabilities of what the student sampled.

`on_policy_distillation` has a teacher of its own; in `pi_distill` and `opsd` the teacher is the
student with privileged information in its prompt.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses import policy_arguments as arguments
from jaxdistill.losses.advantages import gae
from jaxdistill.losses.policy import policy_gradient, policy_surrogate
from jaxdistill.losses.policy_terms import kl_estimate
from jaxdistill.losses.reduce import Weighted


def distillation_advantages(
    log_prob: jax.typing.ArrayLike,
    teacher_log_prob: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    discount: float = 0.0,
) -> jax.Array:
    """How much more the teacher likes each token than the student that sampled it.

        A_t = sum_{s >= t} discount^(s - t) (teacher_log_prob_s - log_prob_s)

    Minus k1, the per-token reverse KL, as a reward. discount 0 is each token's own; with discount 1
    the policy gradient is the whole gradient of the sequence KL(student || teacher), at more
    variance. Stop-gradient: the result is a constant.

    Args:
      log_prob: `[..., T]`, the student's under the snapshot that sampled.
      teacher_log_prob: `[..., T]`, the teacher's of the same tokens.
      mask: `[..., T]`, boolean or 0/1: the tokens the student generated, one sequence a row.
      discount: in [0, 1].

    Returns:
      `[..., T]`, float32, nats; 0 where the mask is 0.

    Raises:
      ValueError: shapes differ, or discount outside [0, 1].

    Source: arXiv 2306.08543; per token, Thinking Machines, "On-Policy Distillation", 2025.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import distillation_advantages
      >>> student, teacher = np.array([[-1.0, -2.0]]), np.array([[-2.0, -1.0]])
      >>> print(distillation_advantages(student, teacher, np.ones((1, 2))))
      [[-1.  1.]]
    """
    log_prob, keep = arguments.policy_tokens(log_prob, mask)
    reward = arguments.kept("teacher_log_prob", teacher_log_prob, keep) - log_prob
    returns = gae(reward, jnp.zeros_like(reward), keep, discount=discount, trace=1.0)
    return returns.advantages


def on_policy_distillation(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    teacher_log_prob: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    form: str = "advantage",
    discount: float = 0.0,
    aggregation: str = "token",
    divisor: float | None = None,
    weight: jax.typing.ArrayLike | None = None,
) -> Weighted:
    """Reverse KL to a teacher on the student's own samples, from one log-probability a token.

        form "advantage":  -rho_t A_t,  A = distillation_advantages(old_log_prob, teacher_log_prob)
        form "loss":       k1 with the gradient of k2, (log_prob - teacher_log_prob) grad log_prob

    With discount 0 and one update a rollout batch both have one value and one gradient, at each
    token the unbiased ones of KL(student || teacher) there. Where the logits of the teacher are at
    hand, `reverse_kl` is the same without the noise of the sample. k1 differentiated as it stands
    would have an expected gradient of 0. No gradient flows into the teacher and old_log_prob.

    Args:
      log_prob: `[..., T]`, the student in training.
      old_log_prob: `[..., T]`, the student that sampled. None stands for log_prob itself.
      teacher_log_prob: `[..., T]`, the teacher's of the same tokens.
      mask: `[..., T]`, boolean or weights: the tokens the student generated, one sequence a row.
      form: "advantage" or "loss"; the latter ignores old_log_prob.
      discount: in [0, 1], of the rewards of later tokens; for "advantage" only.
      aggregation, divisor: as for `policy_gradient`.
      weight: `[..., T]`, such as `importance_weights`. A constant.

    Returns:
      Weighted, in tokens for aggregation "token" and else in sequences.

    Raises:
      ValueError: an argument of the wrong shape, an unknown name, or an option out of range or of
        no use to this form.

    Source: arXiv 2306.13649, 2306.08543; Thinking Machines, "On-Policy Distillation", 2025.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import on_policy_distillation
      >>> student, teacher = np.array([[-1.0, -2.0]]), np.array([[-2.0, -1.5]])
      >>> print(on_policy_distillation(student, None, teacher, np.ones((1, 2))).mean())
      0.25
    """
    arguments.check_option("form", form, ("advantage", "loss"))
    tokens, keep = arguments.policy_tokens(log_prob, mask)
    if form == "advantage":
        old = arguments.old_or_same(old_log_prob, tokens, keep)
        advantage = distillation_advantages(old, teacher_log_prob, keep, discount=discount)
        loss = policy_surrogate(tokens, old, advantage, keep, clip="none")
    else:
        if discount != 0:
            raise ValueError(f'discount must be 0 for form "loss", but it is {discount}')
        teacher = arguments.kept("teacher_log_prob", teacher_log_prob, keep)
        loss = kl_estimate(tokens, teacher, kind="k1", gradient="k2")
    if weight is not None:
        loss *= lax.stop_gradient(arguments.kept("weight", weight, keep))
    return arguments.aggregate(loss, mask, aggregation, divisor)


def pi_distill(
    teacher_log_prob: jax.typing.ArrayLike,
    old_teacher_log_prob: jax.typing.ArrayLike | None,
    student_log_prob: jax.typing.ArrayLike,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    kl: str = "k1",
    kl_gradient: str | None = "k2",
    aggregation: str = "token",
    divisor: float | None = None,
) -> Weighted:
    """pi-Distill: one model as a teacher that sees privileged information and as its student.

        alpha L_T + (1 - alpha) L_S, on trajectories o that the teacher sampled
        L_T = clipped(pi_T / pi_T_old, A) + beta KL(pi_T || stop_gradient(pi_S))
        L_S = clipped(pi_S / stop_gradient(pi_T), A) + beta KL(stop_gradient(pi_T) || pi_S)

    clipped is `policy_surrogate` with the symmetric clip, or the asymmetric if clip_high is given.
    The first KL is `kl_estimate`; the second is log pi_T - log pi_S, whose gradient, minus that of
    log pi_S, is exact: plain imitation of the teacher's tokens. The paper leaves the estimators,
    and whether the ratio is of tokens or of sequences, unsaid. Gradients flow into each
    log-probability only where it is not stopped above.

    Args:
      teacher_log_prob: `[..., T]`, log pi(token | student's view, privileged information).
      old_teacher_log_prob: `[..., T]`, under the weights that sampled. None stands for
        teacher_log_prob itself.
      student_log_prob: `[..., T]`, log pi(token | student's view), the same weights and tokens.
      advantage: `[...]`, one a sequence, or `[..., T]`: `group_advantages(rewards)`.
      mask: `[..., T]`, boolean or weights: the tokens the model generated, one sequence a row.
      alpha: in [0, 1]: 1 trains the teacher alone, 0 the student alone. 0.5 is the most robust.
      beta: at least 0; it must be above 0 for the student to follow a trained teacher.
      ratio, clip_low, clip_high, aggregation, divisor: as for `policy_gradient`.
      kl, kl_gradient: `kind` and `gradient` of `kl_estimate`, for L_T.

    Returns:
      Weighted, in tokens for aggregation "token" and else in sequences.

    Raises:
      ValueError: an argument of the wrong shape, an unknown name, or an option out of range.

    Source: arXiv 2602.04942, equations T and S.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import pi_distill
      >>> teacher, student = np.log([[0.8, 0.8]]), np.log([[0.4, 0.8]])
      >>> loss = pi_distill(teacher, None, student, np.array([0.0]), np.ones((1, 2)), beta=1.0)
      >>> print(loss.mean().round(4))  # both KLs are estimated as log 2 / 2
      0.3466
    """
    checks.check_between("alpha", alpha, 0.0, 1.0)
    arguments.check_not_negative("beta", beta)
    teacher, keep = arguments.policy_tokens(teacher_log_prob, mask)
    student = arguments.kept("student_log_prob", student_log_prob, keep)
    old = arguments.old_or_same(old_teacher_log_prob, teacher, keep)
    clip = "symmetric" if clip_high is None else "asymmetric"
    surrogate = functools.partial(
        policy_surrogate, ratio=ratio, clip=clip, clip_low=clip_low, clip_high=clip_high
    )
    teacher_loss = surrogate(teacher, old, advantage, keep)
    teacher_loss += beta * kl_estimate(teacher, student, kind=kl, gradient=kl_gradient)
    student_loss = surrogate(student, teacher, advantage, keep)
    student_loss += beta * (lax.stop_gradient(teacher) - student)
    loss = alpha * teacher_loss + (1.0 - alpha) * student_loss
    return arguments.aggregate(loss, mask, aggregation, divisor)


def opsd(
    log_prob: jax.typing.ArrayLike,
    old_log_prob: jax.typing.ArrayLike | None,
    privileged_log_prob: jax.typing.ArrayLike,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    beta: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    kl: str = "k1",
    kl_gradient: str | None = "k2",
    aggregation: str = "token",
    divisor: float | None = None,
) -> Weighted:
    """On-policy self-distillation: RL of the student, held near the model that sees more.

        clipped(pi_S / pi_S_old, A) + beta KL(pi_S || stop_gradient(pi_T)), on the student's samples

    Beside `pi_distill` with alpha 0: there the teacher samples, here the student. No gradient
    flows into privileged_log_prob.

    Args:
      log_prob, old_log_prob, advantage, mask: as for `policy_gradient`, of the student's samples.
      privileged_log_prob: `[..., T]`, the same weights with the privileged information in view.
      beta: at least 0.
      clip_low, clip_high, aggregation, divisor: as for `policy_gradient`.
      kl, kl_gradient: `kind` and `gradient` of `kl_estimate`. k1 read and k2 differentiated is
        unbiased; k3's own gradient would be that of the KL the other way round.

    Returns:
      Weighted, in tokens for aggregation "token" and else in sequences.

    Raises:
      ValueError: as `policy_gradient`.

    Source: arXiv 2602.04942.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import opsd
      >>> student, teacher = np.log([[0.8]]), np.log([[0.4]])
      >>> loss = opsd(student, None, teacher, np.array([0.0]), np.ones((1, 1)), beta=1.0)
      >>> print(loss.mean().round(4))  # log 2
      0.6931
    """
    return policy_gradient(
        log_prob,
        old_log_prob,
        advantage,
        mask,
        clip="symmetric" if clip_high is None else "asymmetric",
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation=aggregation,
        divisor=divisor,
        reference_log_prob=privileged_log_prob,
        kl_weight=beta,
        kl=kl,
        kl_gradient=kl_gradient,
    )
