"""Chat templates: messages to text, and to tokens with a mask of what the assistant wrote.

A template is jinja2 source published with a model, so it runs in a sandbox that can neither reach
Python's internals nor change its arguments. Its surroundings are those transformers gives it.

The mask comes from `{% generation %}` blocks where the template has them. Otherwise each
assistant turn is located by rendering the conversation up to it and up to its end.
"""

import datetime
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from jaxdistill.data.tokenizers import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]

# Unicode noncharacters: never part of text, so they can mark places in it.
_START, _END = "\ufdd0", "\ufdd1"


class ChatTokens(NamedTuple):
    """A conversation as tokens; `assistant_mask[i]` is 1 where the assistant wrote `tokens[i]`."""

    tokens: list[int]
    assistant_mask: list[int]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Write a conversation as the text the model was trained on.

    Args:
      tokenizer: it holds the template and the special tokens' texts.
      messages: dicts with "role" and "content" (and whatever else the template reads).
      add_generation_prompt: end with the start of an assistant turn, for sampling.

    Returns:
      The text; encode it without adding a bos token, the template has written its own.

    Raises:
      ValueError: no template, a malformed message, or the template itself refuses.
    """
    marked = _render(tokenizer, messages, add_generation_prompt)
    return marked.replace(_START, "").replace(_END, "")


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> ChatTokens:
    """Tokenize a conversation and mark what the assistant wrote, its end-of-turn token included.

    The tokens are those of the whole rendered text. A token is marked if any of its characters
    lies in an assistant turn.

    Args:
      tokenizer: it holds the template.
      messages: dicts with "role" and "content".

    Returns:
      ChatTokens(tokens, assistant_mask), two lists of the same length.

    Raises:
      ValueError: as `render`; or the template has no generation blocks and rewrites earlier turns
        as the conversation grows, so the assistant's part cannot be located.
    """
    marked = _render(tokenizer, messages, False)
    if _has_generation_blocks(_template_of(tokenizer)):
        text, spans = _split_marks(marked)
    else:
        text, spans = marked, _spans_by_prefix(tokenizer, messages, marked)
    tokens, offsets = tokenizer.encode_with_offsets(text)
    mask = [int(any(start < b and a < end for a, b in spans)) for start, end in offsets]
    return ChatTokens(tokens, mask)


def _render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The rendered text with the marks of generation blocks still in it."""
    _check_messages(messages)
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
    }
    texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    special = {name: texts[i] for name, i in ids.items() if i is not None and i in texts}
    try:
        return _compile(_template_of(tokenizer)).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _template_of(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template; use a chat model's tokenizer, or encode plain "
            "text instead of messages"
        )
    return tokenizer.chat_template


def _check_messages(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(
                f"message {index} should be a dict with 'role' and 'content', got {message!r}"
            )
        if any(mark in str(message["content"]) for mark in (_START, _END)):
            raise ValueError(
                f"message {index} holds U+FDD0 or U+FDD1, which are not characters of any text; "
                "remove them"
            )


def _split_marks(marked: str) -> tuple[str, list[Span]]:
    """Take the marks out of a text and return where they stood, as [start, end) spans."""
    text, spans = "", []
    for index, piece in enumerate(marked.split(_START)):
        inside, _, after = piece.partition(_END) if index else ("", "", piece)
        spans += [(len(text), len(text) + len(inside))] if index else []
        text += inside + after
    return text, spans


def _spans_by_prefix(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[Span]:
    """Locate assistant turns as what is added between the prompt for a turn and the turn's end."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], True)
        through = _render(tokenizer, messages[: index + 1], False)
        if not (through.startswith(prompt) and text.startswith(through)):
            raise ValueError(
                f"the chat template does not extend its text turn by turn (message {index} is "
                "written differently once others are before or after it), so the assistant's "
                "tokens cannot be located; use a template with {% generation %} blocks"
            )
        spans.append((len(prompt), _end_of_turn(through, tokenizer)))
    return spans


def _end_of_turn(text: str, tokenizer: Tokenizer) -> int:
    """Where the turn ends: after its special token; line breaks that follow are the template's."""
    stripped = text.rstrip()
    closed = any(stripped.endswith(special) for special in tokenizer.special_tokens)
    return len(stripped) if closed else len(text)


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what stands between as the assistant's."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 asks for a plain class attribute

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_START, _END))
        return nodes.Scope([start, *body, end], lineno=line)


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=32)
def _has_generation_blocks(template: str) -> bool:
    tokens = [token[1:] for token in _environment().lex(template) if token[1] != "whitespace"]
    return any(
        before[0] == "block_begin" and token == ("name", "generation")
        for before, token in itertools.pairwise(tokens)
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own tojson escapes HTML, which a prompt must not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
