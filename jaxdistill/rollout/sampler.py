"""Text from a decoder: one compiled prefill and one compiled while loop for each shape bucket."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models import decoder
from jaxdistill.models.config import DecoderConfig
from jaxdistill.models.decoder import Params
from jaxdistill.models.layers import Cache

FinishReason = Literal["stop", "length"]
SMALLEST_BUCKET = 16


class Generation(NamedTuple):
    """What `generate` returns, one entry a prompt.

    tokens: the new tokens, without the prompt, with the stop token if one came.
    finish_reasons: "stop" if the last token is a stop token, else "length".
    log_probs: of each new token under the model itself (temperature 1, nothing cut), in nats.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    log_probs: list[list[float]]


class Choice(NamedTuple):
    """How a token is chosen, as data: changing a value compiles nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    stop_tokens: jax.Array  # int [stop bucket], filled up with -1


class Loop(NamedTuple):
    """What the decode loop carries."""

    step: jax.Array  # number of tokens chosen so far
    last: jax.Array  # int [B], the newest of them
    stopped: jax.Array  # bool [B]
    tokens: jax.Array  # int [B, N]
    log_probs: jax.Array  # float32 [B, N]
    cache: Cache | None


def generate(
    params: Params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    key: jax.Array | int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
) -> Generation:
    """Continue each prompt; the answer to one does not depend on the others.

    p(v) is proportional to exp(logits[v] / temperature) over the top_k most likely tokens, and of
    those over the fewest that together reach top_p (tokens equally likely to the last one kept are
    kept too). Token n of row b is drawn with fold_in(fold_in(key, b), n). Prompts, batch, stop
    tokens and new tokens are padded to powers of two, so few shapes are ever compiled.

    Args:
        params, config: the decoder.
        prompts: lists of token ids, none empty.
        max_new_tokens: the most to add to a prompt; a row also ends when the context is full.
        key: a jax random key, or a seed for one; only temperature 0 goes without.
        temperature: 0 takes the most likely token.
        top_k, top_p: None cuts nothing.
        stop_tokens: any of these ends a row, and is kept in its tokens.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the context, an id outside the
            vocabulary, or a setting out of range.

    >>> config = DecoderConfig(vocab_size=8, width=4, num_layers=1, num_heads=1, num_kv_heads=1,
    ...                        head_dim=2, mlp_width=4, max_length=32)
    >>> params = decoder.init(config, jax.random.key(0))
    >>> answer = generate(params, config, [[1, 2], [3]], max_new_tokens=3, temperature=0)
    >>> [len(row) for row in answer.tokens]
    [3, 3]
    """
    _check_prompts(prompts, stop_tokens, config)
    _check_settings(max_new_tokens, key, temperature, top_k, top_p)
    if not prompts:
        return Generation([], [], [])
    tokens, lengths = _pad(prompts, config)
    limits = np.minimum(max_new_tokens, config.max_length - lengths)
    limits[len(prompts) :] = 0
    new_tokens, log_probs = _generate(
        params,
        tokens,
        lengths,
        limits,
        key if isinstance(key, jax.Array) else jax.random.key(0 if key is None else key),
        _choice(temperature, top_k, top_p, stop_tokens, config),
        config=config,
        new_bucket=_bucket(max_new_tokens, SMALLEST_BUCKET),
        greedy=temperature == 0,
        cut=top_k is not None or top_p is not None,
    )
    limits = limits[: len(prompts)]
    return _collect(np.asarray(new_tokens), np.asarray(log_probs), limits, set(stop_tokens))


@functools.partial(jax.jit, static_argnames=("config", "new_bucket", "greedy", "cut"))
def _generate(
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    key: jax.Array,
    choice: Choice,
    *,
    config: DecoderConfig,
    new_bucket: int,
    greedy: bool,
    cut: bool,
) -> tuple[jax.Array, jax.Array]:
    """Prefill and decode: tokens and log-probs [B, new_bucket]; row b is valid up to its end."""
    rows, prompt_bucket = prompts.shape
    slots = min(prompt_bucket + new_bucket, config.max_length)
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))

    def choose(loop: Loop, hidden: jax.Array) -> Loop:
        logits = decoder.logits(params, hidden, config)
        if greedy:
            return _record(loop, logits, jnp.argmax(logits, axis=-1).astype(jnp.int32), choice)
        return _record(loop, logits, _draw(_cut(logits, choice, cut), row_keys, loop.step), choice)

    def unfinished(loop: Loop) -> jax.Array:
        return jnp.any(~loop.stopped & (loop.step < limits))

    def advance(loop: Loop) -> Loop:
        # A row that has ended runs on in vain: in its own slots, or dropped past the last one.
        positions = (lengths + loop.step - 1)[:, None]
        output = decoder.apply(
            params, loop.last[:, None], config, positions=positions, cache=loop.cache
        )
        return choose(loop._replace(cache=output.cache), output.hidden[:, 0])

    output = decoder.apply(params, prompts, config, cache=decoder.init_cache(config, rows, slots))
    final_hidden = output.hidden[jnp.arange(rows), lengths - 1]
    first = choose(_start(rows, new_bucket, output.cache), final_hidden)
    end = jax.lax.while_loop(unfinished, advance, first)
    return end.tokens, end.log_probs


def _start(rows: int, new_bucket: int, cache: Cache | None) -> Loop:
    return Loop(
        step=jnp.int32(0),
        last=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
        tokens=jnp.zeros((rows, new_bucket), jnp.int32),
        log_probs=jnp.zeros((rows, new_bucket), jnp.float32),
        cache=cache,
    )


def _record(loop: Loop, logits: jax.Array, token: jax.Array, choice: Choice) -> Loop:
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
    return loop._replace(
        step=loop.step + 1,
        last=token,
        stopped=loop.stopped | jnp.isin(token, choice.stop_tokens),
        tokens=loop.tokens.at[:, loop.step].set(token),
        log_probs=loop.log_probs.at[:, loop.step].set(log_prob[:, 0]),
    )


def _draw(logits: jax.Array, row_keys: jax.Array, step: jax.Array) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _cut(logits: jax.Array, choice: Choice, cut: bool) -> jax.Array:
    """Logits over temperature, -inf where top-k and top-p cut."""
    scaled = logits / choice.temperature
    if not cut:
        return scaled
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    rank = jnp.arange(ordered.shape[-1])[None]
    ordered = jnp.where(rank < choice.top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token is kept whatever rounding does to the sums.
    kept = ((before < choice.top_p) & (ordered > -jnp.inf)) | (rank == 0)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)


def _collect(
    tokens: np.ndarray, log_probs: np.ndarray, limits: np.ndarray, stop_tokens: set[int]
) -> Generation:
    """Cut each row after its first stop token, or at its limit."""
    result = Generation([], [], [])
    for row, limit in enumerate(limits):
        ids = tokens[row, :limit].tolist()
        end = next((n for n, token in enumerate(ids, 1) if token in stop_tokens), None)
        result.tokens.append(ids[:end])
        result.finish_reasons.append("length" if end is None else "stop")
        result.log_probs.append(log_probs[row, :limit][:end].tolist())
    return result


def _pad(prompts: Sequence[Sequence[int]], config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the right, and their lengths; padding rows are one token long."""
    rows = _bucket(len(prompts), 1)
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((rows, min(_bucket(longest, SMALLEST_BUCKET), config.max_length)), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


def _choice(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_tokens: Sequence[int],
    config: DecoderConfig,
) -> Choice:
    """The settings as arrays; None becomes the value that cuts nothing."""
    stops = np.full(_bucket(len(stop_tokens), 8), -1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    return Choice(
        jnp.float32(temperature),
        jnp.int32(config.vocab_size if top_k is None else top_k),
        jnp.float32(1.0 if top_p is None else top_p),
        jnp.asarray(stops),
    )


def _bucket(size: int, smallest: int) -> int:
    """The next power of two."""
    return max(smallest, 1 << (size - 1).bit_length())


def _check_prompts(
    prompts: Sequence[Sequence[int]], stop_tokens: Sequence[int], config: DecoderConfig
) -> None:
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: give it at least one token, such as BOS")
        if len(prompt) >= config.max_length:
            raise ValueError(
                f"prompt {number} of {len(prompt)} tokens leaves no room for a new one in the "
                f"model's context of {config.max_length}: shorten it"
            )
        _check_ids(f"prompt {number}", prompt, config)
    _check_ids("stop_tokens", stop_tokens, config)


def _check_ids(name: str, ids: Sequence[int], config: DecoderConfig) -> None:
    for token in ids:
        if not 0 <= operator.index(token) < config.vocab_size:
            raise ValueError(
                f"{name} holds token {token}, but the vocabulary is 0 .. {config.vocab_size - 1}: "
                f"encode with the model's own tokenizer"
            )


def _check_settings(
    max_new_tokens: int,
    key: jax.Array | int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(
            "sampling needs a key: give a jax random key or a seed, another one each time, "
            "or temperature=0"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None to cut nothing, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, not {top_p}")
