"""Distillation of final outputs alone: MEAL V2's teachers and discriminator, DHO, UnFuSeD."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import softplus

from jaxdistill.losses import checks
from jaxdistill.losses.cross_entropy import cross_entropy
from jaxdistill.losses.distribution import expectation, log_softmax
from jaxdistill.losses.divergence import forward_kl
from jaxdistill.losses.feature_arguments import ArrayLike, as_features, unit


def ensemble_probabilities(
    teacher_logits: ArrayLike, *, temperature: ArrayLike = 1.0, vocab_size: int | None = None
) -> jax.Array:
    """What several teachers say on average: a target for `soft_cross_entropy`.

        mean_k softmax(teacher_logits_k / temperature)

    Probabilities are averaged, not logits: two teachers sure of different classes give half to
    each. No gradient flows into the teachers.

    Args:
      teacher_logits: `[..., K, V]` of K teachers.
      temperature: scalar above 0.
      vocab_size: columns from here on are padding and are cut off; default all count.

    Returns:
      `[..., V]`, float32, probabilities.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: MEAL V2, arXiv 2009.08453.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import ensemble_probabilities
      >>> print(ensemble_probabilities(np.array([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0]])).round(4))
      [0.5 0.5 0. ]
    """
    as_features("teacher_logits", teacher_logits, "[..., K, V]")
    log_p = log_softmax("teacher_logits", teacher_logits, temperature, vocab_size)
    return lax.stop_gradient(jnp.mean(jnp.exp(log_p), axis=-2))


def output_discrimination(student_scores: ArrayLike, teacher_scores: ArrayLike) -> jax.Array:
    """MEAL V2's adversarial loss: a discriminator tells the student's logits from the teachers'.

        (bce(s_0, 1) + bce(s_1, 0) + bce(t_0, 0) + bce(t_1, 1)) / 4,  bce(x, y) = softplus(x) - x y

    s and t are a small network's scores of the student's logits and of the mean of the teachers'
    logits. In the paper the student deceives it: apply `reverse_gradient` to the student's logits
    before the network. The authors' code has no reversal, so there the student helps it, and a ReLU
    on the scores, under which a bce of target 0 never falls below log 2. Gradients flow through
    both scores; stop them at the teachers' logits.

    Args:
      student_scores: `[..., 2]`, raw.
      teacher_scores: `[..., 2]`, raw.

    Returns:
      `[...]`, float32, nats; log 2 for scores of 0. Its mean over rows is the loss.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: arXiv 2009.08453.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import output_discrimination
      >>> print(output_discrimination(np.zeros((1, 2)), np.zeros((1, 2))).round(4))
      [0.6931]
    """
    student = as_features("student_scores", student_scores, "[..., 2]")
    teacher = as_features("teacher_scores", teacher_scores, "[..., 2]")
    if student.shape[-1] != 2:
        raise ValueError(
            f"student_scores must have shape [..., 2], but its shape is {student.shape}"
        )
    checks.check_same_shape("teacher_scores", teacher, "student_scores", student)
    sign = jnp.broadcast_to(jnp.array([-1.0, 1.0]), student.shape)
    terms = softplus(sign * student) + softplus(-sign * teacher)
    return jnp.sum(terms, axis=-1) / 4.0


def reverse_gradient(values: ArrayLike, *, scale: ArrayLike = 1.0) -> jax.Array:
    """The identity, whose gradient is turned round: what follows is deceived, not helped.

        values, with gradient -scale times that of the result

    Args:
      values: `[...]`, floating.
      scale: scalar of at least 0; it may follow a schedule, and receives no gradient.

    Returns:
      `[...]`, float32.

    Raises:
      ValueError: values that are not floating, or a scale below 0.

    Source: arXiv 1409.7495.

    Example:
      >>> import jax, numpy as np
      >>> from jaxdistill.losses import reverse_gradient
      >>> print(jax.grad(lambda x: 3.0 * reverse_gradient(x))(1.0))
      -3.0
    """
    checks.check_between("scale", scale, 0.0, float("inf"))
    return _reversed(as_features("values", values, "[...]"), jnp.asarray(scale, jnp.float32))


@jax.custom_vjp
def _reversed(values: jax.Array, scale: jax.Array) -> jax.Array:
    return values


def _reversed_forward(values: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values, scale


def _reversed_backward(scale: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -scale * gradient, jnp.zeros_like(scale)


_reversed.defvjp(_reversed_forward, _reversed_backward)


def dho(
    label_logits: ArrayLike,
    distill_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    labeled: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    label_weight: ArrayLike = 0.5,
    distill_weight: ArrayLike = 0.5,
) -> jax.Array:
    """Dual-head optimisation: one head learns the labels, another the teacher, on one backbone.

        [labeled] label_weight CE(label_logits, labels) + distill_weight temperature^2 KL(P || Q)
        P = softmax(teacher_logits / temperature), Q = softmax(distill_logits / temperature)

    The authors reduce labelled and unlabelled rows by a mean each and add the two:
    `token_mean(values, labeled).mean() + token_mean(values, ~labeled).mean()`; one mean over all
    would let the labels fade with the number of unlabelled rows. Their ImageNet script has both
    weights 1. No gradient flows into the teacher, nor from one head's loss into the other.

    Args:
      label_logits, distill_logits, teacher_logits: `[..., C]`.
      labels: `[...]` integers in [0, C); whatever they are where not labelled.
      labeled: `[...]`, boolean: which rows have a label.
      temperature: scalar above 0, of the distillation.
      label_weight, distill_weight: at least 0.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2505.07675.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dho
      >>> logits, labels = np.zeros((2, 4)), np.array([1, -1])
      >>> print(dho(logits, logits, logits, labels, np.array([True, False])).round(4))  # log(4)/2
      [0.6931 0.    ]
    """
    checks.check_between("label_weight", label_weight, 0.0, float("inf"))
    checks.check_between("distill_weight", distill_weight, 0.0, float("inf"))
    label_logits = checks.as_logits("label_logits", label_logits, None)
    for name, logits in (("distill_logits", distill_logits), ("teacher_logits", teacher_logits)):
        logits = checks.as_logits(name, logits, None)
        checks.check_same_shape(name, logits, "label_logits", label_logits)
    divergence = forward_kl(
        distill_logits, teacher_logits, temperature=temperature, scale_by_temperature_squared=True
    )
    has_label = checks.as_tokens("labeled", labeled, divergence.shape) != 0
    labels = jnp.asarray(labels)
    checks.check_same_shape("labels", labels, "labeled", has_label)
    likelihood = cross_entropy(label_logits, jnp.where(has_label, labels, 0))
    label_term = jnp.where(has_label, jnp.float32(label_weight) * likelihood, 0.0)
    return label_term + jnp.float32(distill_weight) * divergence


def dho_probabilities(
    label_logits: ArrayLike,
    distill_logits: ArrayLike,
    *,
    label_share: ArrayLike = 0.5,
    temperature: ArrayLike = 0.5,
) -> jax.Array:
    """What DHO predicts: its two heads mixed, by numbers that are searched after the training.

        a softmax(label_logits) + (1 - a) softmax(distill_logits / temperature),  a = label_share

    The search is on validation data; its temperature is not that of the training.

    Args:
      label_logits, distill_logits: `[..., C]`.
      label_share: in [0, 1].
      temperature: scalar above 0, of the distilled head.

    Returns:
      `[..., C]`, float32, probabilities.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2505.07675.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dho_probabilities
      >>> print(dho_probabilities(np.array([40.0, 0.0]), np.zeros(2)).round(4))
      [0.75 0.25]
    """
    checks.check_between("label_share", label_share, 0.0, 1.0)
    labelled = jnp.exp(log_softmax("label_logits", label_logits, 1.0, None))
    distilled = jnp.exp(log_softmax("distill_logits", distill_logits, temperature, None))
    checks.check_same_shape("distill_logits", distilled, "label_logits", labelled)
    share = jnp.asarray(label_share, jnp.float32)
    return share * labelled + (1.0 - share) * distilled


def unfused(
    shallow_logits: ArrayLike,
    deep_logits: ArrayLike,
    labels: ArrayLike,
    *,
    shallow_weight: ArrayLike = 0.7,
    kl_weight: ArrayLike = 0.3,
    distance_weight: ArrayLike = 0.003,
    stop_deep_gradient: bool = False,
) -> jax.Array:
    """UnFuSeD's self-distillation: exits along a network learn pseudo-labels and its last exit.

        CE(q, c) + sum_i [a CE(q_i, c) + b KL(softmax(q) || softmax(q_i)) + g (2 - 2 cos(q_i, q))]
        q = deep_logits, q_i = shallow_logits_i, c = labels; a, b, g the weights in their order

    Args:
      shallow_logits: `[..., S, C]`, of S exits.
      deep_logits: `[..., C]`.
      labels: `[...]` integers in [0, C), the clusters: outside jit a label out of range raises,
        inside jit it gives NaN, which a mask removes.
      shallow_weight, kl_weight, distance_weight: at least 0.
      stop_deep_gradient: whether the last exit is a constant to the others, which in the authors'
        code it is not; what the paper means could not be confirmed.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2303.05668.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import unfused
      >>> shallow, deep = np.full((1, 3, 2), 0.5), np.ones((1, 2))
      >>> print(unfused(shallow, deep, np.array([0])).round(4))  # (1 + 3 * 0.7) log 2
      [2.1488]
    """
    checks.check_between("shallow_weight", shallow_weight, 0.0, float("inf"))
    checks.check_between("kl_weight", kl_weight, 0.0, float("inf"))
    checks.check_between("distance_weight", distance_weight, 0.0, float("inf"))
    shallow = as_features("shallow_logits", shallow_logits, "[..., S, C]")
    deep = as_features("deep_logits", deep_logits, "[..., C]")
    if shallow.shape[:-2] + shallow.shape[-1:] != deep.shape:
        raise ValueError(
            f"shallow_logits must have the shape of deep_logits, {deep.shape}, with an axis of "
            f"exits before the last, but its shape is {shallow.shape}"
        )
    loss = cross_entropy(deep, labels)
    target = jnp.broadcast_to(deep[..., None, :], shallow.shape)
    labels = jnp.broadcast_to(jnp.asarray(labels)[..., None], shallow.shape[:-1])
    if stop_deep_gradient:
        target = lax.stop_gradient(target)
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(shallow)
    cosine = jnp.sum(unit(shallow) * unit(target), axis=-1)
    exits = jnp.float32(shallow_weight) * cross_entropy(shallow, labels)
    exits += jnp.float32(kl_weight) * expectation(log_p, log_p - log_q)
    exits += jnp.float32(distance_weight) * (2.0 - 2.0 * cosine)
    return loss + jnp.sum(exits, axis=-1)
