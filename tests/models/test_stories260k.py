"""A real model from end to end: stories260K's logits and greedy text, against golden files."""

import tarfile

import jax
import numpy as np
import pytest

from jaxdistill.convert import llama2c
from jaxdistill.models import decoder
from jaxdistill.rollout import generate


@pytest.fixture(scope="module")
def folder(data_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("stories260k")
    with tarfile.open(data_directory / "lm_stories260K.tar.gz") as archive:
        archive.extractall(path, filter="data")
    return path


@pytest.fixture(scope="module")
def model(folder):
    config, params = llama2c.load(folder / "stories260K.bin")
    return params, config


def test_logits_match_a_float64_forward(folder, model):
    params, config = model
    golden = np.load(folder / "logits_first22_fp64.npz")
    tokens = golden["input_ids"][None]
    hidden = jax.jit(decoder.apply, static_argnames="config")(params, tokens, config=config).hidden
    logits = decoder.logits(params, hidden, config)[0]
    assert logits.shape == (22, 512)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=5e-5)


def test_greedy_text_is_the_golden_text(folder, model):
    params, config = model
    tokenizer = llama2c.load_tokenizer(folder / "tok512.bin")
    expected = (folder / "expected_greedy_200.txt").read_text()
    beginning = [tokenizer.bos_id]
    answer = generate(params, config, [beginning], max_new_tokens=200, temperature=0)
    assert tokenizer.decode(answer.tokens[0]) == expected
    assert answer.finish_reasons == ["length"]
    rescored = decoder.logits(
        params,
        decoder.apply(params, np.array([beginning + answer.tokens[0]], np.int32), config).hidden,
        config,
    )[0, :-1]
    log_probs = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(rescored)), np.array(answer.tokens[0])[:, None], axis=-1
    )[:, 0]
    np.testing.assert_allclose(answer.log_probs[0], log_probs, rtol=0, atol=1e-4)
