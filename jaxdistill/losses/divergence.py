"""Divergences of a student's distribution from a teacher's, at every position.

P is the teacher's and Q the student's softmax(logits / temperature). The gradient of a divergence
shrinks by 1 / temperature^2 when the temperature is high; `scale_by_temperature_squared` undoes
that where the divergence is added to a cross-entropy at temperature 1.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.kernels.linear_divergence import kinds
from jaxdistill.losses import checks
from jaxdistill.losses.distribution import (
    expectation,
    student_and_teacher,
    times_temperature_squared,
)

LOWEST = -1e30  # stands for the log-probability -inf where a difference of two is taken


def forward_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Forward KL divergence KL(P || Q): the student must cover all the teacher does.

        sum_v P_v (log P_v - log Q_v)        (* temperature^2)

    No gradient flows into the teacher or the temperature. Reduced by "batchmean", torch's kl_div
    divides by its first axis alone: on [batch, length, V] it grows with the length. Tunix averages
    over all positions, padding too.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., V]`; -inf is a column of probability 0, and contributes nothing.
      temperature: scalar above 0, for both sides.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
        Default all count.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1503.02531.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import forward_kl
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(forward_kl(np.zeros((1, 2)), teacher).round(4))  # log 2 - entropy of the teacher
      [0.3681]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    divergence = expectation(log_p, log_p - log_q)
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def reverse_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Reverse KL divergence KL(Q || P): the student must stay where the teacher is.

        sum_v Q_v (log Q_v - log P_v)        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., V]`; the sum leaves out columns where it is -inf, in which the
        divergence proper is infinite.
      temperature: scalar above 0, for both sides.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
        Default all count.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2306.08543.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import reverse_kl
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(reverse_kl(np.zeros((1, 2)), teacher).round(4))
      [0.5108]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    divergence = _both_kl(log_q, log_p)[1]
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def symmetric_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """The mean of forward and reverse KL divergence; Jeffreys' divergence is twice this.

        (KL(P || Q) + KL(Q || P)) / 2        (* temperature^2)

    No gradient flows into the teacher or the temperature.

    Args:
      student_logits, teacher_logits, temperature, scale_by_temperature_squared, vocab_size: as for
        `forward_kl`; columns where the teacher's logit is -inf as in `reverse_kl`.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: SSLD, arXiv 2103.05959.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import symmetric_kl
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(symmetric_kl(np.zeros((1, 2)), teacher).round(4))
      [0.4394]
    """
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    forward, reverse = _both_kl(log_q, log_p)
    divergence = 0.5 * (forward + reverse)
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def adaptive_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    head_mass: jax.typing.ArrayLike = 0.5,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """AKL: forward KL where the student misses the teacher's head, reverse KL where its tail.

        (g_H KL(P || Q) + g_T KL(Q || P)) / (g_H + g_T)        (* temperature^2)
        g_H = sum_{v in H} |P_v - Q_v|, g_T the same over the other tokens
        H = the fewest of the teacher's likeliest tokens with a mass of head_mass or more

    The weights are constants: the paper does not say whether they are; where P = Q they are 1/2.
    No gradient flows into the teacher or the temperature.

    Args:
      student_logits, teacher_logits, temperature, scale_by_temperature_squared, vocab_size: as for
        `forward_kl`; columns where the teacher's logit is -inf as in `reverse_kl`.
      head_mass: scalar in [0, 1].

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2404.02657.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import adaptive_kl
      >>> teacher = np.log(np.array([[0.9, 0.1]]))
      >>> print(adaptive_kl(np.zeros((1, 2)), teacher).round(4))  # both gaps are 0.4
      [0.4394]
    """
    checks.check_between("head_mass", head_mass, 0.0, 1.0)
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    p = jnp.exp(log_p)
    order = jnp.argsort(-p, axis=-1)
    in_order = jnp.take_along_axis(p, order, axis=-1)
    before = jnp.cumsum(in_order, axis=-1) - in_order
    gap = jnp.take_along_axis(jnp.abs(p - lax.stop_gradient(jnp.exp(log_q))), order, axis=-1)
    of_head = jnp.sum(jnp.where(before < jnp.asarray(head_mass, jnp.float32), gap, 0.0), axis=-1)
    total = jnp.sum(gap, axis=-1)
    share = lax.stop_gradient(jnp.where(total > 0, of_head / jnp.where(total > 0, total, 1.0), 0.5))
    forward, reverse = _both_kl(log_q, log_p)
    divergence = share * forward + (1.0 - share) * reverse
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def jensen_shannon(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    beta: jax.typing.ArrayLike = 0.5,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence: between forward and reverse KL, and bounded.

        beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q        (* temperature^2)

    Over beta it tends to the forward KL as beta tends to 0, over 1 - beta to the reverse KL as beta
    tends to 1; at 0 and 1 it is 0 everywhere, so they are refused. TRL's GKDTrainer switches to
    the KLs there: call those. TRL averages over the tokens of a microbatch if not told those of
    the step. The gradient flows through both Qs. No gradient flows into the teacher, beta or the
    temperature.

    Args:
      student_logits, teacher_logits, temperature, scale_by_temperature_squared, vocab_size: as for
        `forward_kl`.
      beta: scalar in (0, 1), the teacher's share of the mixture.

    Returns:
      `[...]`, float32, nats; 0 where P = Q, at most the entropy of (beta, 1 - beta).

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2306.13649.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import jensen_shannon
      >>> certain, other = np.array([[40.0, 0.0]]), np.array([[0.0, 40.0]])
      >>> print(jensen_shannon(certain, other).round(4))  # log 2
      [0.6931]
    """
    check_share("beta", beta, includes_zero=False)
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    divergence = of_mixture("jensen_shannon", log_q, log_p, beta)
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def skew_forward_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    skew: jax.typing.ArrayLike = 0.1,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Skew forward KL: the forward KL from a mixture, so no token costs more than -log(skew).

        KL(P || skew P + (1 - skew) Q)        (* temperature^2)

    No gradient flows into the teacher, the skew or the temperature. The authors' code leaves out
    the teacher's entropy: the same gradient, but not 0 where P = Q.

    Args:
      student_logits, teacher_logits, temperature, scale_by_temperature_squared, vocab_size: as for
        `forward_kl`.
      skew: scalar in [0, 1); 0 is the forward KL.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: DistiLLM, arXiv 2402.03898.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import skew_forward_kl
      >>> certain, other = np.array([[40.0, 0.0]]), np.array([[0.0, 40.0]])
      >>> print(skew_forward_kl(certain, other).round(4))  # log 10, where the KL is 40
      [2.3026]
    """
    check_share("skew", skew, includes_zero=True)
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    divergence = of_mixture("skew_forward_kl", log_q, log_p, skew)
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def skew_reverse_kl(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    *,
    skew: jax.typing.ArrayLike = 0.1,
    fixed_mixture: bool = False,
    temperature: jax.typing.ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """Skew reverse KL: the reverse KL to a mixture, so no token costs more than -log(skew).

        KL(Q || (1 - skew) P + skew Q)        (* temperature^2)

    The gradient flows through both Qs, as in DistiLLM; with `fixed_mixture` through the first
    alone, as in DistiLLM-2. No gradient flows into the teacher, the skew or the temperature.

    Args:
      student_logits, teacher_logits, temperature, scale_by_temperature_squared, vocab_size: as for
        `forward_kl`.
      skew: scalar in [0, 1); 0 is the reverse KL.
      fixed_mixture: whether the mixture is a constant.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: DistiLLM, arXiv 2402.03898; DistiLLM-2, arXiv 2503.07067.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import skew_reverse_kl
      >>> certain, other = np.array([[40.0, 0.0]]), np.array([[0.0, 40.0]])
      >>> print(skew_reverse_kl(certain, other).round(4))
      [2.3026]
    """
    check_share("skew", skew, includes_zero=True)
    log_q, log_p = student_and_teacher(student_logits, teacher_logits, temperature, vocab_size)
    kind = "skew_reverse_kl_fixed_mixture" if fixed_mixture else "skew_reverse_kl"
    divergence = of_mixture(kind, log_q, log_p, skew)
    return times_temperature_squared(divergence, temperature, scale_by_temperature_squared)


def of_mixture(
    kind: str, log_q: jax.Array, log_p: jax.Array, share: jax.typing.ArrayLike
) -> jax.Array:
    """The sum over the vocabulary, `[...]`, of what the head kernel sums tile by tile."""
    share = lax.stop_gradient(jnp.asarray(share, jnp.float32))
    log_q, log_p = jnp.maximum(log_q, LOWEST), jnp.maximum(log_p, LOWEST)
    return jnp.sum(kinds.terms(kind, log_q, log_p, share), axis=-1)


def check_share(name: str, value: jax.typing.ArrayLike, *, includes_zero: bool) -> None:
    """Raise ValueError unless a concrete scalar lies between 0 and 1; a tracer passes unseen."""
    checks.check_between(name, value, 0.0, 1.0)
    if checks.is_concrete(value) and (value == 1 or (value == 0 and not includes_zero)):
        limit = "[0, 1)" if includes_zero else "(0, 1)"
        raise ValueError(
            f"{name} must lie in {limit}, but it is {value}: where the divergence tends to a KL, "
            "call forward_kl or reverse_kl"
        )


def _both_kl(log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(P || Q) and KL(Q || P)."""
    forward = expectation(log_p, log_p - log_q)
    reverse = expectation(log_q, jnp.where(log_p > -jnp.inf, log_q - log_p, 0.0))
    return forward, reverse
