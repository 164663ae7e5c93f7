"""Pairwise objectives for few-step diffusion models: PSO, online and offline.

A few-step sampler is a short chain of Gaussian transitions, so its samples have likelihoods and
a pair of them can be compared as in DPO. The reference is the distilled model, frozen.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import log_sigmoid

from jaxdistill.losses import checks
from jaxdistill.losses.pairs import ArrayLike, as_log_prob


def gaussian_log_prob(sample: ArrayLike, mean: ArrayLike, scale: ArrayLike) -> jax.Array:
    """Log-density of a sampler's transition, averaged over the dimensions of the sample.

        mean_d [ -((sample_d - mean_d) / scale)^2 / 2 - log scale - log(2 pi) / 2 ]

    The mean, not the sum: the inverse temperature of `pso_online` is on that scale. The sample is
    a constant: no gradient flows into it.

    Args:
      sample: `[B, ...]`, the stored next state of the trajectory.
      mean: `[B, ...]`, the model's prediction of it.
      scale: `[B]`, standard deviations above 0; leave out a deterministic last step.

    Returns:
      `[B]`, float32, nats per dimension.

    Raises:
      ValueError: an argument of the wrong shape or type, or a scale that is not above 0.

    Source: PSO, arXiv 2410.03190.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import gaussian_log_prob
      >>> print(gaussian_log_prob(np.ones((1, 4)), np.zeros((1, 4)), np.ones(1)).round(4))
      [-1.4189]
    """
    sample = lax.stop_gradient(as_log_prob("sample", sample))
    mean = as_log_prob("mean", mean, sample.shape)
    scale = as_log_prob("scale", scale, sample.shape[:1])
    if checks.is_concrete(scale) and not (np.asarray(scale) > 0).all():
        raise ValueError(
            f"scale must be above 0, but its least is {np.asarray(scale).min()}: leave out a "
            "deterministic step, which has no density"
        )
    error = jnp.square(sample - mean).reshape(sample.shape[0], -1).mean(axis=1)
    return -0.5 * error / jnp.square(scale) - jnp.log(scale) - 0.5 * math.log(2 * math.pi)


def pso_online(
    first_log_prob: ArrayLike,
    second_log_prob: ArrayLike,
    reference_first_log_prob: ArrayLike,
    reference_second_log_prob: ArrayLike,
    preference: ArrayLike,
    *,
    beta: ArrayLike = 50.0,
    clip: ArrayLike = 0.1,
) -> jax.Array:
    """Pairwise sample optimisation on two samples of the model itself, step by step.

        r_i = log_prob_i - reference_log_prob_i, bounded to [log(1 - clip), log(1 + clip)]
        -log s(beta * preference * (r_first - r_second))

    A bounded ratio has no gradient: a step that has moved far from the reference rests. The
    reference log-probabilities and the preference are constants.

    Args:
      first_log_prob, second_log_prob: `[...]`, one transition each (`gaussian_log_prob`), of the
        two samples of a prompt.
      reference_first_log_prob, reference_second_log_prob: `[...]`, the same of the reference.
      preference: `[...]`, 1 where the first is better, -1 where the second is, 0 for a tie, which
        gives log 2 and no gradient.
      beta: scalar above 0.
      clip: scalar in [0, 1).

    Returns:
      `[...]`, float32; log 2 at the reference.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2410.03190; one term a step as in D3PO, arXiv 2311.13231.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import pso_online
      >>> first, second = np.array([-1.38, -0.4]), np.array([-1.42, -1.4])
      >>> reference = np.full(2, -1.4)
      >>> print(pso_online(first, second, reference, reference, np.array([1.0, -1.0])).round(3))
      [0.127 4.774]
    """
    checks.check_positive("beta", beta)
    checks.check_between("clip", clip, 0.0, math.nextafter(1.0, 0.0))
    first = as_log_prob("first_log_prob", first_log_prob)
    second = as_log_prob("second_log_prob", second_log_prob, first.shape)
    reference = (
        as_log_prob("reference_first_log_prob", reference_first_log_prob, first.shape),
        as_log_prob("reference_second_log_prob", reference_second_log_prob, first.shape),
    )
    sign = lax.stop_gradient(checks.as_tokens("preference", preference, first.shape))
    width = jnp.asarray(clip, jnp.float32)
    low, high = jnp.log1p(-width), jnp.log1p(width)
    ratios = [
        jnp.clip(policy - lax.stop_gradient(frozen), low, high)
        for policy, frozen in zip((first, second), reference, strict=True)
    ]
    return -log_sigmoid(jnp.asarray(beta, jnp.float32) * sign * (ratios[0] - ratios[1]))


def pso_offline(
    chosen_error: ArrayLike,
    rejected_error: ArrayLike,
    reference_chosen_error: ArrayLike,
    reference_rejected_error: ArrayLike,
    *,
    beta: ArrayLike = 200.0,
    rejected_weight: ArrayLike = 0.1,
    prior_weight: ArrayLike = 1.0,
) -> jax.Array:
    """Pairwise sample optimisation on given images against samples of the distilled model.

        m = chosen_error - rejected_weight * rejected_error, of the model and of the reference
        -log s(beta (m_reference - m)) + prior_weight * rejected_error

    Errors are denoising errors, mean over dimensions of w(sigma) (x0_predicted - x0)^2, both images
    of a pair at the same timestep (of the few distilled ones) with the same noise. The prior keeps
    the model able to make its own samples. The reference errors are constants.

    Args:
      chosen_error, rejected_error: `[...]`, at least 0, one a pair.
      reference_chosen_error, reference_rejected_error: `[...]`, the same of the reference.
      beta: scalar above 0.
      rejected_weight: scalar of at least 0; 1 is Diffusion-DPO.
      prior_weight: scalar of at least 0.

    Returns:
      `[...]`, float32; log 2 + prior_weight * rejected_error at the reference.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2410.03190; Diffusion-DPO, arXiv 2311.12908.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import pso_offline
      >>> chosen, rejected = np.array([0.5]), np.array([0.25])
      >>> print(pso_offline(chosen, rejected, chosen, rejected).round(3))  # log 2 + 0.25
      [0.943]
    """
    checks.check_positive("beta", beta)
    chosen, rejected, weight, prior = _errors(
        chosen_error, rejected_error, rejected_weight, prior_weight
    )
    frozen_chosen = as_log_prob("reference_chosen_error", reference_chosen_error, chosen.shape)
    frozen_rejected = as_log_prob(
        "reference_rejected_error", reference_rejected_error, chosen.shape
    )
    frozen = lax.stop_gradient(frozen_chosen - weight * frozen_rejected)
    margin = frozen - (chosen - weight * rejected)
    return prior * rejected - log_sigmoid(jnp.asarray(beta, jnp.float32) * margin)


def pso_hinge(
    chosen_error: ArrayLike,
    rejected_error: ArrayLike,
    *,
    beta: ArrayLike = 5.0,
    rejected_weight: ArrayLike = 0.1,
    prior_weight: ArrayLike = 0.5,
) -> jax.Array:
    """PSO for personalisation: a hinge on the pair's errors, without a reference model.

        max(0, 1 + beta (chosen_error - rejected_weight * rejected_error))
        + prior_weight * rejected_error

    Inside the active hinge the rejected error has the weight prior_weight - beta * rejected_weight,
    which is 0 for the defaults (the authors' script): then the rejected images only decide where
    the hinge is active.

    Args:
      chosen_error, rejected_error: `[...]`, denoising errors as in `pso_offline`.
      beta: scalar above 0.
      rejected_weight, prior_weight: scalars of at least 0.

    Returns:
      `[...]`, float32.

    Raises:
      ValueError: an argument of the wrong shape or range.

    Source: arXiv 2410.03190 ("pso_db" of its code).

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import pso_hinge
      >>> print(pso_hinge(np.array([0.1, 0.0]), np.array([0.2, 4.0])).round(4))  # 1.4 + 0.1, 0 + 2
      [1.5 2. ]
    """
    checks.check_positive("beta", beta)
    chosen, rejected, weight, prior = _errors(
        chosen_error, rejected_error, rejected_weight, prior_weight
    )
    gap = chosen - weight * rejected
    return jax.nn.relu(1.0 + jnp.asarray(beta, jnp.float32) * gap) + prior * rejected


def _errors(
    chosen_error: ArrayLike,
    rejected_error: ArrayLike,
    rejected_weight: ArrayLike,
    prior_weight: ArrayLike,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The four arguments of both offline forms, checked, as float32."""
    checks.check_between("rejected_weight", rejected_weight, 0.0, math.inf)
    checks.check_between("prior_weight", prior_weight, 0.0, math.inf)
    chosen = as_log_prob("chosen_error", chosen_error)
    rejected = as_log_prob("rejected_error", rejected_error, chosen.shape)
    weight, prior = (jnp.asarray(x, jnp.float32) for x in (rejected_weight, prior_weight))
    return chosen, rejected, weight, prior
