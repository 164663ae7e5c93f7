"""Where a network looks: attention maps of a student made like those of a teacher."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import expectation
from jaxdistill.losses.feature_arguments import (
    ArrayLike,
    as_features,
    magnitude,
    product,
    row_mask,
    scaled,
    student_and_teacher_features,
    unit,
    zero_where_dropped,
)


def attention_transfer(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    power: float = 2.0,
) -> jax.Array:
    """Attention transfer: where activations are large, whatever the number of channels.

        ||q_S / ||q_S|| - q_T / ||q_T|| ||^2,  q_p = sum_c |A_pc|^power

    The paper writes the norm unsquared, whose gradient is undefined where both agree; the authors'
    code squares it, as here, and divides by the number of positions. No gradient flows into the
    teacher.

    Args:
      student_features: `[..., P, Cs]`, activations at P positions (height times width).
      teacher_features: `[..., P, Ct]`, at the same positions.
      mask: `[..., P]`, boolean: which positions exist; needed here, as P positions make one value.
      power: at least 1.

    Returns:
      `[...]`, float32, one an image, in [0, 2]; 1 where one of the maps is all 0, 0 where both are.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 1612.03928.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import attention_transfer
      >>> student, teacher = np.array([[[1.0], [0.0]]]), np.array([[[3.0, 3.0], [0.0, 0.0]]])
      >>> print(attention_transfer(student, teacher), attention_transfer(student, student[:, ::-1]))
      [0.] [2.]
    """
    checks.check_between("power", power, 1.0, float("inf"))
    student, teacher = student_and_teacher_features(
        student_features, teacher_features, "[..., P, C]"
    )
    keep = row_mask(mask, student.shape[:-1])

    def attention(features: jax.Array) -> jax.Array:
        features = scaled(zero_where_dropped(features, keep), (-2, -1))
        return unit(jnp.sum(magnitude(features) ** power, axis=-1))

    return jnp.sum((attention(student) - attention(teacher)) ** 2, axis=-1)


def attention_kl(
    student_attention: ArrayLike, teacher_attention: ArrayLike, *, average_heads: bool = True
) -> jax.Array:
    """KL divergence of attention maps, from the teacher's to the student's.

        sum_k a_T,k (log a_T,k - log a_S,k)

    Keys to which the teacher gives nothing, such as masked ones, contribute nothing; a student
    probability under 1e-30 counts as 1e-30. No gradient flows into the teacher.

    Args:
      student_attention: `[..., Hs, Q, K]` probabilities over K keys.
      teacher_attention: `[..., Ht, Q, K]`.
      average_heads: whether maps are averaged over heads first; otherwise Hs = Ht, head by head.

    Returns:
      `[..., Q]`, or `[..., H, Q]` head by head; float32, nats.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: MiniLM, arXiv 2002.10957, head by head.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import attention_kl
      >>> student, teacher = np.full((1, 1, 2), 0.5), np.array([[[1.0, 0.0]]])
      >>> print(attention_kl(student, teacher).round(4))  # log 2
      [0.6931]
    """
    student, teacher = _attention_maps(student_attention, teacher_attention, average_heads)
    attended = teacher > 0
    log_p = jnp.where(attended, jnp.log(jnp.where(attended, teacher, 1.0)), -jnp.inf)
    log_q = jnp.log(jnp.maximum(jnp.where(attended, student, 1.0), 1e-30))
    return expectation(log_p, log_p - log_q)


def attention_mse(
    student_attention: ArrayLike, teacher_attention: ArrayLike, *, average_heads: bool = True
) -> jax.Array:
    """Squared distance of attention maps.

        sum_k (a_S,k - a_T,k)^2

    The sum over keys: the mean, which TinyBERT's authors' code takes, shrinks with the padding,
    where both are 0. No gradient flows into the teacher.

    Args:
      student_attention, teacher_attention: as for `attention_kl`; scores before the softmax, which
        TinyBERT compares, are as good if masked ones are 0 on both sides.
      average_heads: as for `attention_kl`.

    Returns:
      `[..., Q]`, or `[..., H, Q]` head by head; float32, in [0, 2] for probabilities.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: TinyBERT, arXiv 1909.10351, head by head.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import attention_mse
      >>> print(attention_mse(np.full((1, 1, 2), 0.5), np.array([[[1.0, 0.0]]])))
      [0.5]
    """
    student, teacher = _attention_maps(student_attention, teacher_attention, average_heads)
    return jnp.sum((student - teacher) ** 2, axis=-1)


def _attention_maps(
    student: ArrayLike, teacher: ArrayLike, average_heads: bool
) -> tuple[jax.Array, jax.Array]:
    """Maps of one shape, the teacher's constant."""
    student = as_features("student_attention", student, "[..., H, Q, K]")
    teacher = lax.stop_gradient(as_features("teacher_attention", teacher, "[..., H, Q, K]"))
    if average_heads:
        student, teacher = jnp.mean(student, axis=-3), jnp.mean(teacher, axis=-3)
    if student.shape != teacher.shape:
        averaged = " with heads averaged" if average_heads else ""
        raise ValueError(
            f"teacher_attention must have the shape of student_attention, {student.shape}"
            f"{averaged}, but its shape is {teacher.shape}"
        )
    return student, teacher


