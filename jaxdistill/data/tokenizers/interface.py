"""What the rest of the project knows about a tokenizer."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxdistill.models.config import DecoderConfig


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    `fingerprint` is a sha256 over everything that decides the ids: two tokenizers with the same
    fingerprint encode every text alike, in every process.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text or a turn, if there is one."""

    @property
    def pad_id(self) -> int | None:
        """The token that fills a batch, if there is one."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text; they are recognised inside a text."""

    @property
    def chat_template(self) -> str | None:
        """The jinja2 template that turns messages into text, if there is one."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what defines the tokenizer, in hexadecimal."""

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """The ids of a text; nothing is added unless `add_bos`."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and, for each, the [start, end) characters it stands for."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some ids."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files Hugging Face's `AutoTokenizer.from_pretrained(directory)` reads."""


def check_vocabulary(tokenizer: Tokenizer, config: DecoderConfig) -> None:
    """Refuse a tokenizer that cannot belong to a model.

    A model may have up to 1% more rows than the tokenizer has tokens (publishers round up);
    it can never have fewer.

    Raises:
      ValueError: the vocabularies differ by more than that.
    """
    tokens, rows = tokenizer.vocab_size, config.vocab_size
    if tokens <= rows <= 1.01 * tokens:
        return
    raise ValueError(
        f"the tokenizer has {tokens:,} tokens but the model's vocabulary is {rows:,}: this is not "
        "the model's tokenizer; use the one published with the model"
    )


def text_of(token_id: int | None, special_tokens: Mapping[str, int]) -> str | None:
    """The text of a control token; None where there is none."""
    return next((text for text, known in special_tokens.items() if known == token_id), None)


def fingerprint_of(definition: Mapping[str, Any]) -> str:
    """sha256 of a JSON-able definition, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
