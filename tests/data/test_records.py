"""Reading records strictly, and splits that no duplicate straddles."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.data.records import read_documents, read_jsonl, split_documents


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "records"


def test_documents_one_a_line(file: Path) -> None:
    # Python's splitlines would end lines at these three; they stand inside real documents.
    file.write_bytes("\ufeff one \r\n\n  \ntwo\u2028still\x0ctwo\rand\nthree".encode())
    assert read_documents(file) == ["one", "two\u2028still\x0ctwo\rand", "three"]


def test_documents_separated_by_blank_lines(file: Path) -> None:
    file.write_text("\n\none\n  more one\n \t\n\n\ntwo\r\n\r\nthree\n")
    documents = read_documents(file, separator="blank_line")
    assert documents == ["one\n  more one", "two", "three"]


def test_documents_of_another_encoding_name_file_and_line(file: Path) -> None:
    file.write_bytes(b"one\nit costs \xa33\n")
    with pytest.raises(ValueError, match=r"records:2: expected utf-8 text, .* 0xa3 at column 10"):
        read_documents(file)
    assert read_documents(file, encoding="latin-1") == ["one", "it costs \xa33"]


@pytest.mark.parametrize("separator", ["line", "blank_line"])
def test_file_without_documents_is_an_error(file: Path, separator: str) -> None:
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"records: expected at least one document"):
        read_documents(file, separator=separator)


def test_unknown_separator_is_an_error(file: Path) -> None:
    file.write_text("one")
    with pytest.raises(ValueError, match=r"'line' or 'blank_line', got 'comma'"):
        read_documents(file, separator="comma")


def test_jsonl_round_trip(file: Path) -> None:
    records = [{"text": "one\nand \u2028 more"}, {"text": "\xa33", "number": 1}]
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    assert read_jsonl(file, fields=["text"]) == (records, [])


MALFORMED = [
    (b'{"text": "cut', r"Unterminated string"),
    (b'["text"]', r"found a list"),
    (b'{"other": 1}', r"expected the fields \['text'\], \['text'\] missing"),
    (b'{"text": "\xa33"}', r"bytes of another encoding"),
    (b"plain", r"Expecting value"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_malformed_line_is_an_error_with_file_and_line(
    file: Path, line: bytes, reason: str
) -> None:
    file.write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"records:3: .*{reason}.*skip_malformed=True"):
        read_jsonl(file, fields=["text"])


def test_malformed_lines_are_skipped_and_reported_on_request(file: Path) -> None:
    lines = [line for line, _ in MALFORMED]
    file.write_bytes(b"\n".join([*lines, b'{"text": "one"}']))
    records, skipped = read_jsonl(file, fields=["text"], skip_malformed=True)
    assert records == [{"text": "one"}]
    assert [message.split(": ")[0] for message in skipped] == [
        f"{file}:{number}" for number in range(1, len(lines) + 1)
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"plain\n"])
def test_file_without_records_is_an_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    skipped = int(content == b"plain\n")
    with pytest.raises(ValueError, match=rf"at least one record, found none \({skipped} lines"):
        read_jsonl(file, skip_malformed=True)


DOCUMENTS = st.lists(st.text("aAb ", min_size=1, max_size=4), min_size=1, max_size=20)


def plain(document: str) -> str:
    return " ".join(document.split()).casefold()


@settings(deadline=None)
@given(DOCUMENTS, st.integers(1, 10), st.integers(0, 3))
def test_split_keeps_every_document_and_no_duplicate_straddles(
    documents: list[str], count: int, seed: int
) -> None:
    copies = Counter(map(plain, documents))
    try:
        training, held_out = split_documents(documents, count, seed=seed)
    except ValueError:  # nothing is left to train on: only the last group was short of `count`
        assert count > len(documents) - max(copies.values())
        return
    assert sorted(training + held_out) == sorted(documents)
    assert count <= len(held_out) < count + max(copies.values())
    assert set(map(plain, training)).isdisjoint(map(plain, held_out))


def test_split_depends_on_text_and_seed_alone() -> None:
    documents = [f"document {number}" for number in range(100)]
    _, held_out = split_documents(documents, 0.2)
    _, of_reversed = split_documents(documents[::-1], 0.2)
    _, of_other_seed = split_documents(documents, 0.2, seed=1)
    assert len(held_out) == len(of_other_seed) == 20
    assert of_reversed == held_out[::-1]
    assert set(of_other_seed) != set(held_out)


@pytest.mark.parametrize("held_out", [0, 2, -1, 0.001])
def test_split_with_an_empty_part_is_an_error(held_out: float) -> None:
    with pytest.raises(ValueError, match=f"holding out {held_out} of 2 documents"):
        split_documents(["one", "two"], held_out)