def self_attention_relation(
    student_vectors: ArrayLike,
    teacher_vectors: ArrayLike,
    segment_ids: ArrayLike | None = None,
    *,
    num_relation_heads: int,
    causal: bool = False,
) -> jax.Array:
    """MiniLMv2's relations: how each token's query (or key, or value) relates to the others'.

        mean_a sum_k R_T,ak (log R_T,ak - log R_S,ak),  R_a = softmax(x_a x_a^T / sqrt(D / A))

    x_a is the a-th of the A equal parts the vectors are cut in, so neither widths nor attention
    heads need to agree. The paper adds queries, keys and values, one call each, of one layer. No
    gradient flows into the teacher.

    Args:
      student_vectors: `[..., T, Ds]`, queries, keys or values with their heads concatenated.
      teacher_vectors: `[..., T, Dt]`.
      segment_ids: `[..., T]` integers, 0 for padding: tokens relate within their segment only.
        Default one segment.
      num_relation_heads: A, at least 1; a divisor of Ds and Dt.
      causal: whether tokens relate to themselves and earlier ones only.

    Returns:
      `[..., T]`, float32, nats; 0 at padding.

    Raises:
      ValueError: an argument of the wrong shape or type, or widths that A does not divide.

    Source: arXiv 2012.15828.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import self_attention_relation
      >>> student, teacher = np.eye(2), np.zeros((2, 4))
      >>> print(self_attention_relation(student, teacher, num_relation_heads=2).round(4))
      [0.0601 0.0601]
    """
    student, teacher = student_and_teacher_features(
        student_vectors, teacher_vectors, "[..., T, D]", "vectors"
    )
    related = jnp.ones((*student.shape[:-1], student.shape[-2]), bool)
    if segment_ids is not None:
        ids = checks.as_segments(segment_ids, student.shape[:-1])
        related = (ids[..., :, None] == ids[..., None, :]) & (ids[..., :, None] > 0)
    if causal:
        related &= jnp.broadcast_to(jnp.tri(student.shape[-2], dtype=bool), related.shape)
    log_q = _log_relations("student_vectors", student, num_relation_heads, related)
    log_p = _log_relations("teacher_vectors", teacher, num_relation_heads, related)
    return jnp.mean(expectation(log_p, log_p - log_q), axis=-2)


def _log_relations(name: str, vectors: jax.Array, heads: int, related: jax.Array) -> jax.Array:
    """log softmax of the scaled products of each head's parts, `[..., A, T, T]`."""
    if heads < 1 or vectors.shape[-1] % heads:
        raise ValueError(
            f"num_relation_heads must divide {vectors.shape[-1]}, the width of {name}, "
            f"but it is {heads}"
        )
    # Padding is cut before the products: what it holds may be NaN and gets no gradient.
    exists = jnp.any(related, axis=-1)[..., None]
    vectors = jnp.where(exists, vectors, 0.0)
    parts = vectors.reshape(*vectors.shape[:-1], heads, -1)
    scores = product("...qad,...kad->...aqk", parts, parts) / parts.shape[-1] ** 0.5
    seen = jnp.broadcast_to(related[..., None, :, :], scores.shape)
    # A padded token relates to nothing: its finite row gives log 1/T on both sides, divergence 0.
    empty = ~jnp.any(seen, axis=-1, keepdims=True)
    scores = jnp.where(seen, scores, jnp.where(empty, 0.0, -jnp.inf))
    return jax.nn.log_softmax(scores, axis=-1)
