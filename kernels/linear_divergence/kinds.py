"""The divergences as sums over the vocabulary, for programs that see one tile of it at a time.

Each is sum_v f_v of a student's Q and a teacher's P. With slope_v = q_v df_v/dq_v the gradient in
the student's logits is

    slope_v - q_v sum_u slope_u

so beside the tile it takes one number a token, the sum of the slopes. A constant c added to every
df_v/dq_v adds c q_v to the slope and cancels, so it is left out.
"""

import jax
import jax.numpy as jnp
from jax import lax

KL = ("forward_kl", "reverse_kl", "symmetric_kl")
MIXTURES = (
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "skew_reverse_kl_fixed_mixture",
)
KINDS = (*KL, *MIXTURES, "total_variation")
# The kind that is the same number when student and teacher change places. A fixed mixture has no
# gradient in the teacher, so it has none.
SWAPPED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "symmetric_kl": "symmetric_kl",
    "jensen_shannon": "jensen_shannon",
    "skew_forward_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_forward_kl",
    "total_variation": "total_variation",
}


def terms(kind: str, log_q: jax.Array, log_p: jax.Array, share: jax.Array) -> jax.Array:
    """f_v of a divergence that is no plain KL, from log-probabilities of one shape.

    A skew KL has M - P (or M - Q) added, whose sum is 0. Every term is then of second order in the
    difference of P and Q, so the rounding of the log-sum-exps does not show in the value.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "total_variation":
        return 0.5 * jnp.abs(p - q)
    weight = teacher_share(kind, share)
    p_above, q_above = above_mixture(log_p - log_q, weight)
    if kind == "jensen_shannon":
        return share * p * p_above + (1 - share) * q * q_above
    if kind == "skew_forward_kl":
        return p * p_above + (1 - weight) * (q - p)
    if kind == "skew_reverse_kl_fixed_mixture":
        # The value of log Q - log M, and of its gradient the part through log Q.
        q_above = lax.stop_gradient(q_above) + (log_q - lax.stop_gradient(log_q))
    return q * q_above + weight * (p - q)


def slopes(kind: str, log_q: jax.Array, log_p: jax.Array, share: jax.Array) -> jax.Array:
    """slope_v of any divergence."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "total_variation":
        # Not jnp.sign: lowered for a TPU, it asks the local device which one it is.
        return jnp.where(q > p, 0.5 * q, jnp.where(q < p, -0.5 * q, 0.0))
    if kind in KL:
        forward, reverse = -p, q * (log_q - log_p)
        return {
            "forward_kl": forward,
            "reverse_kl": reverse,
            "symmetric_kl": 0.5 * (forward + reverse),
        }[kind]
    p_above, q_above = above_mixture(log_p - log_q, teacher_share(kind, share))
    if kind == "skew_forward_kl":
        return -(1 - share) * q * jnp.exp(p_above)
    if kind == "skew_reverse_kl":
        return q * (q_above - share * jnp.exp(q_above))
    return (1 - share) * q * q_above if kind == "jensen_shannon" else q * q_above


def teacher_share(kind: str, share: jax.Array) -> jax.Array:
    """The weight of P in the mixture M."""
    return 1 - share if kind.startswith("skew_reverse_kl") else share


def swapped(kind: str, share: jax.Array) -> tuple[str, jax.Array]:
    """The kind and share that give the same number when student and teacher change places."""
    return SWAPPED[kind], 1 - share if kind == "jensen_shannon" else share


def above_mixture(difference: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log P - log M and log Q - log M of M = weight P + (1 - weight) Q, given log P - log Q.

    From the difference alone: where P and Q are near, so are both results to 0, however small the
    probabilities.
    """
    of_teacher, of_student = jnp.log(weight), jnp.log1p(-weight)
    return (
        -jnp.logaddexp(of_teacher, of_student - difference),
        -jnp.logaddexp(of_student, of_teacher + difference),
    )
