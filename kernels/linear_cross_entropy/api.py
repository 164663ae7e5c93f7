"""The linear cross-entropy head: hidden states and a head in, log-probabilities of labels out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments, blocks, dispatch, on_tpu
from jaxdistill.kernels.linear_cross_entropy import pallas_tpu, reference, sharded, xla

IMPLEMENTATIONS = {
    "pallas": pallas_tpu.linear_cross_entropy,
    "xla": xla.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}


class LinearCrossEntropy(NamedTuple):
    """Per token, float32, in nats; `log_prob` per label."""

    log_prob: jax.Array
    log_sum_exp: jax.Array
    entropy: jax.Array | None
    rest: jax.Array | None


def linear_cross_entropy(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    with_entropy: bool = False,
    with_rest: bool = False,
    head_layout: str = "vd",
    axis_name: str | None = None,
    implementation: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> LinearCrossEntropy:
    """Log-probability of a label or several under softmax(logits), without the logits in memory.

        x = soft_cap * tanh(hidden @ head.T / soft_cap) / temperature
        log_sum_exp = log sum_v exp(x_v);  log_prob = x_label - log_sum_exp
        entropy = log_sum_exp - sum_v softmax(x)_v x_v
        rest = log sum_{v no label} exp(x_v) - log_sum_exp

    Args:
      hidden: `[..., D]`, floating; states after the final norm.
      head: `[V, D]` ("vd") or `[D, V]` ("dv"), floating.
      labels: `[...]`, or `[..., K]` for K labels a token, integers in [0, vocab_size): outside jit
        a label out of range raises, inside jit its log_prob is NaN and it is none of the columns.
      temperature: scalar above 0; no gradient flows into it.
      vocab_size: columns from here on are padding and do not exist; default all count.
      soft_cap: bounds the raw logits; default no bound.
      with_entropy: whether to return the entropy, which costs one more sum.
      with_rest: whether to return, of labels `[..., K]`, the log-probability of all columns that
        are not among them: summed over those, not subtracted from 1, so it holds where the labels'
        mass rounds to 1; -inf where no column is left. A label that stands twice counts once.
      head_layout: which way round the head lies.
      axis_name: inside shard_map, the mesh axis over which the head's vocabulary is split: V is
        then what one device has, vocab_size and labels count over all of them, and hidden,
        labels and the returned values are the same on every device of this axis.
      implementation: "auto", "pallas" (a TPU kernel), "xla" (lean) or "reference" (full logits). A
        name that cannot serve raises; "auto" logs what it chose at level INFO, once. It takes
        "pallas" where the default backend is a TPU, in a process of one device or inside
        shard_map (a jit over several devices cannot split a kernel), and the arguments allow it.
      chunk_tokens, chunk_vocab: size of the tile of logits that exists at a time; default about 64
        MiB in float32 ("xla"), or what fits VMEM ("pallas": multiples of 16 and 128).

    Returns:
      LinearCrossEntropy: log_prob in the shape of labels, the others `[...]`, float32, nats;
      entropy and rest are None unless asked for. Sums run in float32, gradients come in the types
      of `hidden` and `head`.

    Raises:
      ValueError: an argument of the wrong shape, type or range.
      ImplementationError: a ValueError too: an unknown implementation, or one that cannot serve:
        "pallas" in a program lowered for anything but a TPU, or for types, chunks or widths it
        does not take.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import linear_cross_entropy
      >>> hidden, head = np.ones((3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> out = linear_cross_entropy(hidden, head, np.array([0, 1, 7]))
      >>> print(out.log_prob.round(4))  # log(1/8)
      [-2.0794 -2.0794 -2.0794]
      >>> out = linear_cross_entropy(hidden, head, np.array([[0, 1]] * 3), with_rest=True)
      >>> print(out.log_prob.shape, out.rest.round(4))  # log(6/8)
      (3, 2) [-0.2877 -0.2877 -0.2877]
    """
    hidden, head = jnp.asarray(hidden), jnp.asarray(head)
    _, columns = count_columns("", hidden, head, head_layout, vocab_size, axis_name)
    check_labels(labels, hidden, columns, with_rest)
    return of_any_labels(
        hidden,
        head,
        jnp.asarray(labels, jnp.int32),
        temperature=temperature,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        with_entropy=with_entropy,
        with_rest=with_rest,
        head_layout=head_layout,
        axis_name=axis_name,
        implementation=implementation,
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )


def of_any_labels(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    *,
    temperature: jax.typing.ArrayLike,
    vocab_size: int | None,
    soft_cap: float | None,
    with_entropy: bool,
    with_rest: bool,
    head_layout: str,
    axis_name: str | None,
    implementation: str,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
) -> LinearCrossEntropy:
    """`linear_cross_entropy` whose labels may be out of range outside jit too: -1 for none."""
    columns, vocab_size = count_columns("", hidden, head, head_layout, vocab_size, axis_name)
    arguments.check_positive("temperature", temperature)
    if soft_cap is not None:
        arguments.check_positive("soft_cap", soft_cap)
    arguments.check_chunk("chunk_tokens", chunk_tokens)
    arguments.check_chunk("chunk_vocab", chunk_vocab)
    several = labels if labels.ndim == hidden.ndim else labels[..., None]
    chunks = chunk_tokens, chunk_vocab
    available = on_tpu.best_first(
        IMPLEMENTATIONS,
        lambda: blocks.check(
            "linear_cross_entropy", [(hidden, head)], columns, chunks, several.shape[-1]
        ),
    )
    function = functools.partial(
        dispatch.choose("linear_cross_entropy", implementation, available),
        hidden,
        head,
        temperature=lax.stop_gradient(jnp.asarray(temperature, jnp.float32)),
        vocab_size=columns,
        soft_cap=soft_cap,
        with_entropy=with_entropy,
        vocab_axis=arguments.VOCABULARY_AXIS[head_layout],
        with_rest=with_rest,
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
    if axis_name is not None:
        function = functools.partial(
            sharded.linear_cross_entropy,
            function,
            axis_name=axis_name,
            columns=columns,
            vocab_size=vocab_size,
        )
    log_prob, log_sum_exp, entropy, rest = function(several)
    if rest is not None:
        rest = jnp.where(rest != -jnp.inf, rest - log_sum_exp, -jnp.inf)
    return LinearCrossEntropy(log_prob.reshape(labels.shape), log_sum_exp, entropy, rest)


def check_labels(
    labels: jax.typing.ArrayLike, hidden: jax.Array, vocab_size: int, with_rest: bool
) -> None:
    """Raise ValueError unless labels are `[...]` or, for a rest, `[..., K]`, in the vocabulary."""
    leading = hidden.shape[:-1]
    several = jnp.ndim(labels) == hidden.ndim
    if with_rest and not several:
        raise ValueError(
            f"labels must have shape {leading} and one more dimension for with_rest, but the shape "
            f"is {jnp.shape(labels)}"
        )
    if several and jnp.shape(labels)[-1] < 1:
        raise ValueError(f"labels must have K at least 1, but the shape is {jnp.shape(labels)}")
    shape = (*leading, jnp.shape(labels)[-1]) if several else leading
    arguments.check_labels("labels", labels, shape, vocab_size)


def count_columns(
    name: str,
    hidden: jax.Array,
    head: jax.Array,
    head_layout: str,
    vocab_size: int | None,
    axis_name: str | None,
) -> tuple[int, int]:
    """Columns of `head` that may count, and how many count on all devices together."""
    if axis_name is None:
        vocab_size = arguments.check_head(name, hidden, head, head_layout, vocab_size)
        return vocab_size, vocab_size
    columns = arguments.check_head(name, hidden, head, head_layout, None)
    sharded.check_axis(axis_name, head)
    return columns, sharded.count_columns(columns, f"{name}head", axis_name, vocab_size)
