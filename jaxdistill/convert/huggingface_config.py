"""config.json of the Hugging Face Llama family, in both directions."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdistill.models.config import DecoderConfig, RopeScaling

# RopeScaling field -> key in the file, for the settings each kind has beside its factor.
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "linear": {},
    "dynamic": {},
    "llama3": {
        "original_max_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "original_max_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def read_config(values: Mapping[str, Any], source: pathlib.Path, dtype: str) -> DecoderConfig:
    """Turn config.json into a DecoderConfig.

    Args:
      values: the parsed file, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).
      source: what to call it in an error.
      dtype: the type of the parameters.

    Raises:
      ValueError: not a Llama model, a key is missing, or a setting has no counterpart here.
    """
    _check_family(values, source)
    try:
        heads, width = values["num_attention_heads"], values["hidden_size"]
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        length = values["max_position_embeddings"]
        scaling = _read_scaling(rope, length)
        if scaling is not None and scaling.kind == "dynamic":
            # Here the file gives the context trained on; stretching it is the point.
            length = int(length * scaling.factor)
        return DecoderConfig(
            vocab_size=values["vocab_size"],
            width=width,
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or width // heads,
            mlp_width=values["intermediate_size"],
            max_length=length,
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            norm_epsilon=float(values["rms_norm_eps"]),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=values.get("attention_bias", False),
            attention_output_bias=values.get("attention_bias", False),
            mlp_bias=values.get("mlp_bias", False),
            param_dtype=dtype,
        )
    except KeyError as error:
        raise ValueError(f"{source}: the Llama configuration has no {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{source}: {error}") from error


def _check_family(values: Mapping[str, Any], source: pathlib.Path) -> None:
    if values.get("model_type") != "llama":
        raise ValueError(
            f"{source}: model_type should be 'llama' but is {values.get('model_type')!r}"
        )
    if values.get("quantization_config"):
        raise ValueError(
            f"{source}: the weights are quantised in a Hugging Face format, which is not read "
            "here; use the unquantised model or a GGUF file"
        )
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{source}: hidden_act should be 'silu' but is {values['hidden_act']!r}")


def _read_scaling(rope: Mapping[str, Any], length: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partly rotated heads (partial_rotary_factor) are not supported")
    if kind == "default":
        return None
    if kind not in _ROPE_KEYS:
        known = ", ".join(["default", *_ROPE_KEYS])
        raise ValueError(f"rope_type {kind!r} is not supported; {known} are")
    if kind == "yarn" and (rope.get("mscale") or not rope.get("truncate", True)):
        raise ValueError("yarn with mscale or without truncation is not supported")
    fields = {ours: rope[key] for ours, key in _ROPE_KEYS[kind].items() if rope.get(key)}
    if kind != "linear":
        fields.setdefault("original_max_length", length)
    return RopeScaling(kind=kind, factor=float(rope["factor"]), **fields)


def write_config(
    config: DecoderConfig, dtype: str, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Turn a DecoderConfig into config.json, in a form that transformers 4 and 5 both read.

    Args:
      config: the model.
      dtype: the type the weights are written in.
      token_ids: bos_token_id, eos_token_id, pad_token_id.

    Raises:
      ValueError: the model has a part that transformers' Llama lacks.
    """
    _check_expressible(config)
    rope: dict[str, Any] = {"rope_type": "default"}
    length = config.max_length
    if scaling := config.rope_scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        settings = {key: getattr(scaling, ours) for ours, key in _ROPE_KEYS[scaling.kind].items()}
        rope |= {key: value for key, value in settings.items() if value is not None}
        if scaling.kind == "dynamic":
            length = scaling.original_max_length or length
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        # transformers 5 reads rope_parameters and dtype; 4 reads the other three.
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_ids,
    }


def _check_expressible(config: DecoderConfig) -> None:
    extras = {
        "query_key_norm": config.query_key_norm,
        "attention_soft_cap": config.attention_soft_cap is not None,
        "logit_soft_cap": config.logit_soft_cap is not None,
        "sliding_window": config.sliding_window is not None,
        "attention_bias without attention_output_bias, or the reverse": (
            config.attention_bias != config.attention_output_bias
        ),
        "a width that is no multiple of num_heads": config.width % config.num_heads != 0,
    }
    if found := [name for name, present in extras.items() if present]:
        raise ValueError(
            f"transformers' Llama has no {found[0]}, so this model cannot be exported in the "
            "Hugging Face layout"
        )
