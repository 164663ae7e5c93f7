"""Rotary frequencies against the published definitions, in float64."""

import dataclasses

import numpy as np
import pytest

from jaxdistill.models import RopeScaling, decoder, rope
from tests.models import oracle
from tests.models.tiny import PLAIN, apply, random_params, random_tokens

SCALINGS = [
    None,
    RopeScaling("linear", 2.5),
    RopeScaling("dynamic", 2.0, original_max_length=64),
    RopeScaling("llama3", 8.0, original_max_length=8192),
    RopeScaling("llama3", 32.0, 8192, low_frequency_factor=0.5, high_frequency_factor=16.0),
    RopeScaling("yarn", 4.0, original_max_length=4096),
    RopeScaling("yarn", 40.0, 2048, beta_fast=16.0, beta_slow=2.0, attention_factor=0.8),
]


@pytest.mark.parametrize("length", [32, 64, 500])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind if s else "none")
def test_frequencies_match_the_definitions(scaling, length):
    for head_dim, theta in ((64, 10000.0), (128, 500000.0)):
        rates, factor = rope.frequencies(head_dim, theta, scaling, length=length)
        expected, expected_factor = oracle.rope_rates(head_dim, theta, scaling, length)
        np.testing.assert_allclose(rates, expected, rtol=1e-13)
        assert factor == pytest.approx(expected_factor, rel=1e-15)


@pytest.mark.parametrize("scaling", SCALINGS[3:], ids=lambda s: s.kind)
def test_bands_keep_the_fast_and_stretch_the_slow(scaling):
    plain, _ = rope.frequencies(128, 500000.0, length=1)
    rates, _ = rope.frequencies(128, 500000.0, scaling, length=1)
    assert rates[0] == plain[0]
    assert rates[-1] == pytest.approx(plain[-1] / scaling.factor, rel=1e-12)
    between = (rates < plain * 0.999) & (rates > plain / scaling.factor * 1.001)
    assert between.any()


def test_dynamic_touches_nothing_up_to_the_original_length():
    scaling = SCALINGS[2]
    plain, _ = rope.frequencies(64, 10000.0, length=64)
    np.testing.assert_array_equal(rope.frequencies(64, 10000.0, scaling, length=64)[0], plain)
    longer, _ = rope.frequencies(64, 10000.0, scaling, length=65)
    assert longer[0] == plain[0]
    assert (longer[1:] < plain[1:]).all()


def test_a_long_dynamic_sequence_decodes_as_it_scores():
    """The cache's length, not the number of tokens so far, decides the base."""
    scaling = RopeScaling("dynamic", 4.0, original_max_length=4)
    config = dataclasses.replace(PLAIN, rope_scaling=scaling, num_layers=1)
    params, tokens = random_params(config), random_tokens(config, 1, 8)
    whole = apply(params, tokens, config=config).hidden
    cache = decoder.init_cache(config, 1, 8)
    for t in range(8):
        positions = np.array([[t]], np.int32)
        output = apply(
            params, tokens[:, t : t + 1], config=config, positions=positions, cache=cache
        )
        cache = output.cache
    np.testing.assert_allclose(output.hidden[0, 0], whole[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "ntk", "factor": 2.0},
            "rope scaling kind must be one of linear, dynamic, llama3, yarn, not 'ntk'",
        ),
        (
            {"kind": "linear", "factor": 0.5},
            "rope scaling factor must be at least 1, not 0.5",
        ),
        (
            {"kind": "yarn", "factor": 2.0},
            r"rope scaling 'yarn' needs original_max_length >= 1 \(the context trained on\), "
            "not None",
        ),
        (
            {
                "kind": "llama3",
                "factor": 2.0,
                "original_max_length": 8,
                "low_frequency_factor": 4.0,
            },
            "low_frequency_factor must be below high_frequency_factor, but 4.0 >= 4.0",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_length": 8, "beta_slow": 32.0},
            "yarn needs 0 < beta_slow < beta_fast, not beta_slow=32.0, beta_fast=32.0",
        ),
    ],
)
def test_impossible_scalings_are_refused(arguments, message):
    with pytest.raises(ValueError, match="^" + message + "$"):
        RopeScaling(**arguments)
