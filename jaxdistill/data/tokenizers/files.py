"""Tokenizer files: writing them whole, and the settings that stand beside a vocabulary."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

from jaxdistill.data.tokenizers.interface import Tokenizer, text_of


def replace_file(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name beside it, then put it in place in one step.

    A process that dies half-way leaves the old file, or none, never half a file.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        # mkstemp makes files private to the user; give them the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is no file.

    Raises:
      ValueError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def check_ids(ids: Mapping[str, int | None], vocab_size: int) -> None:
    """Refuse a special id outside the vocabulary."""
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise ValueError(
                f"the {name} token has id {token_id} but the tokenizer has {vocab_size} tokens; "
                "the tokenizer's files do not belong together"
            )


def settings_of(tokenizer: Tokenizer) -> tuple[dict[str, str], dict[str, Any]]:
    """What special_tokens_map.json and tokenizer_config.json say about a tokenizer."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
    }
    texts = {name: text_of(token_id, tokenizer.special_tokens) for name, token_id in ids.items()}
    special = {name: text for name, text in texts.items() if text is not None}
    settings: dict[str, Any] = {**special, "clean_up_tokenization_spaces": False}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return special, settings


def read_settings(directory: pathlib.Path, id_of: Callable[[str], int | None]) -> dict[str, Any]:
    """The special ids and the chat template beside a vocabulary, as keyword arguments.

    Args:
      directory: the folder with tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja, each of which may be absent.
      id_of: token text -> id, None where the vocabulary has no such token.

    Raises:
      ValueError: a special token is not in the vocabulary; a file is not JSON.
    """
    config = read_json(directory / "tokenizer_config.json")
    special = read_json(directory / "special_tokens_map.json") | config
    found: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        token = special.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            continue
        if (token_id := id_of(text)) is None:
            raise ValueError(
                f"{directory}: the {name} token {text!r} is not in the vocabulary; "
                "the tokenizer's files do not belong together"
            )
        found[f"{name}_id"] = token_id
    template_file = directory / "chat_template.jinja"
    if template_file.exists():
        template: Any = template_file.read_text(encoding="utf-8")
    else:
        template = config.get("chat_template")
    found["chat_template"] = _default_template(template)
    return found


def _default_template(template: Any) -> str | None:
    """Older configs list several named templates; "default" is the one for plain chats."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
