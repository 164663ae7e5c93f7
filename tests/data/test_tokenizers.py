"""Tokenizers: against the plain algorithms written here, and against their own libraries."""

import json
import math
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import sentencepiece
import tokenizers as backends
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.convert import llama2c
from jaxdistill.data import tokenizers
from jaxdistill.models.config import DecoderConfig

TEXTS = [
    "Once upon a time, there was a little girl.",
    " leading,  double and trailing ",
    "naïve café 日本語 😀 \x00",
    "line\nbreaks\r\n\tand tabs",
    "",
]


# A small byte-level vocabulary: GPT-2's letters for the bytes, then a few merges.
def byte_letters():
    """GPT-2's letter for each byte: itself where it prints, else the next free one from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


LETTERS = byte_letters()
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "l l", "' ll", "Ġ 1", "Ċ Ċ"]
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre_tokenizer="smollm", **options):
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*SPECIAL, *(LETTERS[byte] for byte in range(256)), *merged]
    options = {"control": SPECIAL, "bos_id": 1, "eos_id": 2, **options}
    return tokenizers.byte_level_bpe(tokens, MERGES, pre_tokenizer=pre_tokenizer, **options)


def pieces(tokenizer, text):
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        ("gpt-2", [" the", " ", "12", "3", "'ll"]),
        ("smollm", [" the", " ", "1", "2", "3", "'ll"]),
        ("llama-bpe", [" the", " ", "12", "3", "'ll"]),
        ("qwen2", [" the", " ", "1", "2", "3", "'ll"]),
    ],
)
def test_each_pre_tokenizer_cuts_words_its_own_way(pre_tokenizer, expected):
    # "1 2" is merged before "Ġ 1", so a word " 123" becomes " ", "12", "3".
    assert pieces(byte_level(pre_tokenizer), " the 123'll") == expected


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_byte_level_text_comes_back_unchanged(text):
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_recognised():
    tokenizer = byte_level()
    assert tokenizer.encode("<|im_start|>the<|im_end|>") == [1, *tokenizer.encode("the"), 2]
    assert tokenizer.special_tokens == {"<|end|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    ids = tokenizer.encode("<|im_start|>the<|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>the<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the"
    assert tokenizer.encode("the", add_bos=True) == [1, *tokenizer.encode("the")]


def test_decode_takes_numpy_ids():
    tokenizer = byte_level()
    assert tokenizer.decode(np.asarray(tokenizer.encode("the"), np.int32)) == "the"


def test_offsets_are_characters():
    tokenizer = byte_level()
    text = "é<|im_end|> the"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert offsets == [(0, 1), (0, 1), (1, 11), (11, 15)]


def test_bos_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="no bos token"):
        byte_level(bos_id=None).encode("x", add_bos=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pre_tokenizer": "falcon"}, "pre-tokenizer 'falcon' is not known here"),
        ({"merges": ["a b c"]}, "two tokens with a space between, not 'a b c'"),
        ({"merges": ["a c"]}, "the merge 'a' \\+ 'c' names a token not in the vocabulary"),
        ({"tokens": ["a", "b", "a"]}, "has the token 'a' twice"),
        ({"eos_id": 7}, "the eos token has id 7 but the tokenizer has 3 tokens"),
    ],
)
def test_impossible_vocabularies_are_refused(arguments, message):
    given_arguments = {"tokens": ["a", "b", "ab"], "merges": ["a b"], "pre_tokenizer": "gpt-2"}
    with pytest.raises(ValueError, match=message):
        tokenizers.byte_level_bpe(**given_arguments | arguments)


# SentencePiece-style BPE against run.c's loop: join the best-scored neighbours until none joins.
STORY_TOKENS = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
    " ", "a", "b", "c", "é", "aa", " a", "ab", "aab", "bc", " ab", "aaaa", "cc", "  ",
]  # fmt: skip
STORY_SCORES = [0.0] * 259 + [-1e9] * 5 + [-float(rank) for rank in range(9)]


def greedy_merge(text):
    """The encoder of llama2.c, as plainly as it can be written."""
    known = {token: token_id for token_id, token in enumerate(STORY_TOKENS)}
    ids = []
    for character in " " + text if text else "":
        ids += (
            [known[character]] if character in known else [byte + 3 for byte in character.encode()]
        )
    while True:
        best, place = -math.inf, None
        for i in range(len(ids) - 1):
            joined = known.get(STORY_TOKENS[ids[i]] + STORY_TOKENS[ids[i + 1]])
            if joined is not None and STORY_SCORES[joined] > best:
                best, place = STORY_SCORES[joined], i
        if place is None:
            return ids
        joined = known[STORY_TOKENS[ids[place]] + STORY_TOKENS[ids[place + 1]]]
        ids[place : place + 2] = [joined]


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="aabbcc é日", max_size=24))
def test_scored_bpe_merges_as_llama2c_does(text):
    tokenizer = tokenizers.scored_bpe(
        STORY_TOKENS, STORY_SCORES, control=STORY_TOKENS[:3], space=" ", bos_id=1, eos_id=2
    )
    assert tokenizer.encode(text) == greedy_merge(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_scored_bpe_needs_a_score_a_token():
    with pytest.raises(ValueError, match="there are 3 tokens but 2 scores"):
        tokenizers.scored_bpe(["a", "b", "c"], [0.0, 0.0], control=())


@pytest.fixture(scope="module")
def models(data_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name in ("tokenizers", "lm_tinystories_char_936K", "lm_stories260K"):
        with tarfile.open(data_directory / f"{name}.tar.gz") as archive:
            archive.extractall(directory, filter="data")
    return directory


_MODELS = ["t5-base.spm", "spm_test_1000.model", "tok105.model"]


@pytest.mark.parametrize("name", _MODELS)
def test_sentencepiece_ids_are_the_librarys(models, name):
    tokenizer = tokenizers.load(models / name)
    library = sentencepiece.SentencePieceProcessor(model_file=str(models / name))
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    assert tokenizer.vocab_size == library.vocab_size()
    for text in TEXTS:
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("name", _MODELS)
def test_sentencepiece_offsets_cover_the_text(models, name):
    tokenizer = tokenizers.load(models / name)
    text = "Héllo 日本</s>wörld"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert len(ids) == len(offsets)
    assert "".join(text[start:end] for start, end in offsets) == text
    assert offsets[ids.index(tokenizer.eos_id)] == (8, 12)


def test_sentencepiece_control_pieces(models):
    tokenizer = tokenizers.load(models / "spm_test_1000.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    ids = tokenizer.encode("<s>the time</s>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "<s>the time</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the time"
    assert tokenizer.encode("the", add_bos=True) == [1, *tokenizer.encode("the")]


def test_sentencepiece_save_and_load(models, tmp_path):
    tokenizer = tokenizers.SentencePieceTokenizer(
        (models / "tok105.model").read_bytes(), chat_template="{{ bos_token }}"
    )
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == "{{ bos_token }}"


def test_fast_save_and_load(tmp_path):
    tokenizer = byte_level(pad_id=0, chat_template="{{ messages }}")
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 0)
    assert again.chat_template == "{{ messages }}"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_templates_and_tokens_in_their_other_places(tmp_path):
    byte_level(chat_template="old").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|end|>", "special": True}
    config["chat_template"] = [
        {"name": "rag", "template": "not this"},
        {"name": "default", "template": "this"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.chat_template) == (0, "this")
    (tmp_path / "chat_template.jinja").write_text("newest")
    assert tokenizers.load(tmp_path).chat_template == "newest"


def test_padding_and_truncation_in_the_file_are_not_applied(tmp_path):
    byte_level().save(tmp_path)
    backend = backends.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.load(tmp_path).encode("abcdef") == byte_level().encode("abcdef")


def test_fingerprints_differ_with_anything_that_matters():
    prints = [
        byte_level().fingerprint,
        byte_level("gpt-2").fingerprint,
        byte_level(eos_id=0).fingerprint,
        byte_level(chat_template="x").fingerprint,
        byte_level(control=SPECIAL[:2]).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprints_are_the_same_in_another_process(tmp_path):
    byte_level().save(tmp_path)
    program = (
        "import sys; from jaxdistill.data import tokenizers;"
        "print(tokenizers.load(sys.argv[1]).fingerprint)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == byte_level().fingerprint
    assert len(found) == 64


def test_llama2c_tokenizer_round_trips_through_a_folder(models, tmp_path):
    tokenizer = llama2c.load_tokenizer(models / "tok512.bin")
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).fingerprint == tokenizer.fingerprint


def config_of(vocab_size):
    return DecoderConfig(
        vocab_size=vocab_size, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        mlp_width=8, max_length=8,
    )  # fmt: skip


def test_the_wrong_tokenizer_is_refused():
    tokenizer = byte_level()
    tokenizers.check_vocabulary(tokenizer, config_of(tokenizer.vocab_size))
    tokenizers.check_vocabulary(tokenizer, config_of(tokenizer.vocab_size + 2))
    for wrong in (tokenizer.vocab_size - 1, tokenizer.vocab_size + 3, 49152):
        with pytest.raises(ValueError, match="the tokenizer has 267 tokens but") as caught:
            tokenizers.check_vocabulary(tokenizer, config_of(wrong))
        assert "\n" not in str(caught.value)


def test_unusable_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of tokenizer\.json"):
        tokenizers.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        tokenizers.load(tmp_path / "nothing.json")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: this is not a tokenizer\.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"\x00garbage" * 9)
    with pytest.raises(ValueError, match=r"broken\.model: these bytes are not a SentencePiece"):
        tokenizers.load(tmp_path / "broken.model")
    byte_level().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(ValueError, match="eos token '<stop>' is not in the vocabulary"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, found a list"):
        tokenizers.load(tmp_path)
