"""Load a tokenizer from a Hugging Face folder, a tokenizer.json or a SentencePiece model."""

import os
import pathlib

import tokenizers

from jaxdistill.data.tokenizers.fast import FastTokenizer
from jaxdistill.data.tokenizers.files import read_settings
from jaxdistill.data.tokenizers.interface import Tokenizer
from jaxdistill.data.tokenizers.sentencepiece import SentencePieceTokenizer

_SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model")


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.

    Args:
      path: a folder with tokenizer.json (preferred), tokenizer.model or spiece.model, or one such
        file; tokenizer_config.json, special_tokens_map.json and chat_template.jinja beside it
        give the special tokens and the chat template.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a file that is not what its name says, or files that do not belong together.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _vocabulary_in(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such tokenizer file")
    return _load_json(path) if path.suffix == ".json" else _load_sentencepiece(path)


def _vocabulary_in(directory: pathlib.Path) -> pathlib.Path:
    names = ("tokenizer.json", *_SENTENCEPIECE_NAMES)
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise FileNotFoundError(
        f"{directory}: expected one of {', '.join(names)} in this folder and found none; copy the "
        "tokenizer's files there"
    )


def _load_json(path: pathlib.Path) -> FastTokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path}: this is not a tokenizer.json ({error})") from error
    # Padding and truncation are the data pipeline's business.
    backend.no_padding()
    backend.no_truncation()
    return FastTokenizer(backend, **read_settings(path.parent, backend.token_to_id))


def _load_sentencepiece(path: pathlib.Path) -> SentencePieceTokenizer:
    try:
        plain = SentencePieceTokenizer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    settings = read_settings(path.parent, plain.special_tokens.get)
    return SentencePieceTokenizer(path.read_bytes(), chat_template=settings["chat_template"])
