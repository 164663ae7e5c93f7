"""GGUF: every tensor type against dequantisers written from ggml's block layouts."""

import sys

import gguf as gguf_package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxdistill.convert import gguf, gguf_header
from jaxdistill.models.config import RopeScaling
from jaxdistill.models.rope import frequencies
from tests.convert import reference
from tests.convert.decoding import decoder_logits, held, traced_peak

# K-quants come in blocks of 256, so every matrix has a multiple of 256 columns.
SIZES = reference.Sizes(width=256, heads=8, kv_heads=2, head_dim=32, mlp=256, theta=500.0)
SMALL = reference.Sizes()
TOKENS = np.array([1, 5, 39, 0, 7, 7, 20, 3])
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name):
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def _half(blocks, start):
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(quants):
    return np.concatenate([quants & 15, quants >> 4], axis=1).astype(np.float32)


def _q8_0(blocks):
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks):
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks):
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q4_k(blocks):
    """Eight groups of 32, each with a 6-bit scale and minimum, two groups sharing 32 bytes."""
    packed, quants = blocks[:, 4:16].astype(np.int32), blocks[:, 16:]
    out = np.empty((len(blocks), 8, 32), np.float32)
    for group in range(8):
        if group < 4:
            scale, low = packed[:, group] & 63, packed[:, group + 4] & 63
        else:
            scale = (packed[:, group + 4] & 15) | (packed[:, group - 4] >> 6 << 4)
            low = (packed[:, group + 4] >> 4) | (packed[:, group] >> 6 << 4)
        shared = quants[:, group // 2 * 32 : group // 2 * 32 + 32]
        values = (shared >> 4 if group % 2 else shared & 15).astype(np.float32)
        steps = _half(blocks, 0) * scale[:, None].astype(np.float32)
        out[:, group] = steps * values - _half(blocks, 2) * low[:, None].astype(np.float32)
    return out.reshape(len(blocks), 256)


def _q6_k(blocks):
    """Two halves of 128: four low bits in `low`, two high bits in `high`, a scale for each 16."""
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    out = np.empty((len(blocks), 256), np.float32)
    for half in range(2):
        low = blocks[:, 64 * half : 64 * half + 64]
        high = blocks[:, 128 + 32 * half : 160 + 32 * half]
        for quarter in range(4):
            nibble = low[:, 32 * (quarter % 2) : 32 * (quarter % 2) + 32] >> (4 * (quarter // 2))
            quants = (nibble & 15) | ((high >> (2 * quarter) & 3) << 4)
            scale = np.repeat(scales[:, 8 * half + 2 * quarter :][:, :2], 16, axis=1)
            start = 128 * half + 32 * quarter
            out[:, start : start + 32] = scale * (quants.astype(np.float32) - 32)
    return _half(blocks, 208) * out


_DEQUANTISERS = {
    Kind.Q8_0: (_q8_0, 34),
    Kind.Q4_0: (_q4_0, 18),
    Kind.Q4_1: (_q4_1, 20),
    Kind.Q4_K: (_q4_k, 144),
    Kind.Q6_K: (_q6_k, 210),
}


def quantise(values, kind, generator):
    """(what is stored, what it stands for); K-quants get random blocks: no Python quantiser."""
    if values.ndim == 1 or kind == Kind.F32:
        return values, values, Kind.F32
    if kind == Kind.F16:
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32), kind
    dequantise, block_bytes = _DEQUANTISERS[kind]
    if kind in (Kind.Q4_K, Kind.Q6_K):
        rows = values.shape[0]
        stored = generator.integers(0, 256, (rows, values.shape[1] // 256 * block_bytes), np.uint8)
        halves = np.float16([2e-4, 1e-3] if kind == Kind.Q4_K else [4e-5]).view(np.uint8)
        start = 0 if kind == Kind.Q4_K else 208
        stored.reshape(-1, block_bytes)[:, start : start + len(halves)] = halves
    else:
        stored = gguf_package.quants.quantize(values, kind)
    return stored, dequantise(stored.reshape(-1, block_bytes)).reshape(values.shape), kind


def write(path, weights, sizes, kind=Kind.F32, *, architecture="llama", extra=None, drop=()):
    """Write a GGUF file and return the weights it stands for, by Hugging Face name."""
    generator = np.random.default_rng(7)
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(sizes.layers)
    writer.add_context_length(sizes.length)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.mlp)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.theta)
    writer.add_layer_norm_rms_eps(sizes.epsilon)
    if extra:
        extra(writer)
    meaning = {}
    for name, values in weights.items():
        if name in drop:
            continue
        stored, meaning[name], stored_kind = quantise(values, kind, generator)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, *_DEQUANTISERS], ids=lambda kind: kind.name)
