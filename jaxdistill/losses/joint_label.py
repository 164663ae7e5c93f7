"""Self-supervised label augmentation (SLA): classes and input transformations as one label.

Every image comes under M transformations, the first of them the identity. Class y under the j-th is
label y M + j of one joint head. The axis before the last of `joint_logits` is the transformation an
input went through; the last holds the M columns of class 0, then those of class 1.
"""

import jax
import jax.numpy as jnp

from jaxdistill.losses import checks
from jaxdistill.losses.cross_entropy import cross_entropy
from jaxdistill.losses.distribution import label_value
from jaxdistill.losses.divergence import forward_kl
from jaxdistill.losses.feature_arguments import ArrayLike, as_features


def sla(joint_logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Cross-entropy of the joint label of class and transformation.

        -log softmax(joint_logits_j)[label M + j]

    The mean over images and transformations is the paper's loss; the sum over transformations,
    `.sum(-1)`, which its authors advise for large data, is M times that.

    Args:
      joint_logits: `[..., M, N M]`, of each image under each of M transformations, for N classes.
      labels: `[...]` integers in [0, N), one an image: outside jit a label out of range raises,
        inside jit it gives NaN, which a mask removes.

    Returns:
      `[..., M]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1910.05872.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sla
      >>> print(sla(np.zeros((1, 2, 6)), np.array([2])).round(3))  # log 6
      [[1.792 1.792]]
    """
    log_p = _own_columns(jax.nn.log_softmax(_joint(joint_logits)))
    labels = jnp.asarray(labels)
    if labels.shape != log_p.shape[:-2]:
        raise ValueError(
            f"labels must have shape {log_p.shape[:-2]}, one an image, "
            f"but the shape is {labels.shape}"
        )
    return -label_value(log_p, jnp.broadcast_to(labels[..., None], log_p.shape[:-1]))


def sla_single(
    joint_logits: ArrayLike, *, num_transformations: int, transformation: int = 0
) -> jax.Array:
    """Class logits of one input whose transformation is known: those of its columns alone.

        joint_logits[i M + j] for class i, j = transformation

    Their softmax is P(class | x, j): conditioned on the transformation, not summed over it.

    Args:
      joint_logits: `[..., N M]`.
      num_transformations: M, at least 1; a divisor of the last axis.
      transformation: j, in [0, M); 0 is the identity.

    Returns:
      `[..., N]`, float32, logits.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1910.05872.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sla_single
      >>> print(sla_single(np.array([0.0, 1.0, 2.0, 3.0]), num_transformations=2))
      [0. 2.]
    """
    logits = as_features("joint_logits", joint_logits, "[..., N M]")
    if num_transformations < 1 or logits.shape[-1] % num_transformations:
        raise ValueError(
            f"num_transformations must divide {logits.shape[-1]}, the columns of joint_logits, "
            f"but it is {num_transformations}"
        )
    checks.check_between("transformation", transformation, 0, num_transformations - 1)
    return logits[..., transformation::num_transformations]


def sla_aggregate(joint_logits: ArrayLike) -> jax.Array:
    """Class logits of an image from all its transformations: the mean of the matching columns.

        (1 / M) sum_j joint_logits_j[i M + j] for class i

    Args:
      joint_logits: `[..., M, N M]`, as for `sla`.

    Returns:
      `[..., N]`, float32, logits.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: arXiv 1910.05872.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sla_aggregate
      >>> print(sla_aggregate(np.array([[1.0, 9.0, 3.0, 9.0], [9.0, 5.0, 9.0, 5.0]])))
      [3. 4.]
    """
    return jnp.mean(_own_columns(_joint(joint_logits)), axis=-2)


def sla_distillation(
    joint_logits: ArrayLike,
    single_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    label_weight: ArrayLike = 1.0,
    sum_transformations: bool = False,
) -> jax.Array:
    """SLA with self-distillation: a head of plain classes learns what the aggregation says.

        mean_j sla_j + label_weight CE(single_logits, label)
        + temperature^2 KL(stop_gradient(softmax(s / temperature)) || softmax(single / temperature))
        s = sla_aggregate(joint_logits)

    At inference the plain head serves alone, in one pass. No gradient of the KL flows into the
    joint head.

    Args:
      joint_logits: `[..., M, N M]`, as for `sla`.
      single_logits: `[..., N]`, of the plain head on the untransformed image.
      labels: `[...]`, as for `sla`.
      temperature: scalar above 0.
      label_weight: at least 0; 1 in the authors' code.
      sum_transformations: whether the first term is the sum over transformations, the authors'
        "large loss"; the others stay as they are.

    Returns:
      `[...]`, float32, nats, one an image.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1910.05872.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import sla_distillation
      >>> print(sla_distillation(np.zeros((1, 2, 6)), np.zeros((1, 3)), np.array([2])).round(4))
      [2.8904]
    """
    checks.check_between("label_weight", label_weight, 0.0, float("inf"))
    aggregated = sla_aggregate(joint_logits)
    single_logits = checks.as_logits("single_logits", single_logits, None)
    if single_logits.shape != aggregated.shape:
        raise ValueError(
            f"single_logits must have shape {aggregated.shape}, the classes of joint_logits, "
            f"but its shape is {single_logits.shape}"
        )
    reduction = jnp.sum if sum_transformations else jnp.mean
    joint = reduction(sla(joint_logits, labels), axis=-1)
    divergence = forward_kl(
        single_logits, aggregated, temperature=temperature, scale_by_temperature_squared=True
    )
    return joint + jnp.float32(label_weight) * cross_entropy(single_logits, labels) + divergence


def _joint(joint_logits: ArrayLike) -> jax.Array:
    logits = as_features("joint_logits", joint_logits, "[..., M, N M]")
    if logits.shape[-1] % logits.shape[-2]:
        raise ValueError(
            f"joint_logits must have shape [..., M, N M], its columns a multiple of its "
            f"transformations, but its shape is {logits.shape}"
        )
    return logits


def _own_columns(logits: jax.Array) -> jax.Array:
    """Of each transformation j the columns i M + j: `[..., M, N M]` -> `[..., M, N]`."""
    transformations = logits.shape[-2]
    by_class = logits.reshape(*logits.shape[:-1], -1, transformations)
    return jnp.moveaxis(jnp.diagonal(by_class, axis1=-3, axis2=-1), -1, -2)
