"""Records: text documents and JSONL read strictly, and splits that no duplicate straddles."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath


class Records(NamedTuple):
    """The records of a JSONL file, and one message (file, line, reason) for each skipped line."""

    records: list[dict[str, Any]]
    skipped: list[str]


def read_documents(
    path: epath.PathLike, *, separator: str = "line", encoding: str = "utf-8"
) -> list[str]:
    """Read the text documents of a file.

    Args:
      path: the file.
      separator: "line" (one document a line) or "blank_line" (documents hold line breaks).
      encoding: of the file, any that extends ASCII; a UTF-8 byte-order mark is ignored.
    Returns: the documents, stripped of white space at both ends; empty ones are left out.
    Raises: ValueError if the file holds no document, or names the line with bytes of another
      encoding.
    """
    lines = [text for _, text in _read_lines(path, encoding)]
    if separator == "line":
        documents = lines
    elif separator == "blank_line":
        documents = re.split(r"\n(?:[^\S\n]*\n)+", "\n".join(lines))
    else:
        raise ValueError(f"separator must be 'line' or 'blank_line', got {separator!r}")
    documents = [stripped for document in documents if (stripped := document.strip())]
    if not documents:
        raise ValueError(f"{path}: expected at least one document, found none")
    return documents


def read_jsonl(
    path: epath.PathLike, *, fields: Sequence[str] = (), skip_malformed: bool = False
) -> Records:
    """Read a file with one JSON object a line; blank lines count for nothing.

    Args:
      path: the file, UTF-8.
      fields: names that every record must have.
      skip_malformed: leave malformed lines out and report them, instead of raising.
    Returns: the records, and the message of every skipped line.
    Raises: ValueError with the file, line and reason of the first malformed line, or if the file
      holds no record.
    """
    records, skipped = [], []
    for number, line in _read_lines(path, "utf-8", errors="surrogateescape"):
        if not line.strip():
            continue
        try:
            records.append(_parse(line, fields))
        except ValueError as error:
            message = f"{path}:{number}: {error}"
            if not skip_malformed:
                raise ValueError(f"{message}; mend it, or pass skip_malformed=True") from error
            skipped.append(message)
    if not records:
        raise ValueError(
            f"{path}: expected at least one record, found none ({len(skipped)} lines skipped)"
        )
    return Records(records, skipped)


def _read_lines(
    path: epath.PathLike, encoding: str, *, errors: str = "strict"
) -> Iterator[tuple[int, str]]:
    """Numbered lines split at \\n alone: str.splitlines also splits inside a document."""
    content = epath.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode(encoding, errors=errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: expected {encoding} text, found the byte "
                f"0x{line[error.start]:02x} at column {error.start + 1}; give the file's encoding"
            ) from error
        yield number, text.removesuffix("\r")


def _parse(line: str, fields: Sequence[str]) -> dict[str, Any]:
    if not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line):
        raise ValueError("expected utf-8 text, found bytes of another encoding")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected one JSON object, {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected one JSON object, found a {type(record).__name__}")
    if missing := [field for field in fields if field not in record]:
        raise ValueError(f"expected the fields {list(fields)}, {missing} missing")
    return record


def split_documents(
    documents: Sequence[str], held_out: int | float, *, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split documents into a training and a held-out part that share no text.

    Documents equal but for case and white space stay together. Which are held out depends only on
    their text and the seed, not on their order.

    Args:
      documents: the documents.
      held_out: how many to hold out (int), or which fraction of them (float in (0, 1)); duplicates
        of the last one held out come on top.
      seed: chooses another split.
    Returns: (training, held_out), each in the order given.
    Raises: ValueError if either part would be empty.

    >>> split_documents(["one", "two", "One ", "three"], 1)
    (['one', 'two', 'One '], ['three'])
    """
    count = held_out if isinstance(held_out, int) else round(held_out * len(documents))
    keys = [_content_key(document, seed) for document in documents]
    chosen = set(sorted(keys)[: max(count, 0)])
    parts = [], []  # type: tuple[list[str], list[str]]
    for document, key in zip(documents, keys, strict=True):
        parts[key in chosen].append(document)
    if not parts[0] or not parts[1]:
        raise ValueError(
            f"holding out {held_out} of {len(documents)} documents leaves {len(parts[0])} to train "
            f"on and {len(parts[1])} held out; both parts need at least one"
        )
    return parts


def _content_key(document: str, seed: int) -> str:
    text = " ".join(document.split()).casefold()
    return hashlib.sha256(f"{seed}\0{text}".encode(errors="surrogatepass")).hexdigest()
