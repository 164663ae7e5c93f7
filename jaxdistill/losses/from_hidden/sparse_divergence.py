"""Sparse distillation from hidden states: making the teacher's records, and learning from them.

Records are made with `top_k_teacher` or `sample_teacher`, a tile of tokens at a time, and kept; the
student then meets them through the head kernels.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.kernels import arguments, linear_cross_entropy, linear_divergence_top_k
from jaxdistill.kernels.linear_divergence.records import check_distinct, check_ids
from jaxdistill.kernels.over_tokens import Model, over_tokens
from jaxdistill.losses import checks, sampled_divergence, sparse_divergence
from jaxdistill.losses import first as calibrated
from jaxdistill.losses.distribution import log_softmax, times_temperature_squared
from jaxdistill.losses.from_hidden.preference import HeadOptions
from jaxdistill.losses.sampled_divergence import TeacherSamples
from jaxdistill.losses.sparse_divergence import TeacherTopK

ArrayLike = jax.typing.ArrayLike


class TeacherOptions(TypedDict, total=False):
    """Options of the teacher's head, whose logits are gone through by tiles of tokens."""

    vocab_size: int | None
    soft_cap: float | None
    head_layout: str


def top_k_teacher(
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    k: int,
    *,
    temperature: ArrayLike = 1.0,
    **options: Unpack[TeacherOptions],
) -> TeacherTopK:
    """The k most likely tokens of each position, from hidden states; see `losses.top_k_teacher`.

        (ids_k, log P[ids_k])

    Args:
      teacher_hidden: `[..., D]`.
      teacher_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      k, temperature: see `losses.top_k_teacher`.
      vocab_size: columns from here on are padding and do not exist; default all count.
      soft_cap: bounds the raw logits; default no bound.
      head_layout: which way round the head lies.

    Returns:
      TeacherTopK(ids, log_probs), each `[..., K]`, in nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 1), np.float32), np.log([[0.2], [0.5], [0.3]])
      >>> ids, log_probs = from_hidden.top_k_teacher(hidden, head.astype(np.float32), 2)
      >>> print(ids, np.exp(log_probs).round(4))
      [[1 2]] [[0.5 0.3]]
    """

    def records(logits: jax.Array) -> TeacherTopK:
        return sparse_divergence.top_k_teacher(logits, k, temperature=temperature)

    return _over_teacher(records, teacher_hidden, teacher_head, {}, **options)


def sample_teacher(
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    num_samples: int,
    key: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    proposal_power: ArrayLike = 1.0,
    **options: Unpack[TeacherOptions],
) -> TeacherSamples:
    """Random tokens of each position, from hidden states; see `losses.sample_teacher`.

        id_1 .. id_N ~ P' independently,  w_i = P[id_i] / (N P'[id_i])

    A key draws the same tokens as in the logits form.

    Args:
      teacher_hidden, teacher_head: as for `from_hidden.top_k_teacher`.
      num_samples, key, temperature, proposal_power: see `losses.sample_teacher`.
      vocab_size, soft_cap, head_layout: as for `from_hidden.top_k_teacher`.

    Returns:
      TeacherSamples(ids, weights, log_probs), each `[..., N]`.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 1), np.float32), np.array([[0.0], [-99.0]], np.float32)
      >>> print(from_hidden.sample_teacher(hidden, head, 4, jax.random.key(0)).ids)
      [[0 0 0 0]]
    """
    checks.check_between("num_samples", num_samples, 1, float("inf"))
    checks.check_positive("proposal_power", proposal_power)
    uniform = jax.random.uniform(key, (*jnp.shape(teacher_hidden)[:-1], num_samples))

    def records(logits: jax.Array, uniform: jax.Array) -> TeacherSamples:
        log_p = log_softmax("teacher_logits", logits, temperature, None)
        return sampled_divergence.records_at(uniform, log_p, proposal_power)

    drawn = {"uniform": uniform}
    return _over_teacher(records, teacher_hidden, teacher_head, drawn, **options)


