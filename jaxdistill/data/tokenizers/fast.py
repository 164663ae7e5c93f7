"""A tokenizer held by the `tokenizers` library: tokenizer.json, GGUF and llama2.c vocabularies."""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

import tokenizers

from jaxdistill.data.tokenizers.files import check_ids, settings_of, write_json, write_text
from jaxdistill.data.tokenizers.interface import fingerprint_of


class FastTokenizer:
    """Wraps a `tokenizers.Tokenizer` with what it does not know: special ids and the template.

    Args:
      backend: the tokenizer; not changed.
      bos_id, eos_id, pad_id: ids of the special tokens, None where there is none.
      chat_template: jinja2 source, None where there is none.

    Raises:
      ValueError: a special id is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.chat_template = chat_template
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id
            for token_id, token in sorted(backend.get_added_tokens_decoder().items())
            if token.special
        }
        check_ids({"bos": bos_id, "eos": eos_id, "pad": pad_id}, self.vocab_size)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """The ids of a text; special tokens written in it are recognised.

        Raises:
          ValueError: `add_bos` and there is no such token.
        """
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos was asked for but this tokenizer has no bos token")
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and, for each, the [start, end) characters it stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some ids; special tokens are written out unless they are to be skipped."""
        ids = [int(token_id) for token_id in ids]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the whole definition: vocabulary, rules, special ids, template."""
        return fingerprint_of(
            {
                "tokenizer": self._backend.to_str(),
                "ids": [self.bos_id, self.eos_id, self.pad_id],
                "chat_template": self.chat_template,
            }
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        special, settings = settings_of(self)
        write_text(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        write_json(directory / "special_tokens_map.json", special)
        write_json(
            directory / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **settings},
        )
