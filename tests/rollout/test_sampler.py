"""The sampler: what it draws, when it stops, what it compiles, what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.rollout import Generation, generate, sampler
from tests.models.tiny import random_params

CONFIG = DecoderConfig(
    vocab_size=11,
    padded_vocab_size=16,
    width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=12,
    max_length=32,
)
PARAMS = random_params(CONFIG)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def sample(prompts=PROMPTS, *, params=PARAMS, config=CONFIG, **keywords) -> Generation:
    return generate(params, config, prompts, **{"max_new_tokens": 8, "key": 0, **keywords})


apply = jax.jit(decoder.apply, static_argnames="config")


def full_logits(tokens):
    """Logits after each token, from an uncached forward of one fixed shape."""
    padded = np.zeros((1, CONFIG.max_length), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden = apply(PARAMS, padded, config=CONFIG).hidden
    return np.asarray(decoder.logits(PARAMS, hidden, CONFIG))[0, : len(tokens)]


def log_softmax(logits):
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_greedy_is_the_argmax_of_the_full_forward():
    answer = sample(temperature=0)
    for prompt, tokens in zip(PROMPTS, answer.tokens, strict=True):
        sequence = list(prompt)
        for _ in range(8):
            sequence.append(int(full_logits(sequence)[-1].argmax()))
        assert tokens == sequence[len(prompt) :]
    assert answer.finish_reasons == ["length"] * 3


def test_log_probs_are_those_of_the_untempered_model():
    answer = sample(temperature=2.0, top_k=5, top_p=0.9)
    for prompt, tokens, log_probs in zip(PROMPTS, answer.tokens, answer.log_probs, strict=True):
        logits = full_logits(prompt + tokens)[len(prompt) - 1 : -1]
        expected = log_softmax(logits)[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-5)


def test_text_does_not_depend_on_the_batch():
    together = sample()
    assert sample(PROMPTS[:1]).tokens == together.tokens[:1]
    assert sample([*PROMPTS, [10] * 20]).tokens[:3] == together.tokens
    shorter = sample(max_new_tokens=3).tokens
    assert shorter == [tokens[:3] for tokens in together.tokens]


def test_rows_and_seeds_differ_and_a_seed_repeats():
    same_prompt = [[1, 2]] * 4
    first, again, other = (sample(same_prompt, key=key).tokens for key in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({tuple(tokens) for tokens in first}) == 4
    assert sample(same_prompt, key=jax.random.key(1)).tokens == other


def chi_square(counts, probabilities):
    """Pearson's statistic, and the bound that chance exceeds once in 10^5 (Wilson-Hilferty)."""
    expected = counts.sum() * probabilities
    freedom = len(counts) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum(), bound


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"temperature": 1.0}, 11),
        ({"temperature": 2.0}, 11),
        ({"temperature": 1.5, "top_k": 4}, 4),
        ({"temperature": 1.5, "top_p": 0.8}, None),
        ({"temperature": 2.0, "top_k": 6, "top_p": 0.7}, None),
    ],
)
def test_samples_stay_in_the_set_and_follow_its_distribution(settings, size):
    prompt, draws = [1, 2, 3], 2048
    tempered = np.exp(log_softmax(full_logits(prompt)[-1] / settings["temperature"]))
    order = np.argsort(-tempered)[: settings.get("top_k", CONFIG.vocab_size)]
    mass = np.cumsum(tempered[order] / tempered[order].sum())
    order = order[: np.searchsorted(mass, settings.get("top_p", 2.0)) + 1]
    assert len(order) == size or (size is None and 1 < len(order) < 11)
    tokens = np.concatenate(sample([prompt] * draws, max_new_tokens=1, **settings).tokens)
    counts = np.bincount(tokens, minlength=CONFIG.vocab_size)
    assert counts[order].sum() == draws
    statistic, bound = chi_square(counts[order], tempered[order] / tempered[order].sum())
    assert statistic < bound


def test_later_steps_follow_the_model_too():
    """The second token's distribution, given the first, over many rows."""
    tokens = np.array(sample([[1, 2, 3]] * 2048, max_new_tokens=2, temperature=3.0).tokens)
    first = np.bincount(tokens[:, 0]).argmax()
    probabilities = np.exp(log_softmax(full_logits([1, 2, 3, first])[-1] / 3.0))
    counts = np.bincount(tokens[tokens[:, 0] == first, 1], minlength=CONFIG.vocab_size)
    statistic, bound = chi_square(counts, probabilities)
    assert statistic < bound


