"""Distillation of classifiers: what of the teacher's distribution the student has to match.

`forward_kl` is the plain form. `decoupled_kd` weights its two parts on their own,
`standardize_logits` frees the student from the scale of the teacher's logits, and `dist` asks for
correlation alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import expectation, label_value, student_and_teacher
from jaxdistill.losses.feature_arguments import (
    ArrayLike,
    row_mask,
    student_and_teacher_features,
    unit,
    zero_where_dropped,
)
from jaxdistill.losses.reduce import Weighted


def decoupled_kd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    target_weight: ArrayLike = 1.0,
    non_target_weight: ArrayLike = 8.0,
    temperature: ArrayLike = 4.0,
    scale_by_temperature_squared: bool = True,
    vocab_size: int | None = None,
) -> jax.Array:
    """Decoupled KD: how sure the teacher is of the target, and what it thinks of the other classes.

        target_weight TCKD + non_target_weight NCKD        (* temperature^2)
        TCKD = KL((P_y, 1 - P_y) || (Q_y, 1 - Q_y)),  y = label
        NCKD = KL(P' || Q'),  P'_v = P_v / (1 - P_y) and Q'_v = Q_v / (1 - Q_y) over v != y

    The plain divergence is TCKD + (1 - P_y) NCKD: what a sure teacher knows of the other classes
    hardly counts in it. P and Q are as in `forward_kl`; no gradient flows into the teacher or the
    temperature. Exact and in logarithms, so it holds for any logits: the authors' code takes 1000
    off the target's logit in NCKD, and the logarithm of a rounded probability in TCKD, which is
    infinite from a gap of about 104 temperatures on. It reduces by the mean over rows, and on
    CIFAR-100 ramps the loss up over the first 20 epochs.

    Args:
      student_logits: `[..., V]`, V at least 2.
      teacher_logits: `[..., V]`; see `forward_kl`. With -inf in all but the target NCKD is 0.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      target_weight: scalar of at least 0; alpha in the paper.
      non_target_weight: scalar of at least 0; beta in the paper. The authors' code has 8 by
        default, between 0.5 and 8 by pair of networks.
      temperature: scalar above 0, for both sides; 4 for CIFAR-100 and 1 for ImageNet.
      scale_by_temperature_squared: whether to multiply by temperature^2.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
        Default all count.

    Returns:
      `[...]`, float32, nats; 0 where P = Q.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2203.08679.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import decoupled_kd
      >>> teacher = np.log(np.array([[0.5, 0.4, 0.1]]))
      >>> print(decoupled_kd(np.log(np.array([[0.5, 0.1, 0.4]])), teacher, np.array([0]),
      ...                    non_target_weight=2.0, temperature=1.0).round(4))  # 2 * 0.6 log 4
      [1.6636]
    """
    checks.check_between("target_weight", target_weight, 0.0, float("inf"))
    checks.check_between("non_target_weight", non_target_weight, 0.0, float("inf"))
    checks.check_positive("temperature", temperature)
    student = checks.as_logits("student_logits", student_logits, vocab_size)
    teacher = lax.stop_gradient(checks.as_logits("teacher_logits", teacher_logits, vocab_size))
    checks.check_same_shape("teacher_logits", teacher, "student_logits", student)
    if student.shape[-1] < 2:
        raise ValueError(
            "student_logits must have at least 2 columns that count, "
            f"but they have {student.shape[-1]}"
        )
    of_label = label_value(student, labels)
    temperature = lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    split_q, others_q = _decouple(student / temperature, labels)
    split_p, others_p = _decouple(teacher / temperature, labels)
    tckd = expectation(split_p, split_p - split_q)
    nckd = expectation(others_p, others_p - others_q)
    weights = jnp.asarray(target_weight, jnp.float32), jnp.asarray(non_target_weight, jnp.float32)
    loss = weights[0] * tckd + weights[1] * nckd
    if scale_by_temperature_squared:
        loss *= temperature**2
    return jnp.where(jnp.isnan(of_label), jnp.nan, loss)


def _decouple(logits: jax.Array, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of (target, rest) `[..., 2]`, and of each class within the rest `[..., V]`.

    Both sum to 1. In the second the target is -inf, as all are where the rest has nothing. Each
    comes from differences of logits: a softmax of all has no digits left for the rest of a sure
    target.
    """
    column = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_target = column == jnp.asarray(labels, jnp.int32)[..., None]
    others = jnp.where(is_target, -jnp.inf, logits)
    largest = lax.stop_gradient(jnp.max(others, axis=-1))
    largest = jnp.where(largest > -jnp.inf, largest, 0.0)
    others -= largest[..., None]
    rest = jax.nn.logsumexp(others, axis=-1)
    odds = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - largest - rest
    split = jnp.stack([jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)], axis=-1)
    return split, others - jnp.where(rest > -jnp.inf, rest, 0.0)[..., None]