def topk_forward_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    tail: str = "bucket",
    temperature: ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[HeadOptions],
) -> jax.Array:
    """Forward KL from the teacher's k largest probabilities; see `losses.topk_forward_kl`.

        sum_k p_k log(p_k / q_k) + what the tail adds        (* temperature^2)

    No gradient flows into the records or the temperature.

    Args:
      student_hidden: `[..., D]`.
      student_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      ids, teacher_log_probs: `[..., K]`, see `losses.topk_forward_kl`.
      tail, temperature, scale_by_temperature_squared: see `losses.topk_forward_kl`.
      vocab_size, soft_cap, head_layout, implementation: see
        `jaxdistill.kernels.linear_cross_entropy`.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2), np.float32), np.zeros((4, 2), np.float32)
      >>> ids, log_p = np.array([[2]]), np.log(np.array([[0.4]]))
      >>> print(from_hidden.topk_forward_kl(hidden, head, ids, log_p).round(4))
      [0.0541]
    """
    values = linear_divergence_top_k(
        student_hidden,
        student_head,
        ids,
        teacher_log_probs,
        tail=tail,
        temperature=temperature,
        **options,
    )
    return times_temperature_squared(values, temperature, scale_by_temperature_squared)


def sampled_forward_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    weights: ArrayLike | None = None,
    teacher_log_probs: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[HeadOptions],
) -> jax.Array:
    """Forward KL from tokens drawn from the teacher; see `losses.sampled_forward_kl`.

        sum_i w_i (log P[id_i] - log Q[id_i])        (* temperature^2)

    No gradient flows into the records or the temperature.

    Args:
      student_hidden, student_head: as for `from_hidden.topk_forward_kl`.
      ids, weights, teacher_log_probs: `[..., N]`, see `losses.sampled_forward_kl`.
      temperature, scale_by_temperature_squared: see `losses.sampled_forward_kl`.
      vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.topk_forward_kl`.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2), np.float32), np.zeros((4, 2), np.float32)
      >>> print(from_hidden.sampled_forward_kl(hidden, head, np.array([[0, 3, 3]])).round(4))
      [1.3863]
    """
    records = {"weights": weights, "teacher_log_probs": teacher_log_probs}
    log_q = _log_probs_at(student_hidden, student_head, ids, records, temperature, **options)
    loss = sampled_divergence.of_log_probs(log_q, weights, teacher_log_probs)
    return times_temperature_squared(loss, temperature, scale_by_temperature_squared)


def first(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    teacher_probabilities: ArrayLike,
    *,
    other_bucket: bool = False,
    **options: Unpack[HeadOptions],
) -> jax.Array:
    """FIRST's divergence from hidden states; see `losses.first`.

        sum_k p'_k log(p'_k / q'_k),  p' = p / sum_k p_k,  q' = softmax(logits[ids])

    No gradient flows into the records.

    Args:
      student_hidden, student_head: as for `from_hidden.topk_forward_kl`.
      ids, teacher_probabilities: `[..., K]`, see `losses.first`.
      other_bucket: see `losses.first`.
      vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.topk_forward_kl`.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2), np.float32), np.zeros((4, 2), np.float32)
      >>> ids, p = np.array([[2, 0]]), np.array([[0.6, 0.2]])
      >>> print(from_hidden.first(hidden, head, ids, p).round(4))
      [0.1308]
    """
    calibrated.check_probabilities("teacher_probabilities", teacher_probabilities)
    check_distinct(ids, np.ones(jnp.shape(ids), bool))
    p = jnp.asarray(teacher_probabilities, jnp.float32)
    if other_bucket:
        return topk_forward_kl(student_hidden, student_head, ids, jnp.log(p), **options)
    records = {"teacher_probabilities": p}
    log_q = _log_probs_at(student_hidden, student_head, ids, records, 1.0, **options)
    return calibrated.of_scores(log_q, jnp.asarray(ids), p)


def _log_probs_at(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    records: Mapping[str, ArrayLike | None],
    temperature: ArrayLike,
    **options: Unpack[HeadOptions],
) -> jax.Array:
    """Log-probabilities `[..., K]` of the ids, the shape of records beside them checked."""
    hidden, head = jnp.asarray(student_hidden), jnp.asarray(student_head)
    layout, vocab_size = options.get("head_layout", "vd"), options.get("vocab_size")
    columns = arguments.check_head("student_", hidden, head, layout, vocab_size)
    check_ids(ids, hidden.shape[:-1], columns)
    for name, array in records.items():
        if array is not None:
            checks.check_same_shape(name, jnp.asarray(array), "ids", jnp.asarray(ids))
    return linear_cross_entropy(hidden, head, ids, temperature=temperature, **options).log_prob


def _over_teacher(
    function: Callable[..., Any],
    hidden: ArrayLike,
    head: ArrayLike,
    records: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
) -> Any:
    """function(teacher logits, *records) by tiles; the teacher is a constant."""
    teacher = Model("teacher_", hidden, head, vocab_size, soft_cap, frozen=True)
    return over_tokens(function, (teacher,), records, head_layout=head_layout)
