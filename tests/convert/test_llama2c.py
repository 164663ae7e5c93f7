"""llama2.c checkpoints: written here from the format, run by an independent interleaved model."""

import dataclasses
import struct
import tarfile

import ml_dtypes
import numpy as np
import pytest

from jaxdistill.convert import llama2c
from tests.convert import reference
from tests.convert.decoding import decoder_logits, held, traced_peak

SIZES = reference.Sizes(width=24, heads=6, kv_heads=2, head_dim=4, theta=10000.0)
TOKENS = np.array([1, 5, 39, 0, 7, 7, 20, 3])
_LAYER_ORDER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def checkpoint_bytes(weights, sizes):
    vocabulary = sizes.vocabulary if sizes.tied else -sizes.vocabulary
    header = (
        sizes.width,
        sizes.mlp,
        sizes.layers,
        sizes.heads,
        sizes.kv_heads,
        vocabulary,
        sizes.length,
    )
    parts = [weights["model.embed_tokens.weight"]]
    for name in _LAYER_ORDER:
        parts += [weights[f"model.layers.{i}.{name}.weight"] for i in range(sizes.layers)]
    parts += [weights["model.norm.weight"], np.zeros(sizes.length * sizes.head_dim, np.float32)]
    if not sizes.tied:
        parts.append(weights["lm_head.weight"])
    return struct.pack("<7i", *header) + b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_an_interleaved_reference(tmp_path, tied):
    sizes = dataclasses.replace(SIZES, tied=tied)
    weights = reference.random_weights(sizes)
    path = tmp_path / "model.bin"
    path.write_bytes(checkpoint_bytes(weights, sizes))
    config, params = llama2c.load(path)
    expected = reference.logits(weights, sizes, TOKENS, interleaved=True)
    np.testing.assert_allclose(decoder_logits(config, params, TOKENS), expected, atol=2e-5)
    assert config.tie_embeddings == tied
    assert ("head" in params) != tied


def test_loading_holds_few_tensors_beside_the_result(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(checkpoint_bytes(reference.random_weights(reference.DEEP), reference.DEEP))
    (_, params), peak = traced_peak(llama2c.load, path)
    assert peak < held(params) + 5 * reference.DEEP_TENSOR_BYTES


def test_dtype_is_that_asked_for(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(checkpoint_bytes(reference.random_weights(SIZES), SIZES))
    config, params = llama2c.load(path, dtype="bfloat16")
    assert params["layers"]["mlp"]["up"]["kernel"].dtype == ml_dtypes.bfloat16
    assert config.param_dtype == "bfloat16"
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'int8'"):
        llama2c.load(path, dtype="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:20], "28 bytes of header but this one has 20"),
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data[: len(data) // 2], "is truncated"),
        (lambda data: data + b"\0\0\0\0", "bytes after its last tensor"),
        (lambda data: b"GGUF" + data[4:], "is another kind of file"),
        (lambda data: struct.pack("<I", 0x616B3432) + data[4:], "versioned llama2.c export"),
        (lambda data: struct.pack("<7i", 18, 56, 2, 6, 2, 40, 32) + data[28:], "must be even"),
        (lambda data: b"\0" * 28 + data[28:], "is another kind of file"),
    ],
)
def test_unusable_checkpoints_are_refused(tmp_path, change, message):
    path = tmp_path / "model.bin"
    path.write_bytes(change(checkpoint_bytes(reference.random_weights(SIZES), SIZES)))
    with pytest.raises(ValueError, match=message):
        llama2c.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
        llama2c.load(tmp_path / "nothing.bin")


@pytest.fixture(scope="module")
def stories(data_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stories")
    with tarfile.open(data_directory / "lm_stories260K.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    return directory


def test_stories260k_logits_equal_the_recorded_ones(stories):
    config, params = llama2c.load(stories / "stories260K.bin")
    recorded = np.load(stories / "logits_first22_fp64.npz")
    found = decoder_logits(config, params, recorded["input_ids"])
    np.testing.assert_allclose(found, recorded["logits"], atol=1e-4)


def test_stories260k_tokenizer_reads_its_golden_text(stories):
    tokenizer = llama2c.load_tokenizer(stories / "tok512.bin")
    text = (stories / "expected_greedy_200.txt").read_text()
    recorded = np.load(stories / "logits_first22_fp64.npz")["input_ids"].tolist()
    ids = tokenizer.encode(text, add_bos=True)
    assert ids[: len(recorded)] == recorded
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "truncated or corrupt in token 511"),
        (lambda data: data[:7], "truncated or corrupt in token 0"),
        (lambda data: data[:8] + b"\xff" * 4 + data[12:], "truncated or corrupt in token 0"),
        (lambda data: data[:4], "another kind of file"),
    ],
)
def test_unusable_tokenizers_are_refused(stories, tmp_path, change, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(change((stories / "tok512.bin").read_bytes()))
    with pytest.raises(ValueError, match=message):
        llama2c.load_tokenizer(path)