def standardize_logits(logits: ArrayLike, *, vocab_size: int | None = None) -> jax.Array:
    """Logit standardisation: mean 0 and standard deviation 1 over the classes of each row.

        (z - mean_v z) / std_v z,  std^2 = mean_v (z - mean_v z)^2

    The student then learns the order and spacing of the teacher's logits, not their range, which a
    small network cannot reach. Standardise both sides; the authors mostly take temperature 2, and
    weight 9 beside the cross-entropy of the student's own logits. `decoupled_kd` takes them too.

        standard = standardize_logits(student_logits), standardize_logits(teacher_logits)
        9 * forward_kl(*standard, temperature=2.0, scale_by_temperature_squared=True)

    The gradient flows through mean and deviation, and is orthogonal to a shift and to a scaling of
    z. A row whose logits are all equal becomes 0 and gets the gradient 0; the authors' code adds
    1e-7 to the deviation, which multiplies a gradient by 1e7 there. Its deviation is torch's, over
    V - 1, so its results are smaller by sqrt(1 - 1/V), as at a higher temperature.

    Args:
      logits: `[..., V]`; -inf is no part of mean and deviation, and stays.
      vocab_size: columns from here on are padding and are cut off; default all count.

    Returns:
      `[..., vocab_size]`, float32; at most sqrt(V - 1) from 0.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2403.01427.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import standardize_logits
      >>> print(standardize_logits(np.array([[10.0, 14.0], [3.0, 3.0]])).round(4))
      [[-1.  1.]
       [ 0.  0.]]
    """
    logits = checks.as_logits("logits", logits, vocab_size)
    exists = logits > -jnp.inf
    count = jnp.maximum(jnp.sum(exists.astype(jnp.float32), axis=-1, keepdims=True), 1.0)
    # Less the largest first: equal logits are then exactly 0, where a mean of them is rounded.
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    below = jnp.where(exists, logits - largest, 0.0)
    centred = jnp.where(exists, below - jnp.sum(below, axis=-1, keepdims=True) / count, 0.0)
    return jnp.where(exists, unit(centred) * jnp.sqrt(count), -jnp.inf)