def test_a_tiny_top_p_and_top_k_one_are_greedy():
    greedy = sample(temperature=0).tokens
    assert sample(top_p=1e-6).tokens == greedy
    assert sample(top_k=1, temperature=5.0).tokens == greedy


def test_cuts_that_cut_nothing_change_nothing():
    plain = sample().tokens
    assert sample(top_k=11).tokens == plain
    assert sample(top_k=10**6, top_p=1.0).tokens == plain


@pytest.fixture
def traces(monkeypatch):
    """One entry for each time the decoder is traced, so for each compilation two."""
    calls = []

    def counted(*arguments, **keywords):
        calls.append(keywords)
        return decoder_apply(*arguments, **keywords)

    decoder_apply = decoder.apply
    monkeypatch.setattr(sampler.decoder, "apply", counted)
    return calls


def test_stop_tokens_are_kept_and_obeyed_without_a_retrace(traces):
    free = sample()
    traces.clear()
    for stops in ([free.tokens[0][2]], [free.tokens[1][4], free.tokens[2][1]], [0, 1, 2, 3]):
        answer = sample(stop_tokens=stops)
        for tokens, cut, log_probs, reason in zip(free.tokens, *_columns(answer), strict=True):
            places = [n for n, token in enumerate(tokens) if token in stops]
            length = places[0] + 1 if places else len(tokens)
            assert cut == tokens[:length]
            assert len(log_probs) == length
            assert reason == ("stop" if places else "length")
        assert "stop" in answer.finish_reasons
    assert not traces


def _columns(answer):
    return answer.tokens, answer.log_probs, answer.finish_reasons


def test_other_values_within_a_bucket_do_not_retrace(traces):
    sample(top_k=3)
    traces.clear()
    sample([[1] * 15] * 4, top_p=0.5, temperature=0.7, key=5, max_new_tokens=16)
    sample([[3], [4, 5], [6]], top_k=9, top_p=0.1, temperature=3.0, stop_tokens=range(8))
    assert not traces
    sample([[1] * 17] * 2, top_k=3)
    assert len(traces) == 2


def test_a_stop_token_in_the_prompt_stops_nothing():
    free = sample([[1, 2, 3]])
    unused = next(token for token in range(11) if token not in free.tokens[0])
    assert sample([[unused, 2, 3]], stop_tokens=[unused], max_new_tokens=1).tokens[0]


def test_a_full_context_ends_the_row():
    prompts = [[1] * 31, [1] * 30, [2]]
    answer = sample(prompts, max_new_tokens=16)
    assert [len(tokens) for tokens in answer.tokens] == [1, 2, 16]
    assert answer.finish_reasons == ["length"] * 3
    for prompt, tokens, log_probs in zip(prompts, answer.tokens, answer.log_probs, strict=True):
        logits = full_logits(prompt + tokens)[len(prompt) - 1 : -1]
        expected = log_softmax(logits)[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-5)


def test_bfloat16_and_padded_vocabulary():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = jax.tree.map(np.copy, PARAMS)
    params["head"]["kernel"][CONFIG.vocab_size :] = 100.0
    answer = sample(params=params, config=config, temperature=4.0)
    assert max(map(max, answer.tokens)) < CONFIG.vocab_size


def test_no_prompts_no_answers():
    assert sample([]) == Generation([], [], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": [[1], []]},
            "prompt 1 is empty: give it at least one token, such as BOS",
        ),
        (
            {"prompts": [[1] * 32]},
            "prompt 0 of 32 tokens leaves no room for a new one in the model's context of 32: "
            "shorten it",
        ),
        (
            {"prompts": [[1], [2, 11]]},
            r"prompt 1 holds token 11, but the vocabulary is 0 \.\. 10: encode with the model's "
            "own tokenizer",
        ),
        ({"prompts": [[-1]]}, r"prompt 0 holds token -1, but the vocabulary is 0 \.\. 10: .*"),
        ({"stop_tokens": [50]}, r"stop_tokens holds token 50, but the vocabulary is .*"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or more, not -1.0"),
        ({"temperature": float("nan")}, r"temperature must be 0 \(greedy\) or more, not nan"),
        (
            {"key": None},
            "sampling needs a key: give a jax random key or a seed, another one each time, "
            "or temperature=0",
        ),
        ({"top_k": 0}, "top_k must be at least 1, or None to cut nothing, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or None, not 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, or None, not 1.5"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, message):
    with pytest.raises(ValueError, match="^" + message + "$"):
        sample(**{"prompts": PROMPTS, **changes})
