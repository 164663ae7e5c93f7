"""The same files through transformers: logits, perplexity, token ids, chat templates.

Needs the parity extra (pytest -m parity); those on the real 135M model are slow as well.
"""

import dataclasses
import tarfile

import numpy as np
import pytest
import tokenizers as tokenizers_library
from flax.traverse_util import flatten_dict
from tokenizers import Regex, pre_tokenizers

from jaxdistill.convert import gguf, huggingface, llama2c
from jaxdistill.data import chat, sources, tokenizers
from jaxdistill.models.config import DecoderConfig, RopeScaling
from tests.convert.decoding import decoder_logits, random_params

pytestmark = pytest.mark.parity

CONFIG = DecoderConfig(
    vocab_size=61, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48,
    max_length=64, rope_theta=500.0,
)  # fmt: skip
TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "tabs\tand\n\nnew lines\r\n   and   runs of spaces",
    "Digits 1234567890, 3.14159 and 2024-11-23; 1,000,000.",
    "don't we'll I'VE they're",
    "naïve café Ünïcode ÀÉÎ ß ﬁ",
    "日本語のテキスト 한국어 русский العربية हिन्दी",
    "emoji 😀👍🏽👨‍👩‍👧‍👦 and symbols ←→∞≠",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # code",
    "<|im_start|>user\nWhat is 12*34?<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|> c<|im_en",
    "zero\u200bwidth \ufeff \x00 \x7f controls",
    "",
]
# transformers' GGUF reader ignores the pre-tokenizer "smollm" and cuts words as GPT-2 does. For
# ASCII digits no merge shows it; for other numbers, which SmolLM2 isolates too, the ids differ.
NUMBERS = "x² ½ cup ①② ٣٤"


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def smollm2():
    return sources.resolve("smollm2-135m-instruct")


def their_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)[None])).logits[0].float().numpy()


def llama(torch, transformers, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()


_ROPE = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
     "original_max_position_embeddings": 16},
]  # fmt: skip


