"""Hugging Face folders: written here with the safetensors package, read back, and the reverse."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxdistill.convert import huggingface
from jaxdistill.data import tokenizers
from jaxdistill.models.config import DecoderConfig, RopeScaling
from tests.convert import reference
from tests.convert.decoding import decoder_logits, held, random_params, traced_peak

SIZES = reference.Sizes()
TOKENS = np.array([1, 5, 39, 0, 7, 7, 20, 3])
CONFIG = DecoderConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12,
    max_length=16, rope_theta=500.0, tie_embeddings=True,
)  # fmt: skip


def config_json(sizes, **changes):
    return {
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.length,
        "rms_norm_eps": sizes.epsilon,
        "rope_theta": sizes.theta,
        "tie_word_embeddings": sizes.tied,
        "attention_bias": sizes.biases,
        "mlp_bias": sizes.biases,
        **changes,
    }


def write_folder(directory, sizes=SIZES, weights=None, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(sizes, **changes)))
    save_file(weights or reference.random_weights(sizes), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(("tied", "biases"), [(True, True), (False, False)])
def test_logits_equal_a_half_split_reference(tmp_path, tied, biases):
    sizes = reference.Sizes(tied=tied, biases=biases)
    config, params = huggingface.load(write_folder(tmp_path / "model", sizes))
    weights = reference.random_weights(sizes)
    expected = reference.logits(weights, sizes, TOKENS, interleaved=False)
    np.testing.assert_allclose(decoder_logits(config, params, TOKENS), expected, atol=5e-5)


def test_shards_are_joined(tmp_path):
    whole = write_folder(tmp_path / "whole")
    weights = reference.random_weights(SIZES)
    shards = write_folder(tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:12], names[12:]), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: weights[name] for name in part}, shards / file)
        weight_map |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected, found = (
        flatten_dict(huggingface.load(folder)[1], sep="/") for folder in (whole, shards)
    )
    assert expected.keys() == found.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values)
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="the index lists this shard of 3"):
        huggingface.load(shards)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "padded_vocab_size": 16},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("dynamic", 2.0, original_max_length=8)},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_max_length=8192,
                                     low_frequency_factor=2.0)},
        {"rope_scaling": RopeScaling("yarn", 4.0, original_max_length=4, beta_fast=16.0,
                                     attention_factor=1.5)},
    ],
)  # fmt: skip
def test_export_then_load_is_exact(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    huggingface.export(tmp_path, config, params)
    loaded_config, loaded = huggingface.load(tmp_path)
    assert loaded_config == dataclasses.replace(config, padded_vocab_size=None)
    found = flatten_dict(loaded, sep="/")
    for path, values in flatten_dict(params, sep="/").items():
        table = path in ("embed/embedding", "head/kernel")
        kept = values[: config.vocab_size] if table else values
        np.testing.assert_array_equal(found[path], kept, err_msg=path)


def test_loading_and_export_hold_few_tensors_beside_the_parameters(tmp_path):
    folder = write_folder(tmp_path / "model", reference.DEEP)
    (config, params), peak = traced_peak(huggingface.load, folder)
    assert peak < held(params) + 5 * reference.DEEP_TENSOR_BYTES
    _, peak = traced_peak(huggingface.export, tmp_path / "out", config, params)
    assert peak < 5 * reference.DEEP_TENSOR_BYTES


def test_dtype_of_the_file_and_of_the_parameters(tmp_path):
    params = random_params(CONFIG)
    huggingface.export(tmp_path, CONFIG, params, dtype="bfloat16")
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert stored == {"BF16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    _, loaded = huggingface.load(tmp_path)
    rounded = params["embed"]["embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded["embed"]["embedding"], rounded)
    _, half = huggingface.load(tmp_path, dtype="bfloat16")
    assert half["embed"]["embedding"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_old_and_new_rotary_settings(tmp_path, rope):
    values = config_json(SIZES)
    del values["rope_theta"]
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | rope))
    config, _ = huggingface.load(tmp_path)
    assert config.rope_theta == 500.0
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_leftovers_of_old_checkpoints_are_ignored(tmp_path):
    sizes = reference.Sizes(tied=True)
    weights = reference.random_weights(sizes)
    leftovers = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    _, params = huggingface.load(write_folder(tmp_path, sizes, weights | leftovers))
    assert "head" not in params


def small_tokenizer():
    tokens = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    return tokenizers.scored_bpe(
        tokens, [0.0] * len(tokens), control=tokens[:3], space="a", bos_id=1, eos_id=2
    )


def test_export_writes_the_tokenizer_and_its_ids(tmp_path):
    params = random_params(CONFIG)
    huggingface.export(tmp_path, CONFIG, params, small_tokenizer())
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert tokenizers.load(tmp_path).fingerprint == small_tokenizer().fingerprint


def test_a_failed_export_leaves_the_old_files(tmp_path, monkeypatch):
    params = random_params(CONFIG)
    huggingface.export(tmp_path, CONFIG, params)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def break_off(path, *_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(huggingface, "_write_weights", break_off)
    with pytest.raises(OSError, match="No space left"):
        huggingface.export(tmp_path, CONFIG, random_params(CONFIG, seed=1))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_key_norm": True}, "Llama has no query_key_norm"),
        ({"logit_soft_cap": 30.0}, "Llama has no logit_soft_cap"),
        ({"sliding_window": 8}, "Llama has no sliding_window"),
        ({"attention_bias": True}, "Llama has no attention_bias without attention_output_bias"),
        ({"num_heads": 6}, "Llama has no a width that is no multiple of num_heads"),
    ],
)
def test_models_that_llama_cannot_express_are_refused(tmp_path, changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    with pytest.raises(ValueError, match=message):
        huggingface.export(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


def test_export_refuses_what_does_not_belong_together(tmp_path):
    params = random_params(CONFIG)
    wider = dataclasses.replace(CONFIG, mlp_width=24)
    with pytest.raises(
        ValueError, match=r"'layers/mlp/gate/kernel' should have shape \[2, 8, 24\]"
    ):
        huggingface.export(tmp_path / "out", wider, params)
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    with pytest.raises(ValueError, match="'head/kernel' is missing from them"):
        huggingface.export(tmp_path / "out", untied, params)
    other = dataclasses.replace(CONFIG, vocab_size=500)
    with pytest.raises(ValueError, match=r"the tokenizer has 11 tokens but the model's .* 500"):
        huggingface.export(tmp_path / "out", other, random_params(other), small_tokenizer())
    with pytest.raises(ValueError, match="dtype must be one of"):
        huggingface.export(tmp_path / "out", CONFIG, params, dtype="float8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type should be 'llama' but is 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act should be 'silu' but is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised in a Hugging Face format"),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_kv_heads"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has no 'factor'"),
        ({"partial": 1, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partly rotated"),
        ({"num_hidden_layers": 3}, "9 of 30 tensors are missing"),
        ({"num_hidden_layers": 1}, "9 tensors have no place in a Llama-style decoder"),
        ({"intermediate_size": 64}, r"should have shape \[64, 24\] .* but has \[56, 24\]"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers but the file has 21 tensors"),
    ],
)
def test_unsuitable_configurations_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        huggingface.load(write_folder(tmp_path, **changes))


def test_unusable_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:4], b"\x80\x02}q\x00."):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or corrupt"):
            huggingface.load(folder)
    integers = reference.random_weights(SIZES)
    integers["model.norm.weight"] = np.ones(SIZES.width, np.int8)
    save_file(integers, weights)
    with pytest.raises(ValueError, match=r"'model.norm.weight' is stored as I8"):
        huggingface.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        huggingface.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="opening a pickle runs the program inside it"):
        huggingface.load(folder)
    outside = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(ValueError, match="is not in this folder"):
        huggingface.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="this is not JSON"):
        huggingface.load(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        huggingface.load(tmp_path / "nothing")
