"""Sparse distillation from hidden states: making the teacher's records, and learning from them.

Records are made with `top_k_teacher` or `sample_teacher` and kept; the student then meets them
without its logits in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.kernels import arguments
from jaxdistill.losses import checks, sampled_divergence, sparse_divergence
from jaxdistill.losses import first as calibrated
from jaxdistill.losses.distribution import log_softmax
from jaxdistill.losses.from_hidden.over_tokens import Model, over_tokens
from jaxdistill.losses.sampled_divergence import TeacherSamples
from jaxdistill.losses.sparse_divergence import TeacherTopK

ArrayLike = jax.typing.ArrayLike


class OneHead(TypedDict, total=False):
    """Options of the only head there is."""

    vocab_size: int | None
    soft_cap: float | None
    head_layout: str


def top_k_teacher(
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    k: int,
    *,
    temperature: ArrayLike = 1.0,
    **options: Unpack[OneHead],
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

    teacher = Model("teacher_", teacher_hidden, teacher_head, frozen=True)
    return _over_one(records, teacher, {}, **options)


def sample_teacher(
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    num_samples: int,
    key: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    proposal_power: ArrayLike = 1.0,
    **options: Unpack[OneHead],
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

    teacher = Model("teacher_", teacher_hidden, teacher_head, frozen=True)
    return _over_one(records, teacher, {"uniform": uniform}, **options)


def topk_forward_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    tail: str = "bucket",
    temperature: ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[OneHead],
) -> jax.Array:
    """Forward KL from the teacher's k largest probabilities; see `losses.topk_forward_kl`.

        sum_k p_k log(p_k / q_k) + what the tail adds        (* temperature^2)

    No gradient flows into the records or the temperature.

    Args:
      student_hidden: `[..., D]`.
      student_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      ids, teacher_log_probs: `[..., K]`, see `losses.topk_forward_kl`.
      tail, temperature, scale_by_temperature_squared: see `losses.topk_forward_kl`.
      vocab_size, soft_cap, head_layout: as for `from_hidden.top_k_teacher`.

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
    sparse_divergence.check_log_probs(ids, teacher_log_probs)

    def loss(logits: jax.Array, *records: jax.Array) -> jax.Array:
        return sparse_divergence.topk_forward_kl(
            logits,
            *records,
            tail=tail,
            temperature=temperature,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )

    student = Model("student_", student_hidden, student_head)
    records = {"ids": ids, "teacher_log_probs": teacher_log_probs}
    return _over_one(loss, student, records, **options)


def sampled_forward_kl(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    weights: ArrayLike | None = None,
    teacher_log_probs: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    scale_by_temperature_squared: bool = False,
    **options: Unpack[OneHead],
) -> jax.Array:
    """Forward KL from tokens drawn from the teacher; see `losses.sampled_forward_kl`.

        sum_i w_i (log P[id_i] - log Q[id_i])        (* temperature^2)

    No gradient flows into the records or the temperature.

    Args:
      student_hidden, student_head: as for `from_hidden.topk_forward_kl`.
      ids, weights, teacher_log_probs: `[..., N]`, see `losses.sampled_forward_kl`.
      temperature, scale_by_temperature_squared: see `losses.sampled_forward_kl`.
      vocab_size, soft_cap, head_layout: as for `from_hidden.top_k_teacher`.

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
    records = {"ids": ids, "weights": weights, "teacher_log_probs": teacher_log_probs}
    given = {name: array for name, array in records.items() if array is not None}

    def loss(logits: jax.Array, *arrays: jax.Array) -> jax.Array:
        records: dict[str, Any] = dict(zip(given, arrays, strict=True))
        return sampled_divergence.sampled_forward_kl(
            logits,
            **records,
            temperature=temperature,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )

    return _over_one(loss, Model("student_", student_hidden, student_head), given, **options)


def first(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    ids: ArrayLike,
    teacher_probabilities: ArrayLike,
    *,
    other_bucket: bool = False,
    **options: Unpack[OneHead],
) -> jax.Array:
    """FIRST's divergence from hidden states; see `losses.first`.

        sum_k p'_k log(p'_k / q'_k),  p' = p / sum_k p_k,  q' = softmax(logits[ids])

    No gradient flows into the records.

    Args:
      student_hidden, student_head: as for `from_hidden.topk_forward_kl`.
      ids, teacher_probabilities: `[..., K]`, see `losses.first`.
      other_bucket: see `losses.first`.
      vocab_size, soft_cap, head_layout: as for `from_hidden.top_k_teacher`.

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
    sparse_divergence.check_distinct(ids, np.ones(jnp.shape(ids), bool))

    def loss(logits: jax.Array, *records: jax.Array) -> jax.Array:
        return calibrated.first(logits, *records, other_bucket=other_bucket)

    student = Model("student_", student_hidden, student_head)
    records = {"ids": ids, "teacher_probabilities": teacher_probabilities}
    return _over_one(loss, student, records, **options)


def _over_one(
    function: Callable[..., Any],
    model: Model,
    records: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
) -> Any:
    """function(logits, *records) by tiles. Ids are checked here: within a tile no value is seen."""
    model = model._replace(vocab_size=vocab_size, soft_cap=soft_cap)
    hidden, head = jnp.asarray(model.hidden), jnp.asarray(model.head)
    columns = arguments.check_head(model.name, hidden, head, head_layout, vocab_size)
    if "ids" in records:
        sparse_divergence.check_ids(records["ids"], hidden.shape[:-1], columns)
        ids = jnp.asarray(records["ids"])
        for name, array in records.items():
            checks.check_same_shape(name, jnp.asarray(array), "ids", ids)
    return over_tokens(function, (model,), records, head_layout=head_layout)
