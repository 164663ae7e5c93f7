"""The supervised fine-tuning objectives from hidden states, the logits of two models at most."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.kernels import arguments, linear_cross_entropy
from jaxdistill.kernels.over_tokens import over_labels
from jaxdistill.losses import checks, sft
from jaxdistill.losses.distribution import log_softmax
from jaxdistill.losses.from_hidden.cross_entropy import log_probs
from jaxdistill.losses.from_hidden.divergence import forward_kl
from jaxdistill.losses.from_hidden.preference import HeadOptions


def dft(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """Dynamic fine-tuning from hidden states; see `losses.dft`.

        -stop_gradient(p_label) log p_label

    Args:
      hidden: `[..., D]`.
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      vocab_size, soft_cap, head_layout, implementation: see
        `jaxdistill.kernels.linear_cross_entropy`.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.dft(hidden, head, np.array([0, 3])).round(4))  # log(4) / 4
      [0.3466 0.3466]
    """
    return sft.weighted_by_probability(log_probs(hidden, head, labels, **head_options))


def asft(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    reference_hidden: jax.typing.ArrayLike,
    reference_head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    kl_weight: jax.typing.ArrayLike = 0.05,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
) -> jax.Array:
    """Anchored supervised fine-tuning from hidden states; see `losses.asft`.

        -stop_gradient(p_label) log p_label + kl_weight KL(p_ref || p)

    No gradient flows into the reference. The head runs twice, once for each term.

    Args:
      hidden, reference_hidden: `[..., D]`, of the model and of its frozen start.
      head, reference_head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[...]` integers in [0, vocab_size), as for `from_hidden.dft`.
      kl_weight: scalar of at least 0.
      vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.dft`, of both models.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.asft(hidden, head, hidden, head, np.array([0, 3])).round(4))
      [0.3466 0.3466]
    """
    checks.check_between("kl_weight", kl_weight, 0.0, float("inf"))
    anchor = forward_kl(
        hidden,
        head,
        reference_hidden,
        reference_head,
        vocab_size=vocab_size,
        student_soft_cap=soft_cap,
        teacher_soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    imitation = dft(
        hidden,
        head,
        labels,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
    )
    return imitation + jnp.asarray(kl_weight, jnp.float32) * anchor


def one_token_rollout(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    key: jax.Array | None = None,
    num_samples: int = 256,
    temperature: jax.typing.ArrayLike = 1.3,
    wrong_reward: jax.typing.ArrayLike = -0.1,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """One-token rollout from hidden states; see `losses.one_token_rollout`.

        sampled: -(1/K) sum_j R(a_j) log p_{a_j},  a_1 .. a_K ~ p' independently
        exact:   -sum_a p'_a R(a) log p_a
        p = softmax(logits), p' = softmax(logits / temperature), R(label) = 1, else wrong_reward

    No gradient flows through p'. A key draws the same samples as in the logits form, a tile of
    tokens at a time. In the exact form the head runs twice, once at each temperature: no p'_a is
    needed on its own, because

        sum_a p'_a log p_a = log p_label - temperature (log p'_label + entropy of p')

    Args:
      hidden, head, labels: as for `from_hidden.dft`.
      key, num_samples, temperature, wrong_reward: see `losses.one_token_rollout`.
      vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.dft`; the sampled form
        has one implementation, "auto".

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.one_token_rollout(hidden, head, np.array([2])).round(4))
      [0.2426]
    """
    checks.check_between("num_samples", num_samples, 1, float("inf"))
    checks.check_between("wrong_reward", wrong_reward, float("-inf"), 1.0)
    if key is not None:
        uniform = jax.random.uniform(key, (*jnp.shape(labels), num_samples))

        def sampled(logits: jax.Array, labels: jax.Array, uniform: jax.Array) -> jax.Array:
            log_p, explored = (log_softmax("logits", logits, t, None) for t in (1.0, temperature))
            return sft.rollout_of(log_p, explored, labels, uniform, wrong_reward)

        records = {"labels": labels, "uniform": uniform}
        return over_labels(sampled, hidden, head, records, **head_options)
    log_prob = log_probs(hidden, head, labels, **head_options)
    explored = linear_cross_entropy(
        hidden, head, labels, temperature=temperature, with_entropy=True, **head_options
    )
    # Without a gradient of the entropy, that of the identity is p' - p in the logits: that of
    # sum_a p'_a log p_a where p' is a constant.
    still = lax.stop_gradient(explored.entropy)
    temperature = lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    of_all = log_prob - temperature * (explored.log_prob + still)
    of_label = lax.stop_gradient(jnp.exp(explored.log_prob)) * log_prob
    wrong = jnp.asarray(wrong_reward, jnp.float32)
    return -((1.0 - wrong) * of_label + wrong * of_all)


def unlikelihood(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    **head_options: Unpack[HeadOptions],
) -> jax.Array:
    """Unlikelihood of tokens from hidden states; see `losses.unlikelihood`.

        -log(1 - p_label)

    1 - p is summed over the other columns, which log p does not hold.

    Arguments, result and errors are those of `from_hidden.dft`; V is at least 2.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32)
      >>> print(from_hidden.unlikelihood(hidden, head, np.array([0, 3])).round(4))  # -log(3/4)
      [0.2877 0.2877]
    """
    given = jnp.asarray(hidden), jnp.asarray(head)
    layout, vocab_size = head_options.get("head_layout", "vd"), head_options.get("vocab_size")
    columns = arguments.check_head("", *given, layout, vocab_size)
    if columns < 2:
        raise ValueError(f"head must have at least 2 columns that count, but it has {columns}")
    arguments.check_labels("labels", labels, given[0].shape[:-1], columns)
    out = linear_cross_entropy(*given, jnp.expand_dims(labels, -1), with_rest=True, **head_options)
    assert out.rest is not None
    return sft.of_odds(out.log_prob[..., 0], out.rest)