def test_every_type_becomes_the_numbers_it_stands_for(tmp_path, kind):
    meaning = write(tmp_path / "model.gguf", reference.random_weights(SIZES), SIZES, kind)
    config, params = gguf.load(tmp_path / "model.gguf")
    layers = params["layers"]
    np.testing.assert_allclose(
        layers["mlp"]["down"]["kernel"][1], meaning["model.layers.1.mlp.down_proj.weight"].T,
        rtol=1e-6, atol=1e-7,
    )  # fmt: skip
    np.testing.assert_allclose(
        params["head"]["kernel"], meaning["lm_head.weight"], rtol=1e-6, atol=1e-7
    )
    expected = reference.logits(meaning, SIZES, TOKENS, interleaved=True)
    scale = np.abs(expected).max()
    found = decoder_logits(config, params, TOKENS)
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


@pytest.mark.parametrize(("tied", "biases"), [(True, True), (False, False)])
def test_head_and_biases_follow_the_tensors(tmp_path, tied, biases):
    sizes = reference.Sizes(tied=tied, biases=biases)
    weights = reference.random_weights(sizes)
    write(tmp_path / "model.gguf", weights, sizes)
    config, params = gguf.load(tmp_path / "model.gguf")
    assert config.tie_embeddings == tied
    assert config.attention_bias == config.attention_output_bias == config.mlp_bias == biases
    expected = reference.logits(weights, sizes, TOKENS, interleaved=True)
    np.testing.assert_allclose(decoder_logits(config, params, TOKENS), expected, atol=5e-5)


def test_configuration_is_read_as_it_was_meant(tmp_path):
    write(tmp_path / "model.gguf", reference.random_weights(SMALL), SMALL)
    config, params = gguf.load(tmp_path / "model.gguf", dtype="bfloat16")
    assert (config.head_dim, config.num_kv_heads, config.max_length) == (8, 2, 32)
    assert config.norm_epsilon == 1e-5  # single precision would be 9.99999974e-06
    assert config.rope_theta == 500.0
    assert config.rope_scaling is None
    assert params["embed"]["embedding"].dtype == config.param_dtype == "bfloat16"


def test_linear_and_yarn_scaling(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf_package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf_package.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(2048)

    weights = reference.random_weights(SMALL)
    for name, extra, expected in (
        ("linear", linear, RopeScaling("linear", 4.0)),
        ("yarn", yarn, RopeScaling("yarn", 8.0, original_max_length=2048)),
    ):
        write(tmp_path / name, weights, SMALL, extra=extra)
        assert gguf.load(tmp_path / name)[0].rope_scaling == expected


def _with_rope_factors(factors):
    weights = reference.random_weights(SMALL)
    return weights | {"rope_freqs.weight": np.asarray(factors, np.float32)}


def test_llama3_scaling_is_recognised_in_the_frequencies(tmp_path):
    scaling = RopeScaling("llama3", 32.0, original_max_length=8192)
    sizes = reference.Sizes(theta=500000.0)
    plain, _ = frequencies(sizes.head_dim, sizes.theta, length=1)
    stretched, _ = frequencies(sizes.head_dim, sizes.theta, scaling, length=1)
    write(tmp_path / "good", _with_rope_factors(plain / stretched), sizes)
    assert gguf.load(tmp_path / "good")[0].rope_scaling == scaling
    write(tmp_path / "odd", _with_rope_factors([1.0, 3.0, 5.0, 32.0]), sizes)
    with pytest.raises(ValueError, match="not those of Llama 3"):
        gguf.load(tmp_path / "odd")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_K], ids=lambda kind: kind.name)
