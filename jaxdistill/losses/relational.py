"""Relations between examples made like the teacher's: no projection, whatever the two widths.

The relation of a pair depends on two rows and, in `rkd_distance`, on the mean over all, so values
belong to a set of rows: `rkd_*` return Weighted, the cosine of relations and CKA one value a set.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.feature_arguments import (
    ArrayLike,
    norm,
    product,
    row_mask,
    scaled,
    student_and_teacher_features,
    unit,
    zero_where_dropped,
)
from jaxdistill.losses.reduce import Weighted


def rkd_distance(
    student_features: ArrayLike, teacher_features: ArrayLike, mask: ArrayLike | None = None
) -> Weighted:
    """Relational KD by distances: which examples lie near each other, relative to the average.

        mean over pairs i != j of huber(d^S_ij - d^T_ij),  d_ij = ||x_i - x_j|| / mean ||x_i - x_j||
        huber(r) = r^2 / 2 where |r| <= 1, else |r| - 1/2

    The authors' code averages over all N^2 entries, the N zeros of the diagonal among them, so its
    values are smaller by (N - 1) / N. Common weights are 25, beside 50 for `rkd_angle`, in
    classification, 1 and 2 in metric learning. It holds N^2 D numbers. No gradient flows into the
    teacher.

    Args:
      student_features: `[N, Ds]`.
      teacher_features: `[N, Dt]`.
      mask: `[N]`, boolean: which rows exist; it is needed here as the mean distance is over them.

    Returns:
      Weighted, in ordered pairs.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: arXiv 1904.05068.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import rkd_distance
      >>> line, triangle = np.array([[0.0], [1.0], [2.0]]), np.eye(3)
      >>> print(rkd_distance(line, 5 * line).mean(), rkd_distance(line, triangle).mean().round(4))
      0.0 0.0625
    """
    student, teacher, keep = _rows(student_features, teacher_features, mask)
    pairs = _distinct(keep[:, None], keep[None, :])
    count = jnp.sum(pairs.astype(jnp.float32))

    def distances(rows: jax.Array) -> jax.Array:
        apart = jnp.where(pairs, norm(rows[:, None] - rows[None, :])[..., 0], 0.0)
        mean = jnp.sum(apart) / jnp.maximum(count, 1.0)
        return apart / jnp.where(mean > 0, mean, 1.0)

    loss = jnp.where(pairs, _huber(distances(student) - distances(teacher)), 0.0)
    return Weighted(jnp.sum(loss), count)


def rkd_angle(
    student_features: ArrayLike, teacher_features: ArrayLike, mask: ArrayLike | None = None
) -> Weighted:
    """Relational KD by angles: the shape of the triangle that three examples make.

        mean over triples i, j, k, all different, of huber(cos^S_ijk - cos^T_ijk)
        cos_ijk = <x_i - x_j, x_k - x_j> / (||x_i - x_j|| ||x_k - x_j||), huber of rkd_distance

    The authors' code averages over all N^3 entries, also those that are no triangle, so its values
    are smaller by (N - 1)(N - 2) / N^2. It holds N^2 D and N^3 numbers. No gradient flows into the
    teacher.

    Args:
      student_features: `[N, Ds]`.
      teacher_features: `[N, Dt]`.
      mask: `[N]`, boolean: which rows exist.

    Returns:
      Weighted, in ordered triples.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: arXiv 1904.05068.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import rkd_angle
      >>> square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
      >>> turned = 3 * square @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + 7
      >>> print(rkd_angle(square, turned).mean().round(4))
      0.0
    """
    student, teacher, keep = _rows(student_features, teacher_features, mask)
    pairs = _distinct(keep[:, None], keep[None, :])
    triples = pairs[:, :, None] & pairs[:, None, :] & pairs[None, :, :]

    def cosines(rows: jax.Array) -> jax.Array:
        directions = unit(rows[None, :] - rows[:, None])  # [vertex, end, D]
        return product("jid,jkd->jik", directions, directions)

    loss = jnp.where(triples, _huber(cosines(student) - cosines(teacher)), 0.0)
    return Weighted(jnp.sum(loss), jnp.sum(triples.astype(jnp.float32)))


def relation_cosine(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    pooled: bool = False,
    vocab_size: int | None = None,
) -> jax.Array:
    """LLaVA-KD's relation loss: how the visual tokens of a sample relate, in student and teacher.

        1 - cos(vec(S S^T), vec(T T^T)),  S = student_logits, T = teacher_logits

    Logits or any features, not normalised: rows of large norm weigh more. It does not change if one
    side is scaled or rotated. No gradient flows into the teacher.

    Args:
      student_logits: `[..., K, Vs]`, at the K visual positions of a sample.
      teacher_logits: `[..., K, Vt]`.
      mask: `[..., K]`, boolean: which positions exist; needed here, as K positions make one value.
      pooled: one cosine over the matrices of all samples together, as the authors' code has it;
        samples with larger logits then weigh more, and the value depends on the microbatch.
      vocab_size: columns from here on are padding and are cut off; default all count.

    Returns:
      `[...]`, float32, one a sample, or a scalar if pooled; in [0, 1]. 0 for a sample without
      positions, such as one of text alone: a mask of samples keeps it out of the mean.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2410.16236.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import relation_cosine
      >>> logits = np.array([[[1.0, 0.0], [0.0, 1.0]]])
      >>> print(relation_cosine(logits, 3 * logits).round(4))
      [0.]
      >>> print(relation_cosine(logits, np.ones((1, 2, 5))).round(4))  # 1 - 1 / sqrt(2)
      [0.2929]
    """
    student, teacher = student_and_teacher_features(
        checks.as_logits("student_logits", student_logits, vocab_size),
        checks.as_logits("teacher_logits", teacher_logits, vocab_size),
        "[..., K, V]",
        "logits",
    )
    keep = row_mask(mask, student.shape[:-1])
    axes = tuple(range(student.ndim)) if pooled else (-2, -1)

    def relation(logits: jax.Array) -> jax.Array:
        logits = scaled(zero_where_dropped(logits, keep), axes)
        return product("...kv,...lv->...kl", logits, logits)

    exists = jnp.any(keep, axis=None if pooled else -1)
    return jnp.where(exists, 1.0 - _cosine(relation(student), relation(teacher), axes), 0.0)


def linear_cka(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    debiased: bool = False,
) -> jax.Array:
    """Linear centred kernel alignment: how alike two representations of the same examples are.

        <K, L> / sqrt(<K, K> <L, L>),  K = H X X^T H, L = H Y Y^T H, H = 1 - 1/N

    1 if one is a rotation and scaling of the other; as a loss take 1 - linear_cka. With fewer
    examples than dimensions it is biased towards 1 whatever the features: `debiased` replaces the
    centred matrices by U-centred ones, whose products are unbiased. No gradient flows into the
    teacher.

    Args:
      student_features: `[..., N, Ds]`, N examples a set.
      teacher_features: `[..., N, Dt]`.
      mask: `[..., N]`, boolean: which examples exist; they make one value.
      debiased: whether to U-centre, which takes 4 examples or more.

    Returns:
      `[...]`, float32, one a set, in [0, 1], or [-1, 1] if debiased; 0 for features without
      variance and for a set with too few examples.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: arXiv 1905.00414; debiased, arXiv 2010.15327.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import linear_cka
      >>> features = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
      >>> print(linear_cka(features, 5 * features[:, ::-1] + 2).round(4))
      1.0
    """
    student, teacher = student_and_teacher_features(
        student_features, teacher_features, "[..., N, D]"
    )
    keep = row_mask(mask, student.shape[:-1])
    count = jnp.sum(keep.astype(jnp.float32), axis=-1)[..., None, None]

    def kernel(features: jax.Array) -> jax.Array:
        features = scaled(_centred(zero_where_dropped(features, keep), keep, count), (-2, -1))
        gram = product("...nd,...md->...nm", features, features)
        return _u_centred(gram, keep, count) if debiased else gram

    return _cosine(kernel(student), kernel(teacher), (-2, -1))


def _centred(features: jax.Array, keep: jax.Array, count: jax.Array) -> jax.Array:
    """Features less their mean, 0 in the columns where all that is left is rounding.

    Centred before the product: that of features far from 0 would have no digits left.
    """
    mean = jnp.sum(features, axis=-2, keepdims=True) / jnp.maximum(count, 1.0)
    centred = zero_where_dropped(features - mean, keep)
    largest = jnp.max(jnp.abs(features), axis=-2, keepdims=True)
    varies = jnp.max(jnp.abs(centred), axis=-2, keepdims=True) > 1e-6 * largest
    return jnp.where(varies, centred, 0.0)


def _u_centred(kernel: jax.Array, keep: jax.Array, count: jax.Array) -> jax.Array:
    """Szekely and Rizzo's centring: without the diagonal, rows and columns sum to 0."""
    pairs = keep[..., :, None] & keep[..., None, :]
    pairs &= ~jnp.broadcast_to(jnp.eye(kernel.shape[-1], dtype=bool), pairs.shape)
    kernel = jnp.where(pairs, kernel, 0.0)
    rows = jnp.sum(kernel, axis=-1, keepdims=True)
    columns = jnp.sum(kernel, axis=-2, keepdims=True)
    total = jnp.sum(rows, axis=-2, keepdims=True)
    less_two = jnp.maximum(count - 2.0, 1.0)
    centred = kernel - (rows + columns) / less_two + total / (less_two * (less_two + 1.0))
    return jnp.where(pairs & (count >= 4.0), centred, 0.0)


def _cosine(first: jax.Array, second: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Cosine of arrays as vectors over these axes; 0, and no gradient, where one is 0."""
    cosine = jnp.sum(first * second, axis=axes)
    for matrix in (first, second):
        squares = jnp.sum(matrix**2, axis=axes)
        cosine = jnp.where(squares > 0, cosine, 0.0)
        cosine *= lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
    return cosine


def _rows(
    student: ArrayLike, teacher: ArrayLike, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features with dropped rows set to 0, and which rows are kept."""
    student, teacher = student_and_teacher_features(student, teacher, "[N, D]")
    keep = row_mask(mask, student.shape[:-1])
    return zero_where_dropped(student, keep), zero_where_dropped(teacher, keep), keep


def _distinct(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Pairs of two different rows that exist."""
    return rows & columns & ~jnp.eye(rows.shape[0], dtype=bool)


def _huber(difference: jax.Array) -> jax.Array:
    magnitude = jnp.abs(difference)
    return jnp.where(magnitude <= 1.0, 0.5 * difference**2, magnitude - 0.5)
