"""The divergence head where the teacher is a record: its top k, and one outcome for all the rest.

    (log q_1 .. log q_K, log q_rest) of the student   against   (p_1 .. p_K, 1 - sum_k p_k)

The student's side is `linear_cross_entropy` with K labels a token; the rest is linear in K.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels.linear_cross_entropy.api import count_columns, of_any_labels
from jaxdistill.kernels.linear_divergence import kinds, records
from jaxdistill.kernels.linear_divergence.api import check_kind

TAILS = ("bucket", "ignore", "renormalise")
# log 2^-24. Float32 knows 1 - sum_k p_k no better; with 0 a student that leaves the rest anything
# would be infinitely far by the reverse KL.
LEAST_LOG_REST = -16.635532


def linear_divergence_top_k(
    student_hidden: jax.typing.ArrayLike,
    student_head: jax.typing.ArrayLike,
    ids: jax.typing.ArrayLike,
    teacher_log_probs: jax.typing.ArrayLike,
    *,
    kind: str = "forward_kl",
    share: jax.typing.ArrayLike | None = None,
    tail: str = "bucket",
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    axis_name: str | None = None,
    implementation: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> jax.Array:
    """Divergence of a student from the teacher's k largest probabilities, without logits in memory.

        "bucket":      the kind of (p_1 .. p_K, p_rest) and (q_1 .. q_K, q_rest)
        "ignore":      sum_k p_k log(p_k / q_k)
        "renormalise": sum_k p'_k log(p'_k / q_k),  p' = p / sum_k p_k
        p = exp(teacher_log_probs), q = softmax(student logits / temperature)[ids]
        p_rest = 1 - sum_k p_k, q_rest = sum of q over all other columns

    With "bucket" each kind is at most what `linear_divergence` gives for the whole vocabulary, and
    equals it for K = vocab_size. In all kinds but "forward_kl" p_rest is at least 2^-24. The other
    tails leave the rest of the student free; they have no kind but "forward_kl".

    No gradient flows into the teacher, the share or the temperature.

    Args:
      student_hidden: `[..., D]`, floating.
      student_head: `[V, D]` ("vd") or `[D, V]` ("dv"), floating.
      ids: `[..., K]` integers in [0, vocab_size), no used one twice at a position: outside jit
        others raise, inside jit they give NaN, which a mask removes.
      teacher_log_probs: `[..., K]` log-probabilities among the whole vocabulary, at the same
        temperature. -inf marks a place that is not used, whatever its id.
      kind, share: as of `linear_divergence`.
      tail: "bucket", "ignore" or "renormalise".
      temperature: scalar above 0, of the student's logits. The value is not multiplied by its
        square.
      vocab_size, soft_cap, head_layout, axis_name, implementation, chunk_tokens, chunk_vocab: as of
        `linear_cross_entropy`.

    Returns:
      `[...]`, float32, nats ("total_variation": no unit). Gradients come in the types of the
      student's arguments.

    Raises:
      ValueError: an argument of the wrong shape, type or range; log-probabilities that sum to more
        than 1, if they can be seen; a tail that the kind does not have.
      ImplementationError: a ValueError too, as of `linear_cross_entropy`.

    Source: the biases of the tails, arXiv 2503.16870.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import linear_divergence_top_k
      >>> hidden, head = np.ones((1, 2), np.float32), np.zeros((4, 2), np.float32)
      >>> ids, log_p = np.array([[2]]), np.log(np.array([[0.4]]))
      >>> print(linear_divergence_top_k(hidden, head, ids, log_p).round(4))
      [0.0541]
    """
    hidden, head = jnp.asarray(student_hidden), jnp.asarray(student_head)
    check_kind(kind, share)
    _check_tail(tail, kind)
    _, columns = count_columns("student_", hidden, head, head_layout, vocab_size, axis_name)
    records.check_ids(ids, hidden.shape[:-1], columns)
    if jnp.shape(teacher_log_probs) != jnp.shape(ids):
        raise ValueError(
            f"teacher_log_probs must have the shape of ids, {jnp.shape(ids)}, but its shape is "
            f"{jnp.shape(teacher_log_probs)}"
        )
    records.check_log_probs(ids, teacher_log_probs)
    ids = jnp.asarray(ids, jnp.int32)
    log_p = jnp.asarray(teacher_log_probs, jnp.float32)
    out = of_any_labels(
        hidden,
        head,
        jnp.where(log_p > -jnp.inf, ids, -1),  # a place that is not used names no column
        temperature=temperature,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        with_entropy=False,
        with_rest=tail == "bucket",
        head_layout=head_layout,
        axis_name=axis_name,
        implementation=implementation,
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
    return of_log_probs(out.log_prob, out.rest, ids, log_p, kind=kind, share=share, tail=tail)


def of_log_probs(
    log_q: jax.Array,
    log_q_rest: jax.Array | None,
    ids: jax.Array,
    log_p: jax.Array,
    *,
    kind: str,
    share: jax.typing.ArrayLike | None,
    tail: str,
) -> jax.Array:
    """The divergence `[...]` from log-probabilities at ids `[..., K]`; the rest only for "bucket".

    The student's are of any value in places that are not used, whose columns are in its rest, and
    NaN for an id out of range. The student's rest is -inf where no column is left.
    """
    log_p = lax.stop_gradient(log_p)
    used = counts = log_p > -jnp.inf
    unknown = used & jnp.isnan(log_q)
    log_mass = jax.nn.logsumexp(log_p, axis=-1)
    if tail == "renormalise":
        log_p = log_p - log_mass[..., None]
    if tail == "bucket":
        assert log_q_rest is not None
        # A mass that rounds to 1 or more leaves the teacher nothing else.
        log_p_rest = jnp.log(-jnp.expm1(jnp.minimum(log_mass, 0.0)))
        if kind != "forward_kl":
            log_p_rest = jnp.maximum(log_p_rest, LEAST_LOG_REST)
        left = log_q_rest != -jnp.inf
        unknown = _append(unknown, jnp.isnan(log_q_rest))
        log_q = _normalised(_append(log_q, log_q_rest), _append(used, left), unknown)
        log_p, counts = _append(log_p, log_p_rest), _append(used, left & (log_p_rest != -jnp.inf))
    log_q, log_p = jnp.where(counts, log_q, 0.0), jnp.where(counts, log_p, 0.0)
    values = jnp.sum(jnp.where(counts, _terms(kind, log_q, log_p, share), 0.0), axis=-1)
    bad = jnp.any(unknown, axis=-1) | records.stands_twice(ids, used)
    return jnp.where(bad, jnp.nan, values)


def _append(of_ids: jax.Array, of_rest: jax.Array) -> jax.Array:
    return jnp.concatenate([of_ids, of_rest[..., None]], axis=-1)


def _normalised(log_q: jax.Array, exists: jax.Array, unknown: jax.Array) -> jax.Array:
    """Outcomes whose probabilities sum to 1 again.

    The log-sum-exp of large logits is rounded to more than a small gradient; it cancels here, and
    the cotangents that leave sum to 0. Positions with a NaN become numbers: what leaves is finite.
    """
    known = ~jnp.any(unknown, axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(known, jnp.where(exists, log_q, -jnp.inf), 0.0))


def _terms(
    kind: str, log_q: jax.Array, log_p: jax.Array, share: jax.typing.ArrayLike | None
) -> jax.Array:
    """The terms of any kind, as `kinds.terms` has those of all but the KLs."""
    if kind not in kinds.KL:
        share = lax.stop_gradient(jnp.asarray(0.0 if share is None else share, jnp.float32))
        return kinds.terms(kind, log_q, log_p, share)
    forward = jnp.exp(log_p) * (log_p - log_q)
    reverse = jnp.exp(log_q) * (log_q - log_p)
    both = 0.5 * (forward + reverse)
    return {"forward_kl": forward, "reverse_kl": reverse, "symmetric_kl": both}[kind]


def _check_tail(tail: str, kind: str) -> None:
    """Raise ValueError unless the tail exists and the kind has it."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, but it is {tail!r}")
    if tail != "bucket" and kind != "forward_kl":
        raise ValueError(
            f"tail must be 'bucket' for kind {kind!r}, but it is {tail!r}: without the rest only "
            "'forward_kl' is defined"
        )