@pytest.mark.parametrize("rope", _ROPE, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize(("tied", "biases"), [(True, False), (False, True)])
def test_a_transformers_llama_has_the_same_logits_here(
    tmp_path, torch, transformers, rope, tied, biases
):
    model = llama(
        torch,
        transformers,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 61, 48)
    expected = their_logits(torch, model, tokens)
    np.testing.assert_allclose(decoder_logits(config, params, tokens), expected, atol=1e-4)


def test_a_sharded_transformers_folder(tmp_path, torch, transformers):
    model = llama(torch, transformers)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    config, params = huggingface.load(tmp_path)
    tokens = np.arange(20)
    expected = their_logits(torch, model, tokens)
    np.testing.assert_allclose(decoder_logits(config, params, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "padded_vocab_size": 64},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_max_length=16)},
        {"rope_scaling": RopeScaling("yarn", 4.0, original_max_length=16, attention_factor=1.3)},
    ],
)
def test_export_to_transformers_and_back(tmp_path, torch, transformers, changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 61, 48)
    ours = decoder_logits(config, params, tokens)[:, :61]
    huggingface.export(tmp_path, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(their_logits(torch, model.eval(), tokens), ours, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again_config, again = huggingface.load(tmp_path / "again")
    np.testing.assert_allclose(decoder_logits(again_config, again, tokens), ours, atol=1e-4)
    expected = flatten_dict(huggingface.load(tmp_path)[1], sep="/")
    for path, values in flatten_dict(again, sep="/").items():
        np.testing.assert_array_equal(values, expected[path])


@pytest.mark.slow
def test_smollm2_logits(smollm2, torch, transformers):
    config, params = gguf.load(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    tokens = gguf.load_tokenizer(smollm2).encode(TEXTS[9] + "12 times 34 is 408, since " + TEXTS[6])
    expected = their_logits(torch, model, tokens)
    found = decoder_logits(config, params, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.slow
def test_smollm2_perplexity_on_wikitext(smollm2, torch, transformers, data_directory):
    with tarfile.open(data_directory / "text_wikitext2_c4_tinystories.tar.gz") as archive:
        text = archive.extractfile("wikitext2/test.txt").read(20000).decode()
    tokens = np.asarray(gguf.load_tokenizer(smollm2).encode(text)[:2048]).reshape(4, 512)
    config, params = gguf.load(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    ours = perplexity([decoder_logits(config, params, row) for row in tokens], tokens)
    theirs = perplexity([their_logits(torch, model, row) for row in tokens], tokens)
    print(f"perplexity on 2,048 WikiText-2 tokens: {ours:.4f} here, {theirs:.4f} in transformers")
    assert abs(ours / theirs - 1) < 0.01


def perplexity(logits, tokens):
    losses = []
    for row_logits, row in zip(logits, tokens, strict=True):
        scores = row_logits[:-1].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        losses.append(-log_probs[np.arange(len(row) - 1), row[1:]])
    return np.exp(np.mean(losses))


@pytest.fixture(scope="module")
def their_smollm2_tokenizer(smollm2):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_token_ids(smollm2, their_smollm2_tokenizer, text):
    ours = gguf.load_tokenizer(smollm2)
    theirs = their_smollm2_tokenizer.encode(text, add_special_tokens=False)
    assert ours.encode(text) == theirs
    assert ours.decode(theirs) == text


@pytest.mark.slow
def test_smollm2_isolates_every_number(smollm2, their_smollm2_tokenizer):
    ours = gguf.load_tokenizer(smollm2)
    backend = tokenizers_library.Tokenizer.from_str(
        their_smollm2_tokenizer.backend_tokenizer.to_str()
    )
    assert backend.encode(NUMBERS, add_special_tokens=False).ids != ours.encode(NUMBERS)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in [NUMBERS, *TEXTS]:
        assert backend.encode(text, add_special_tokens=False).ids == ours.encode(text)


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  spaces \n and <|im_end|> inside "},
        {"role": "assistant", "content": "Fine.\n"},
    ],
]


@pytest.mark.slow
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chat_template(smollm2, their_smollm2_tokenizer, messages, prompt):
    ours = gguf.load_tokenizer(smollm2)
    theirs = their_smollm2_tokenizer
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert chat.render(ours, messages, add_generation_prompt=prompt) == expected
    ids = theirs.apply_chat_template(messages, add_generation_prompt=False, return_dict=False)
    assert chat.encode(ours, messages).tokens == ids


GENERATION_TEMPLATE = """{%- for message in messages %}
{%- if message.role == "assistant" %}
{{- "<|im_start|>assistant\\n" }}
{%- generation %}
    {{- message.content | trim + "<|im_end|>" }}
{%- endgeneration %}
{{- "\\n" }}
{%- else %}
{{- "<|im_start|>" + message.role + "\\n" + message.content | tojson + "<|im_end|>\\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""


@pytest.mark.slow
def test_generation_blocks_give_transformers_mask(smollm2, their_smollm2_tokenizer, tmp_path):
    ours = gguf.load_tokenizer(smollm2)
    ours.chat_template = GENERATION_TEMPLATE
    theirs = their_smollm2_tokenizer.apply_chat_template(
        CONVERSATIONS[1],
        chat_template=GENERATION_TEMPLATE,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    found = chat.encode(ours, CONVERSATIONS[1])
    assert found.tokens == theirs["input_ids"]
    assert found.assistant_mask == theirs["assistant_masks"]
    assert sum(found.assistant_mask) == 5  # "4" and "Fine", ".", each with <|im_end|>


@pytest.mark.slow
def test_exported_tokenizer_loads_in_transformers(smollm2, tmp_path, transformers):
    ours = gguf.load_tokenizer(smollm2)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    expected = chat.render(ours, CONVERSATIONS[1])
    assert theirs.apply_chat_template(CONVERSATIONS[1], tokenize=False) == expected
    theirs.save_pretrained(tmp_path / "again")
    again = tokenizers.load(tmp_path / "again")
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert again.chat_template == ours.chat_template


def test_llama2c_tokenizer_in_transformers(tmp_path, transformers, data_directory):
    with tarfile.open(data_directory / "lm_stories260K.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    ours = llama2c.load_tokenizer(tmp_path / "tok512.bin")
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
