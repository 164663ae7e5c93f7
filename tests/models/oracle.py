"""The decoder again, from its formulas: float64 numpy, one head, one query at a time."""

import math

import numpy as np

from jaxdistill.models import DecoderConfig, RopeScaling


def forward(params, tokens, config: DecoderConfig, positions=None, segment_ids=None):
    """(hidden after the final norm [B, T, D], taps [L+1, B, T, D], logits [B, T, vocab_size])."""
    tokens = np.asarray(tokens)
    if positions is None:
        positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    rows = [
        _row(params, *row, config)
        for row in zip(tokens, np.asarray(positions), np.asarray(segment_ids), strict=True)
    ]
    hidden, taps, logits = (list(parts) for parts in zip(*rows, strict=True))
    return np.stack(hidden), np.stack(taps, axis=1), np.stack(logits)


def _row(params, tokens, positions, segment_ids, config):
    embedding = _exact(params["embed"]["embedding"])
    x = embedding[tokens]
    taps = [x]
    for number in range(config.num_layers):
        layer = _tree(params["layers"], lambda leaf, number=number: _exact(leaf)[number])
        normed = _rms(x, layer["attention_norm"]["scale"], config)
        x = x + _attend(normed, layer["attention"], positions, segment_ids, config)
        x = x + _swiglu(_rms(x, layer["mlp_norm"]["scale"], config), layer["mlp"])
        taps.append(x)
    hidden = _rms(x, _exact(params["final_norm"]["scale"]), config)
    matrix = embedding if config.tie_embeddings else _exact(params["head"]["kernel"])
    logits = _cap(hidden @ matrix.T, config.logit_soft_cap)
    return hidden, np.stack(taps), logits[:, : config.vocab_size]


def _attend(x, part, positions, segment_ids, config):
    query, key, value = (_project(x, part[name], "td,dhk->thk") for name in _QKV)
    if config.query_key_norm:
        query = _rms(query, part["query_norm"]["scale"], config)
        key = _rms(key, part["key_norm"]["scale"], config)
    query, key = (_rotate(array, positions, config) for array in (query, key))
    mixed = np.zeros_like(query)
    for head in range(config.num_heads):
        group = head * config.num_kv_heads // config.num_heads
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if segment_ids[s] == segment_ids[t]]
            if config.sliding_window is not None:
                seen = [s for s in seen if s > t - config.sliding_window]
            scores = np.array([query[t, head] @ key[s, group] for s in seen])
            scores = _cap(scores / math.sqrt(config.head_dim), config.attention_soft_cap)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed[t, head] = sum(w * value[s, group] for w, s in zip(weights, seen, strict=True))
    return _project(mixed, part["output"], "thk,hkd->td")


_QKV = ("query", "key", "value")


def _swiglu(x, part):
    gate = _project(x, part["gate"], "td,df->tf")
    return _project(
        gate / (1 + np.exp(-gate)) * _project(x, part["up"], "td,df->tf"),
        part["down"],
        "tf,fd->td",
    )


def _project(x, part, equation):
    return np.einsum(equation, x, part["kernel"]) + part.get("bias", 0.0)


def _rms(x, scale, config):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale


def _cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _rotate(x, positions, config):
    """Each pair (i, i + K/2) is a complex number, turned by its angle."""
    rates, factor = rope_rates(
        config.head_dim, config.rope_theta, config.rope_scaling, len(positions)
    )
    half = config.head_dim // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * factor
    turned = turned * np.exp(1j * np.outer(positions, rates))[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rope_rates(dim: int, theta: float, scaling: RopeScaling | None, length: int):
    """Rate by rate, as the papers and the published configurations define them."""
    if scaling is not None and scaling.kind == "dynamic" and length > scaling.original_max_length:
        stretch = scaling.factor * length / scaling.original_max_length - (scaling.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    rates = [1.0 / theta ** (2 * i / dim) for i in range(dim // 2)]
    if scaling is None or scaling.kind == "dynamic":
        return np.array(rates), 1.0
    if scaling.kind == "linear":
        return np.array([rate / scaling.factor for rate in rates]), 1.0
    if scaling.kind == "llama3":
        return np.array([_llama3(rate, scaling) for rate in rates]), 1.0
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return np.array([_yarn(i, dim, theta, scaling) for i in range(dim // 2)]), factor


def _llama3(rate, scaling):
    wavelength = 2 * math.pi / rate
    if wavelength < scaling.original_max_length / scaling.high_frequency_factor:
        return rate
    if wavelength > scaling.original_max_length / scaling.low_frequency_factor:
        return rate / scaling.factor
    smooth = (scaling.original_max_length / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * rate / scaling.factor + smooth * rate


def _yarn(i, dim, theta, scaling):
    def correction(rotations):
        turns = scaling.original_max_length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), dim - 1)
    ramp = min(max((i - low) / (high - low), 0.0), 1.0)
    extrapolation = 1.0 / theta ** (2 * i / dim)
    interpolation = 1.0 / (scaling.factor * theta ** (2 * i / dim))
    return interpolation * ramp + extrapolation * (1 - ramp)


def _exact(array):
    return np.asarray(array, np.float64)


def _tree(node, function):
    if isinstance(node, dict):
        return {name: _tree(child, function) for name, child in node.items()}
    return function(node)