def dist(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    inter_weight: ArrayLike = 2.0,
    intra_weight: ArrayLike = 2.0,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 1e-8,
    vocab_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Weighted:
    """DIST: probabilities that correlate with the teacher's, over classes and over examples.

        inter_weight mean_n (1 - r(Q_n., P_n.)) + intra_weight mean_v (1 - r(Q_.v, P_.v))
        r(a, b) = <a - mean a, b - mean b> / (||a - mean a|| ||b - mean b|| + epsilon)

    r is 0, without gradient, where one side is constant. P and Q are as in `forward_kl`; no
    gradient flows into the teacher or the temperature. The second part depends on the whole batch:
    the mean over microbatches is that of their values, each with its own correlations. The authors'
    code takes the batch of one device, without axis_name.

    The authors' code multiplies by temperature^2, although a correlation's gradient does not shrink
    with it: for its temperature 4 on CIFAR-100 the weights of 2 are 32 here.

    Args:
      student_logits: `[N, V]`; the pixels of a segmentation are rows.
      teacher_logits: `[N, V]`; -inf is a column of probability 0.
      mask: `[N]`, boolean: which rows exist; it is needed here as correlations are over them.
      inter_weight: scalar of at least 0; beta in the paper.
      intra_weight: scalar of at least 0; gamma in the paper.
      temperature: scalar above 0, for both sides.
      epsilon: scalar of at least 0. With the default, that of the authors' code, a class rare in
        the whole batch hardly counts, and its distance stays near 1; 0 gives Pearson's correlation.
      vocab_size: columns from here on are padding and do not exist; the two paddings may differ.
        Default all count.
      axis_name: mesh axes over which the batch is split, inside shard_map; correlations are then
        over all rows, and every device returns the part of its own.

    Returns:
      Weighted, in rows; the mean is in [0, 2 (inter_weight + intra_weight)].

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2205.10536.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dist
      >>> teacher = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]))
      >>> print(dist(teacher, teacher).mean().round(4))  # 2/3: one class of three is constant
      0.6667
      >>> print(dist(teacher[::-1], teacher, intra_weight=0.0).mean().round(4))  # 2 (1 + 13/14)
      3.8571
    """
    for name, value in (
        ("inter_weight", inter_weight),
        ("intra_weight", intra_weight),
        ("epsilon", epsilon),
    ):
        checks.check_between(name, value, 0.0, float("inf"))
    features = student_and_teacher_features(student_logits, teacher_logits, "[N, V]", "logits")
    keep = row_mask(mask, features[0].shape[:1])
    student, teacher = (zero_where_dropped(x, keep) for x in features)
    log_q, log_p = student_and_teacher(student, teacher, temperature, vocab_size)
    q, p = (zero_where_dropped(jnp.exp(x), keep) for x in (log_q, log_p))
    exists = zero_where_dropped(jnp.ones_like(p), keep)
    epsilon = jnp.asarray(epsilon, jnp.float32)

    def over_classes(values: jax.Array) -> jax.Array:
        return jnp.sum(values, axis=1, keepdims=True)

    def over_rows(values: jax.Array) -> jax.Array:
        total = jnp.sum(values, axis=0, keepdims=True)
        return total if axis_name is None else lax.psum(total, axis_name)

    inter = 1.0 - _correlation(q, p, exists, over_classes, epsilon)[:, 0]
    intra = 1.0 - _correlation(q, p, exists, over_rows, epsilon)[0]
    rows = jnp.sum(keep.astype(jnp.float32))
    loss = jnp.asarray(inter_weight, jnp.float32) * jnp.sum(jnp.where(keep, inter, 0.0))
    loss += jnp.asarray(intra_weight, jnp.float32) * rows * jnp.mean(intra)
    return Weighted(loss, rows)


def _correlation(
    first: jax.Array,
    second: jax.Array,
    exists: jax.Array,
    total: Callable[[jax.Array], jax.Array],
    epsilon: jax.Array,
) -> jax.Array:
    """r of the formula along the axis that `total` sums over."""
    count = jnp.maximum(total(exists), 1.0)
    centred, length = [], jnp.float32(1.0)
    for values in (first, second):
        deviation = (values - total(values) / count) * exists
        squares = total(deviation**2)
        # Less than a millionth is what the sum for the mean rounds off.
        varies = squares > 1e-12 * total(values**2)
        centred.append(jnp.where(varies, deviation, 0.0))
        length *= jnp.where(varies, jnp.sqrt(jnp.where(varies, squares, 1.0)), 0.0)
    length += epsilon
    covariance = jnp.where(length > 0, total(centred[0] * centred[1]), 0.0)
    return covariance / jnp.where(length > 0, length, 1.0)
