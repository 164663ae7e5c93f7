"""Chat templates: rendering, refusals, the sandbox, and where the assistant's tokens are."""

import datetime

import pytest

from jaxdistill.convert import gguf
from jaxdistill.data import chat, sources
from tests.data.test_tokenizers import byte_level

# SmolLM2's own, from its GGUF file.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = """
{%- for message in messages %}
    {{- "<|im_start|>" ~ message.role ~ "\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content ~ "<|im_end|>" }}{% endgeneration %}
    {%- else %}
        {{- message.content ~ "<|im_end|>" }}
    {%- endif %}
    {{- "\n" }}
{%- endfor %}"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "the 4\n"},
    {"role": "user", "content": "the 4 é?"},
    {"role": "assistant", "content": "é."},
]


def marked(tokenizer, messages):
    """The text of each run of tokens that the assistant wrote."""
    tokens, mask = chat.encode(tokenizer, messages)
    assert tokens == tokenizer.encode(chat.render(tokenizer, messages))
    assert len(tokens) == len(mask)
    runs, run = [], []
    for token, inside in [*zip(tokens, mask, strict=True), (0, 0)]:
        if inside:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_smollm2_is_rendered_to_the_letter():
    tokenizer = byte_level(chat_template=SMOLLM2)
    assert chat.render(tokenizer, MESSAGES[1:2], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [SMOLLM2, GENERATION], ids=["prefixes", "generation blocks"])
def test_the_mask_is_the_assistants_words_and_its_end_of_turn(template):
    tokenizer = byte_level(chat_template=template)
    assert marked(tokenizer, MESSAGES) == ["the 4\n<|im_end|>", "é.<|im_end|>"]
    assert marked(tokenizer, MESSAGES[:2]) == []


def test_generation_marks_never_reach_the_text():
    tokenizer = byte_level(chat_template=GENERATION)
    plain = GENERATION.replace("endgeneration", "endif").replace("generation", "if true")
    assert chat.render(tokenizer, MESSAGES) == chat.render(
        byte_level(chat_template=plain), MESSAGES
    )


def test_a_turn_without_special_tokens_keeps_its_line_break():
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_level(chat_template=template)
    # " the" is one token, half of it the prompt's space: what overlaps the turn is marked.
    assert marked(tokenizer, MESSAGES) == [" the 4\n\n", "é.\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = SMOLLM2.replace(
        "message['content']", "(message['content'] if loop.last else 'earlier')"
    )
    tokenizer = byte_level(chat_template=template)
    with pytest.raises(ValueError, match=r"use a template with \{% generation %\} blocks"):
        chat.encode(tokenizer, MESSAGES)
    assert "earlier" in chat.render(tokenizer, MESSAGES)


def test_special_token_names_loop_controls_and_json():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ eos_token }}{{ pad_token is defined }}"
    )
    tokenizer = byte_level(chat_template=template)
    rendered = chat.render(tokenizer, [{"role": "user", "content": "<é>'"}] * 2)
    assert rendered == '<|im_start|>{"role": "user", "content": "<é>\'"}<|im_end|>False'


def test_blocks_take_their_line_with_them():
    template = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n"
    tokenizer = byte_level(chat_template=template + "{% endfor %}\n")
    assert chat.render(tokenizer, MESSAGES[:2]) == "Be brief.\nTwo and two?\n"


def test_strftime_now():
    tokenizer = byte_level(chat_template="{{ strftime_now('%Y') }}")
    before = datetime.date.today().year
    rendered = int(chat.render(tokenizer, MESSAGES))
    assert before <= rendered <= datetime.date.today().year


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses this conversation"),
        ("{{ messages[0].content.missing.deeper }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|refuses"),
        ("{{ messages.append(1) }}", "unsafe|refuses"),
        ("{% generation %}", "refuses this conversation"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        chat.render(byte_level(chat_template=template), MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "message 0 should be a dict with 'role' and 'content'"),
        (["hello"], "message 0 should be a dict"),
        ([MESSAGES[0], {"role": "user", "content": "a\ufdd0b"}], "message 1 holds U.FDD0"),
    ],
)
def test_malformed_messages_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        chat.encode(byte_level(chat_template=SMOLLM2), messages)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        chat.render(byte_level(), MESSAGES)


@pytest.mark.slow
def test_the_real_smollm2():
    tokenizer = gguf.load_tokenizer(sources.resolve("smollm2-135m-instruct"))
    assert tokenizer.chat_template == SMOLLM2
    assert marked(tokenizer, MESSAGES) == ["the 4\n<|im_end|>", "é.<|im_end|>"]