def test_loading_holds_few_tensors_beside_the_result(tmp_path, kind):
    write(tmp_path / "model.gguf", reference.random_weights(reference.DEEP), reference.DEEP, kind)
    (_, params), peak = traced_peak(gguf.load, tmp_path / "model.gguf")
    assert peak < held(params) + 5 * reference.DEEP_TENSOR_BYTES


def _corrupt_architecture(path, weights):
    write(path, weights, SMALL, architecture="qwen3moe")


def _missing_tensor(path, weights):
    write(path, weights, SMALL, drop=("model.layers.1.mlp.up_proj.weight",))


def _unknown_tensor(path, weights):
    write(path, weights | {"model.layers.0.lora.weight": np.ones((4, 4), np.float32)}, SMALL)


def _misshapen_tensor(path, weights):
    wrong = weights["model.layers.0.self_attn.k_proj.weight"][:8]
    write(path, weights | {"model.layers.0.self_attn.k_proj.weight": wrong}, SMALL)


def _unread_type(path, weights):
    writer = gguf_package.GGUFWriter(path, "llama")
    stored = gguf_package.quants.quantize(np.ones((4, 32), np.float32), Kind.Q5_0)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=Kind.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _experts(path, weights):
    write(path, weights, SMALL, extra=lambda writer: writer.add_expert_count(8))


def _split_file(path, weights):
    write(path, weights, SMALL, extra=lambda writer: writer.add_uint32("split.count", 3))


def _longrope(path, weights):
    kind = gguf_package.RopeScalingType.LONGROPE
    write(path, weights, SMALL, extra=lambda writer: writer.add_rope_scaling_type(kind))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_corrupt_architecture, "architecture should be 'llama' but .* 'qwen3moe'"),
        (_missing_tensor, "1 of 21 tensors are missing, the first is 'blk.1.ffn_up.weight'"),
        (_unknown_tensor, "no place in a Llama-style decoder, the first is 'blk.0.lora.weight'"),
        (_misshapen_tensor, r"'blk.0.attn_k.weight' should have shape \[16, 24\] .* \[8, 24\]"),
        (_unread_type, "ggml type 6, which is not read here"),
        (_experts, "mixture of experts"),
        (_split_file, "one of 3 parts of a model"),
        (_longrope, "'longrope' with these settings is not supported"),
    ],
)
def test_unsuitable_files_are_refused(tmp_path, make, message):
    make(tmp_path / "model.gguf", reference.random_weights(SMALL))
    with pytest.raises(ValueError, match=message) as caught:
        gguf.load(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write(tmp_path / "whole.gguf", reference.random_weights(SMALL), SMALL)
    whole = (tmp_path / "whole.gguf").read_bytes()
    data_start = min(
        info.offset for info in gguf_header.read_header(tmp_path / "whole.gguf").tensors.values()
    )
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, data_start, 7), data_start, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|not a GGUF file|version") as caught:
            gguf.load(cut)
        assert str(cut) in str(caught.value)


def test_damaged_headers_never_raise_anything_but_a_sentence(tmp_path):
    write(tmp_path / "whole.gguf", reference.random_weights(SMALL), SMALL)
    whole = bytearray((tmp_path / "whole.gguf").read_bytes())
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    messages = []
    for _ in range(300):
        damaged = whole.copy()
        for place in generator.integers(4, 1500, 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            gguf.load(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not [message for message in messages if str(path) not in message]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file, say")
    with pytest.raises(ValueError, match="not a GGUF file: it should start with b'GGUF'"):
        gguf.load(path)
    path.write_bytes(b"GGUF\x01\0\0\0" + b"\0" * 64)
    with pytest.raises(ValueError, match="this file says version 1"):
        gguf.load(path)
    with pytest.raises(FileNotFoundError):
        gguf.load(tmp_path / "nothing.gguf")


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxdistill\[gguf\]'"):
        gguf.load(tmp_path / "model.gguf")
