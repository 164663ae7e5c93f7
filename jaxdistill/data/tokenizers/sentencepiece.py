"""A tokenizer held by the `sentencepiece` library: `.model` files."""

import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import sentencepiece
from sentencepiece import sentencepiece_pb2

from jaxdistill.data.tokenizers.files import (
    check_ids,
    replace_file,
    settings_of,
    write_json,
)
from jaxdistill.data.tokenizers.interface import fingerprint_of

# protobuf makes its classes at import time, where no type checker sees them.
_MESSAGE = getattr(sentencepiece_pb2, "SentencePieceText")  # noqa: B009


class SentencePieceTokenizer:
    """Wraps a SentencePiece model and recognises its control pieces inside a text.

    Args:
      model: the bytes of a `.model` file.
      chat_template: jinja2 source, None where there is none.

    Raises:
      ValueError: the bytes are no SentencePiece model.
    """

    def __init__(self, model: bytes, *, chat_template: str | None = None) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(
                "these bytes are not a SentencePiece model; fetch the .model file again"
            ) from error
        self._model = model
        processor = self._processor
        self.vocab_size: int = processor.vocab_size()
        # SentencePiece says -1 where we say None.
        ids = (processor.bos_id(), processor.eos_id(), processor.pad_id())
        self.bos_id, self.eos_id, self.pad_id = (None if i < 0 else i for i in ids)
        self.chat_template = chat_template
        self.special_tokens: Mapping[str, int] = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i)
        }
        check_ids({"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}, self.vocab_size)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """The ids of a text; control pieces written in it are recognised.

        Raises:
          ValueError: `add_bos` and there is no such token.
        """
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos was asked for but this tokenizer has no bos token")
        start = [self.bos_id] if add_bos and self.bos_id is not None else []
        return start + self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and, for each, the [start, end) characters it stands for."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for match in self._control.finditer(text):
            self._encode_plain(text[position : match.start()], position, ids, offsets)
            ids.append(self.special_tokens[match.group()])
            offsets.append(match.span())
            position = match.end()
        self._encode_plain(text[position:], position, ids, offsets)
        return ids, offsets

    def _encode_plain(
        self, text: str, position: int, ids: list[int], offsets: list[tuple[int, int]]
    ) -> None:
        if not text:
            return
        serialized = self._processor.encode(text, out_type="serialized_proto")
        message = _MESSAGE.FromString(serialized)
        encoded = text.encode()
        for piece in message.pieces:
            # SentencePiece counts bytes; a byte-fallback piece may end inside a character.
            begin, end = (
                len(encoded[:byte].decode(errors="ignore")) for byte in (piece.begin, piece.end)
            )
            ids.append(piece.id)
            offsets.append((position + begin, position + end))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some ids; control pieces are written out unless they are to be skipped."""
        texts = {token_id: text for text, token_id in self.special_tokens.items()}
        parts: list[str] = []
        plain: list[int] = []
        for token_id in [*(int(i) for i in ids), None]:
            if token_id is not None and token_id not in texts:
                plain.append(token_id)
                continue
            parts.append(self._processor.decode(plain))
            plain = []
            if token_id is not None and not skip_special_tokens:
                parts.append(texts[token_id])
        return "".join(parts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's bytes and the template."""
        return fingerprint_of({"model": self._model.hex(), "chat_template": self.chat_template})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.model, tokenizer_config.json and special_tokens_map.json."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        special, settings = settings_of(self)
        replace_file(directory / "tokenizer.model", lambda file: file.write(self._model))
        write_json(directory / "special_tokens_map.json", special)
        write_json(
            directory / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **settings}
        )
