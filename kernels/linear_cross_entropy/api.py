"""The linear cross-entropy head: hidden states and a head in, log-probabilities of labels out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import arguments, dispatch
from jaxdistill.kernels.linear_cross_entropy import reference, xla

IMPLEMENTATIONS = {"xla": xla.linear_cross_entropy, "reference": reference.linear_cross_entropy}


class LinearCrossEntropy(NamedTuple):
    """Per token, float32, in nats."""

    log_prob: jax.Array
    log_sum_exp: jax.Array
    entropy: jax.Array | None


def linear_cross_entropy(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    with_entropy: bool = False,
    head_layout: str = "vd",
    implementation: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> LinearCrossEntropy:
    """Log-probability of each label under softmax(logits), without the logits in memory.

        x = soft_cap * tanh(hidden @ head.T / soft_cap) / temperature
        log_sum_exp = log sum_v exp(x_v);  log_prob = x_label - log_sum_exp
        entropy = log_sum_exp - sum_v softmax(x)_v x_v

    Args:
      hidden: `[..., D]`, floating; states after the final norm.
      head: `[V, D]` ("vd") or `[D, V]` ("dv"), floating.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit its log_prob is NaN.
      temperature: scalar above 0; no gradient flows into it.
      vocab_size: columns from here on are padding and do not exist; default all count.
      soft_cap: bounds the raw logits; default no bound.
      with_entropy: whether to return the entropy, which costs one more sum.
      head_layout: which way round the head lies.
      implementation: "auto", "xla" (lean) or "reference" (full logits). A name that cannot serve
        raises; "auto" logs what it chose at level INFO, once.
      chunk_tokens, chunk_vocab: size of the tile of logits that exists at a time ("xla" only);
        default about 64 MiB in float32.

    Returns:
      LinearCrossEntropy: `[...]` each, float32, nats; entropy is None unless asked for. Sums run
      in float32, gradients come in the types of `hidden` and `head`.

    Raises:
      ValueError: an argument of the wrong shape, type or range, or an unknown implementation.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.kernels import linear_cross_entropy
      >>> hidden, head = np.ones((3, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> out = linear_cross_entropy(hidden, head, np.array([0, 1, 7]))
      >>> print(out.log_prob.round(4))  # log(1/8)
      [-2.0794 -2.0794 -2.0794]
    """
    hidden, head = jnp.asarray(hidden), jnp.asarray(head)
    vocab_size = arguments.check_head("", hidden, head, head_layout, vocab_size)
    arguments.check_labels("labels", labels, hidden.shape[:-1], vocab_size)
    arguments.check_positive("temperature", temperature)
    if soft_cap is not None:
        arguments.check_positive("soft_cap", soft_cap)
    arguments.check_chunk("chunk_tokens", chunk_tokens)
    arguments.check_chunk("chunk_vocab", chunk_vocab)
    function = dispatch.choose("linear_cross_entropy", implementation, IMPLEMENTATIONS)
    log_prob, log_sum_exp, entropy = function(
        hidden,
        head,
        jnp.asarray(labels, jnp.int32),
        lax.stop_gradient(jnp.asarray(temperature, jnp.float32)),
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        with_entropy=with_entropy,
        vocab_axis=arguments.VOCABULARY_AXIS[head_layout],
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
    return LinearCrossEntropy(log_prob, log_sum_exp, entropy)
