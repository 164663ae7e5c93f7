"""Features of a student made like those of a teacher, position by position.

Values are per position: pad and reduce them as losses of tokens. The teacher is a constant. Where
the widths differ, a projection of the student's features is trained along with the student.
"""

import jax
import jax.numpy as jnp

from jaxdistill.losses import checks
from jaxdistill.losses.feature_arguments import ArrayLike, as_features, magnitude, product, unit


def hidden_mse(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    projection: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> jax.Array:
    """Mean squared error of hidden states.

        mean_d (W h_S + b - h_T)_d^2

    No gradient flows into the teacher. Layer norm does not fix the scale of a residual stream:
    where that differs between the models, `hidden_cosine` asks for less. Tunix averages it over the
    padding too.

    Args:
      student_hidden: `[..., Ds]`.
      teacher_hidden: `[..., Dt]`, same leading shape.
      projection: `[Ds, Dt]`, W transposed, trained; default none, where Ds = Dt.
      bias: `[Dt]`, trained; default none.

    Returns:
      `[...]`, float32, the square of the features' unit.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import hidden_mse
      >>> print(hidden_mse(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]])))
      [2.5]
      >>> print(hidden_mse(np.array([[1.0, 2.0]]), np.array([[3.0]]), np.array([[1.0], [1.0]])))
      [0.]
    """
    student, teacher = _aligned(student_hidden, teacher_hidden, projection, bias)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def hidden_cosine(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    projection: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> jax.Array:
    """Cosine distance of hidden states: their direction, whatever their scale.

        1 - cos(W h_S + b, h_T)

    No gradient flows into the teacher. A vector of zeros has the distance 1 and gets no gradient;
    in optax's cosine_distance it is NaN, in torch's cosine_embedding_loss the gradient is 1e6.

    Args:
      student_hidden, teacher_hidden, projection, bias: as for `hidden_mse`.

    Returns:
      `[...]`, float32, in [0, 2].

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: DistilBERT, arXiv 1910.01108.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import hidden_cosine
      >>> student, teacher = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0]] * 2)
      >>> print(hidden_cosine(student, teacher).round(4))
      [0.     0.2929]
    """
    student, teacher = _aligned(student_hidden, teacher_hidden, projection, bias)
    return 1.0 - jnp.sum(unit(student) * unit(teacher), axis=-1)


def dmae_alignment(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    projection: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    normalize: bool = True,
) -> jax.Array:
    """DMAE's alignment: the mean absolute difference of a middle block's normalised features.

        mean_d |n(W h_S + b) - n(h_T)|_d,  n(h) = h / ||h||

    The authors' code adds it to `masked_reconstruction`, both with weight 1. Both encoders see the
    same visible patches, and the class token counts as one of them. As features have norm 1, the
    value is of the order of 1 / sqrt(Dt). No gradient flows into the teacher.

    Args:
      student_hidden, teacher_hidden, projection, bias: as for `hidden_mse`.
      normalize: whether to divide by the norms, as the authors' code does; that the paper's
        equation does too could not be confirmed.

    Returns:
      `[...]`, float32.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: DMAE, arXiv 2208.12256.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import dmae_alignment
      >>> print(dmae_alignment(np.array([[2.0, 0.0]]), np.array([[0.0, 5.0]])))
      [1.]
    """
    student, teacher = _aligned(student_hidden, teacher_hidden, projection, bias)
    if normalize:
        student, teacher = unit(student), unit(teacher)
    return jnp.mean(magnitude(student - teacher), axis=-1)


def masked_reconstruction(
    prediction: ArrayLike, patches: ArrayLike, *, normalize_patches: bool = False
) -> jax.Array:
    """Squared error of reconstructed patches, as masked autoencoders are trained with.

        mean_p (prediction - patches)_p^2,
        patches less their mean, over sqrt(their variance + 1e-6), if normalize_patches

    The objective is `token_mean(values, removed)`, the mean over removed patches; predictions of
    visible ones then receive no gradient. No gradient flows into the patches. In the transformers
    library's ViTMAE a batch without a removed patch gives NaN.

    Args:
      prediction: `[..., P]`, one row a patch.
      patches: `[..., P]`, the pixels of each patch; P at least 2 if normalised.
      normalize_patches: whether each patch is standardised by itself (the variance has P - 1 in
        its denominator, as in MAE's code); MAE's better results do, DMAE's script does not.

    Returns:
      `[...]`, float32, the square of the pixels' unit.

    Raises:
      ValueError: an argument of the wrong shape or type.

    Source: MAE, arXiv 2111.06377; DMAE, arXiv 2208.12256.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import masked_reconstruction, token_mean
      >>> values = masked_reconstruction(np.ones((2, 4)), np.array([[1.0] * 4, [3.0] * 4]))
      >>> print(values, token_mean(values, np.array([0, 1])).mean())
      [0. 4.] 4.0
    """
    prediction = as_features("prediction", prediction, "[..., P]")
    patches = jax.lax.stop_gradient(as_features("patches", patches, "[..., P]"))
    checks.check_same_shape("patches", patches, "prediction", prediction)
    if normalize_patches:
        if patches.shape[-1] < 2:
            raise ValueError(
                f"patches must have 2 values or more to be normalised, but they have "
                f"{patches.shape[-1]}"
            )
        mean = jnp.mean(patches, axis=-1, keepdims=True)
        variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
        patches = (patches - mean) / jnp.sqrt(variance + 1e-6)
    return jnp.mean((prediction - patches) ** 2, axis=-1)


def _aligned(
    student: ArrayLike, teacher: ArrayLike, projection: ArrayLike | None, bias: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """The projected student and the constant teacher, of one shape."""
    student = as_features("student_hidden", student)
    teacher = jax.lax.stop_gradient(as_features("teacher_hidden", teacher))
    width = teacher.shape[-1]
    if projection is not None:
        projection = as_features("projection", projection, "[Ds, Dt]")
        if projection.shape != (student.shape[-1], width):
            raise ValueError(
                f"projection must have shape {(student.shape[-1], width)}, the widths of "
                f"student_hidden and teacher_hidden, but its shape is {projection.shape}"
            )
        student = product("...s,st->...t", student, projection)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_hidden must have the shape of student_hidden, {student.shape}, but its shape "
            f"is {teacher.shape}; where only the widths differ, give a projection"
        )
    if bias is not None:
        bias = as_features("bias", bias, "[Dt]")
        if bias.shape != (width,):
            raise ValueError(f"bias must have shape {(width,)}, but its shape is {bias.shape}")
        student += jnp.broadcast_to(bias, student.shape)
    return student, teacher
