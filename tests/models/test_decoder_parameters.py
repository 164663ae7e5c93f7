"""The parameter tree: layout, initial values, axis names, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdistill.models import DecoderConfig, decoder
from tests.models.tiny import FULL, PLAIN, apply, quick_jit, random_params, random_tokens

init = quick_jit(decoder.init, static_argnums=0)
L, D, H, G, K, F = 3, 24, 4, 2, 8, 20


def shapes(config):
    return jax.tree.map(lambda leaf: leaf.shape, decoder.abstract_params(config))


def test_the_layout_is_the_contract():
    assert shapes(PLAIN) == {
        "embed": {"embedding": (29, D)},
        "layers": {
            "attention_norm": {"scale": (L, D)},
            "attention": {
                "query": {"kernel": (L, D, H, K)},
                "key": {"kernel": (L, D, G, K)},
                "value": {"kernel": (L, D, G, K)},
                "output": {"kernel": (L, H, K, D)},
            },
            "mlp_norm": {"scale": (L, D)},
            "mlp": {
                "gate": {"kernel": (L, D, F)},
                "up": {"kernel": (L, D, F)},
                "down": {"kernel": (L, F, D)},
            },
        },
        "final_norm": {"scale": (D,)},
        "head": {"kernel": (29, D)},
    }


def test_the_layout_with_everything():
    tree = shapes(FULL)
    assert tree["embed"]["embedding"] == tree["head"]["kernel"] == (32, D)
    assert tree["layers"]["attention"] == {
        "query": {"kernel": (L, D, H, K), "bias": (L, H, K)},
        "key": {"kernel": (L, D, G, K), "bias": (L, G, K)},
        "value": {"kernel": (L, D, G, K), "bias": (L, G, K)},
        "output": {"kernel": (L, H, K, D), "bias": (L, D)},
        "query_norm": {"scale": (L, K)},
        "key_norm": {"scale": (L, K)},
    }
    biases = [tree["layers"]["mlp"][name]["bias"] for name in ("gate", "up", "down")]
    assert biases == [(L, F), (L, F), (L, D)]


def test_a_tied_head_has_no_parameters():
    assert "head" not in shapes(dataclasses.replace(PLAIN, tie_embeddings=True))


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_axis_names_fit_the_parameters(config):
    sizes = {
        "layers": L,
        "vocab": config.embedding_rows,
        "width": D,
        "heads": H,
        "kv_heads": G,
        "head_dim": K,
        "mlp": F,
    }
    named = jax.tree.map(
        lambda names: tuple(sizes[name] for name in names),
        decoder.logical_axes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    assert named == shapes(config)


@pytest.fixture(scope="module")
def initial():
    config = dataclasses.replace(FULL, width=128, mlp_width=256, num_heads=16, num_kv_heads=8)
    return config, init(config, jax.random.key(0))


def test_initial_values(initial):
    config, params = initial
    layers = params["layers"]
    depth_gain = (2 * config.num_layers) ** -0.5
    for kernel, deviation in (
        (params["embed"]["embedding"], 0.02),
        (params["head"]["kernel"], 0.02),
        (layers["attention"]["query"]["kernel"], 128**-0.5),
        (layers["attention"]["output"]["kernel"], depth_gain * 128**-0.5),
        (layers["mlp"]["up"]["kernel"], 128**-0.5),
        (layers["mlp"]["down"]["kernel"], depth_gain * 256**-0.5),
    ):
        assert np.std(kernel) == pytest.approx(deviation, rel=0.03)
        assert abs(np.mean(kernel)) < 0.05 * deviation
    assert np.all(layers["mlp_norm"]["scale"] == 1)
    assert np.all(layers["mlp"]["up"]["bias"] == 0)


def test_no_two_kernels_start_alike(initial):
    _, params = initial
    attention = params["layers"]["attention"]
    assert not np.array_equal(attention["key"]["kernel"], attention["value"]["kernel"])
    assert not np.array_equal(attention["key"]["kernel"][0], attention["key"]["kernel"][1])
    assert not np.array_equal(params["embed"]["embedding"], params["head"]["kernel"])


def test_keys_decide_and_initial_logits_are_small():
    first, same, other = (init(PLAIN, jax.random.key(n)) for n in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first["embed"]["embedding"], other["embed"]["embedding"])
    tokens = random_tokens(PLAIN, 1, 8)
    hidden = apply(first, tokens, config=PLAIN).hidden
    logits = decoder.logits(first, hidden, PLAIN)
    assert np.abs(logits).max() < 0.5


def refused(message, **changes):
    """The arguments of a call are looked at before anything else happens."""
    call = {"tokens": np.zeros((2, 6), np.int32), "params": PARAMS, **changes}
    with pytest.raises(ValueError, match="^" + message + "$"):
        decoder.apply(config=PLAIN, **call)


PARAMS = random_params(PLAIN)


def test_bad_tokens_are_refused():
    refused(
        r"tokens must be whole numbers of shape \[batch, length\], not int32 of shape \[6\]",
        tokens=np.zeros(6, np.int32),
    )
    refused(
        r"tokens must be whole numbers of shape \[batch, length\], not float32 of shape \[2, 6\]",
        tokens=np.zeros((2, 6), np.float32),
    )
    refused(
        "sequence of 65 tokens is longer than the model's context of 64",
        tokens=np.zeros((1, 65), np.int32),
    )


@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_bad_companions_of_tokens_are_refused(name):
    refused(
        name + r" must be whole numbers of the shape of tokens \[2, 6\], not int32 of shape \[6\]",
        **{name: np.zeros(6, np.int32)},
    )
    refused(
        name
        + r" must be whole numbers of the shape of tokens \[2, 6\], "
        + r"not float32 of shape \[2, 6\]",
        **{name: np.zeros((2, 6), np.float32)},
    )


def test_bad_caches_are_refused():
    with pytest.raises(ValueError, match="sequence of 65 tokens is longer than the model's"):
        decoder.init_cache(PLAIN, 1, 65)
    refused(
        "segment_ids do not go with a cache: give each sequence its own row",
        segment_ids=np.ones((2, 6), np.int32),
        cache=decoder.init_cache(PLAIN, 2, 6),
    )
    for rows, slots in ((3, 6), (2, 5)):
        refused(
            rf"a cache of {rows} rows and {slots} slots does not hold tokens of shape \[2, 6\]: "
            r"make one with init_cache\(config, batch, length\)",
            cache=decoder.init_cache(PLAIN, rows, slots),
        )


def test_parameters_of_another_config_are_refused():
    fewer = dataclasses.replace(PLAIN, num_layers=2)
    message = (
        r"parameters do not fit the config: layers.attention.key.kernel is \[2, 24, 2, 8\] and "
        r"should be \[3, 24, 2, 8\]; .* \(and 6 more\)"
    )
    refused(message, params=random_params(fewer))
    tied = {name: part for name, part in PARAMS.items() if name != "head"}
    refused(
        r"parameters do not fit the config: head.kernel is missing and should be \[29, 24\]",
        params=tied,
    )
    refused(
        r"parameters do not fit the config: extra is \[1\] and should be absent",
        params={**PARAMS, "extra": np.zeros(1)},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be a whole number of at least 1, not 0"),
        ({"num_layers": 2.0}, "num_layers must be a whole number of at least 1, not 2.0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive, not 0.0"),
        ({"sliding_window": 0}, "sliding_window must be positive, not 0"),
        ({"attention_soft_cap": -1.0}, "attention_soft_cap must be positive, not -1.0"),
        (
            {"num_kv_heads": 3},
            "num_heads must be a multiple of num_kv_heads, but 4 is not one of 3",
        ),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, not 7"),
        (
            {"padded_vocab_size": 28},
            r"padded_vocab_size must be at least vocab_size \(29\), not 28",
        ),
        (
            {"dtype": "bf16"},
            "dtype must be one of float32, bfloat16, float16, not 'bf16'",
        ),
        (
            {"remat": "fulll"},
            "remat must be one of none, full, dots, dots_no_batch, not 'fulll'; "
            r"did you mean 'full'\?",
        ),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match="^" + message):
        dataclasses.replace(PLAIN, **changes)


def test_configs_survive_a_dict():
    for config in (PLAIN, FULL):
        assert DecoderConfig.from_dict(config.to_dict()) == config
        assert hash(DecoderConfig.from_dict(config.to_dict())) == hash(config)
    with pytest.raises(
        ValueError, match=r"^DecoderConfig has no field 'num_layer'; did you mean 'num_layers'\?$"
    ):
        DecoderConfig.from_dict({**PLAIN.to_dict(), "num_layer": 3})
