"""Named sources, against archives, wheels and servers made by the test itself."""

import gzip
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from jaxdistill.data import fetch, sources
from jaxdistill.data.registry import SOURCES, Source, Wheel
from tests.data.servers import Server, files_under, send

pytestmark = pytest.mark.usefixtures("cache")

CONTENT = b"Call me Ishmael.\n" * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WRONG = CONTENT.replace(b"Ishmael", b"Ismael!", 1)
PLAIN = Source("tiny", "a tiny text", "CC0-1.0", DIGEST, "texts/tiny.txt")
IN_TAR = replace(PLAIN, archive="tiny.tar.gz")
IN_WHEEL = replace(PLAIN, wheel=Wheel("tiny-texts==1.0", "tiny_texts/tiny.txt", 1000))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    monkeypatch.setenv("JAXDISTILL_DATA", str(directory))
    return directory


def write_tar(path: Path, content: bytes = CONTENT, member: str = "texts/tiny.txt") -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        header = tarfile.TarInfo(member)
        header.size = len(content)
        archive.addfile(header, io.BytesIO(content))


def write_wheel(directory: Path, content: bytes = CONTENT, tag: str = "py3-none-any") -> None:
    files = {
        "tiny_texts/tiny.txt": content,
        "tiny_texts-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-texts\n"
        b"Version: 1.0\nRequires-Dist: a-package-that-does-not-exist\n",
        "tiny_texts-1.0.dist-info/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n".encode(),
        "tiny_texts-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(directory / f"tiny_texts-1.0-{tag}.whl", "w") as wheel:
        for name, body in files.items():
            wheel.writestr(name, body)


# The data directory.


def test_unpacked_file_of_the_data_directory_is_used_in_place(data: Path, cache: Path) -> None:
    (data / "texts").mkdir()
    (data / "texts/tiny.txt").write_bytes(CONTENT)
    assert sources.resolve_source(IN_TAR) == data / "texts/tiny.txt"
    assert not cache.exists()


@pytest.mark.parametrize("archive", ["tiny.tar.gz", "tiny.tar", "tiny.zip", "tiny.txt.gz"])
def test_archives_of_the_data_directory_are_unpacked(data: Path, cache: Path, archive: str) -> None:
    if archive.endswith(".zip"):
        with zipfile.ZipFile(data / archive, "w") as file:
            file.writestr("texts/tiny.txt", CONTENT)
    elif archive.endswith(".txt.gz"):
        (data / archive).write_bytes(gzip.compress(CONTENT))
    else:
        write_tar(data / archive)
    path = sources.resolve_source(replace(PLAIN, archive=archive))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert files_under(cache) == ["tiny.txt"]


@pytest.mark.parametrize("unpacked", [True, False])
def test_wrong_hash_is_refused_with_both_digests(data: Path, cache: Path, unpacked: bool) -> None:
    if unpacked:
        (data / "texts").mkdir()
        (data / "texts/tiny.txt").write_bytes(WRONG)
    else:
        write_tar(data / "tiny.tar.gz", WRONG)
    with pytest.raises(fetch.IntegrityError) as error:
        sources.resolve_source(IN_TAR)
    assert DIGEST in str(error.value)
    assert hashlib.sha256(WRONG).hexdigest() in str(error.value)
    assert files_under(cache) == []


@pytest.mark.parametrize("archive", ["tiny.tar.gz", "tiny.tar", "tiny.zip", "tiny.txt.gz"])
def test_truncated_archive_is_refused(data: Path, cache: Path, archive: str) -> None:
    test_archives_of_the_data_directory_are_unpacked(data, cache, archive)
    (cache / "sources/tiny/tiny.txt").unlink()
    whole = (data / archive).read_bytes()
    (data / archive).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(fetch.IntegrityError, match=f"{archive} is damaged"):
        sources.resolve_source(replace(PLAIN, archive=archive))
    assert files_under(cache) == []


# The PyPI wheel.


def test_wheel_is_downloaded_by_pip_without_its_requirements(tmp_path: Path, cache: Path) -> None:
    write_wheel(tmp_path / "wheels")
    assert sources.resolve_source(IN_WHEEL).read_bytes() == CONTENT
    assert files_under(cache) == ["tiny.txt"]


def test_wheel_of_another_platform_is_taken_by_its_tags(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", tag="cp39-cp39-win_arm64")
    tags = {"platform": "win_arm64", "python-version": "3.9", "implementation": "cp"}
    source = replace(IN_WHEEL, wheel=Wheel("tiny-texts==1.0", "tiny_texts/tiny.txt", 1000, tags))
    assert sources.resolve_source(source).read_bytes() == CONTENT


def test_wheel_with_another_member_content_is_refused(tmp_path: Path, cache: Path) -> None:
    write_wheel(tmp_path / "wheels", WRONG)
    with pytest.raises(fetch.IntegrityError, match=DIGEST):
        sources.resolve_source(IN_WHEEL)
    assert files_under(cache) == []


# The upstream URL.


def test_url_is_the_last_place(server: Server, cache: Path) -> None:
    server.answers["/tiny.txt"] = send(CONTENT)
    path = sources.resolve_source(replace(PLAIN, url=f"{server.address}/tiny.txt"))
    assert path.read_bytes() == CONTENT
    assert files_under(cache) == ["tiny.txt"]


def test_url_with_other_content_is_refused(server: Server, cache: Path) -> None:
    server.answers["/tiny.txt"] = send(WRONG)
    with pytest.raises(fetch.IntegrityError, match=DIGEST):
        sources.resolve_source(replace(PLAIN, url=f"{server.address}/tiny.txt"))
    assert files_under(cache) == []


def test_truncated_url_is_refused(server: Server, cache: Path) -> None:
    server.answers["/tiny.txt"] = send(CONTENT[:5000], declared=len(CONTENT))
    with pytest.raises(sources.SourceNotFoundError, match=r"5000|IncompleteRead"):
        sources.resolve_source(replace(PLAIN, url=f"{server.address}/tiny.txt"))
    assert files_under(cache) == []


# All places, and the cache.


def test_missing_source_names_all_places_and_what_to_do(
    data: Path, server: Server, cache: Path
) -> None:
    url = f"{server.address}/absent.txt"
    source = replace(IN_WHEEL, archive="tiny.tar.gz", url=url)
    with pytest.raises(sources.SourceNotFoundError) as error:
        sources.resolve_source(source)
    message = str(error.value)
    assert f"the data directory: {data} (JAXDISTILL_DATA) has no texts/tiny.txt or" in message
    assert re.search(r"a PyPI wheel: ERROR: .*No matching distribution .*tiny-texts==1.0", message)
    assert f"an upstream URL: {url}: HTTP Error 404: Not Found" in message
    assert "To have it, set JAXDISTILL_DATA to a directory that has tiny.tar.gz" in message
    assert "pip download --no-deps tiny-texts==1.0" in message
    assert isinstance(error.value, FileNotFoundError)
    assert files_under(cache) == []


def test_missing_source_without_places_says_so() -> None:
    with pytest.raises(sources.SourceNotFoundError) as error:
        sources.resolve_source(PLAIN)
    for reason in ("JAXDISTILL_DATA is not set", "no wheel is known", "no URL is known"):
        assert reason in str(error.value)


def test_unreachable_server_is_a_reason(unreachable: str) -> None:
    with pytest.raises(sources.SourceNotFoundError, match="refused"):
        sources.resolve_source(replace(PLAIN, url=f"{unreachable}/tiny.txt"))


def test_cached_file_is_used_without_any_place(data: Path) -> None:
    write_tar(data / "tiny.tar.gz")
    first = sources.resolve_source(IN_TAR)
    (data / "tiny.tar.gz").unlink()
    assert sources.resolve_source(IN_TAR) == first


def test_corrupt_cached_file_is_fetched_again(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(data / "tiny.tar.gz")
    path = sources.resolve_source(IN_TAR)
    stamp = path.stat()
    path.write_bytes(WRONG)  # same size and time: only the hash tells
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert sources.resolve_source(IN_TAR).read_bytes() == CONTENT
    assert "corrupt" in caplog.text


def test_corrupt_cached_file_that_cannot_be_fetched_is_removed(data: Path, cache: Path) -> None:
    write_tar(data / "tiny.tar.gz")
    sources.resolve_source(IN_TAR).write_bytes(WRONG)
    (data / "tiny.tar.gz").unlink()
    with pytest.raises(sources.SourceNotFoundError):
        sources.resolve_source(IN_TAR)
    assert files_under(cache) == []


def test_unwritable_cache_names_the_setting(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(data / "tiny.tar.gz")
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("JAXDISTILL_CACHE", str(tmp_path / "a_file"))
    with pytest.raises(PermissionError, match="set JAXDISTILL_CACHE"):
        sources.resolve_source(IN_TAR)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXDISTILL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert fetch.cache_directory() == Path("/a")
    monkeypatch.delenv("JAXDISTILL_CACHE")
    assert fetch.cache_directory() == Path("/b/jaxdistill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_directory() == Path("/c/.cache/jaxdistill")


CHILD = """
import sys
from jaxdistill.data import sources
from jaxdistill.data.registry import Source
digest, archive, url = sys.argv[1:]
source = Source("tiny", "a tiny text", "CC0-1.0", digest, "texts/tiny.txt", archive, url=url)
print(sources.resolve_source(source))
"""


def start_child(archive: str = "", url: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, DIGEST, archive, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_resolve_at_once_all_get_the_file(data: Path, cache: Path) -> None:
    write_tar(data / "tiny.tar.gz")
    corrupt = cache / "sources/tiny/tiny.txt"
    corrupt.parent.mkdir(parents=True)
    corrupt.write_bytes(WRONG)
    children = [start_child(archive="tiny.tar.gz") for _ in range(4)]
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert Path(output.strip()) == corrupt
    assert corrupt.read_bytes() == CONTENT
    assert files_under(cache) == ["tiny.txt"]


def test_killed_download_leaves_no_file_under_the_name(server: Server, cache: Path) -> None:
    half_sent, go_on = threading.Event(), threading.Event()

    def stall(request: http.server.BaseHTTPRequestHandler) -> None:
        send(CONTENT[: len(CONTENT) // 2], declared=len(CONTENT))(request)
        half_sent.set()
        go_on.wait(60)

    server.answers["/tiny.txt"] = stall
    child = start_child(url=f"{server.address}/tiny.txt")
    try:
        assert half_sent.wait(60)
        time.sleep(0.2)
    finally:
        child.kill()
        go_on.set()
        child.communicate(timeout=60)
    assert not (cache / "sources/tiny/tiny.txt").exists()
    server.answers["/tiny.txt"] = send(CONTENT)
    path = sources.resolve_source(replace(PLAIN, url=f"{server.address}/tiny.txt"))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    server: Server, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        fetch, "Console", lambda stderr: Console(file=screen, force_terminal=terminal, width=80)
    )
    server.answers["/tiny.txt"] = send(CONTENT)
    sources.resolve_source(replace(PLAIN, url=f"{server.address}/tiny.txt"))
    assert ("tiny" in screen.getvalue()) == terminal


# The registry.


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'wikitxt2-test'; the nearest is 'wikitext2-test'"):
        sources.resolve("wikitxt2-test")


def test_every_registered_source_is_complete() -> None:
    for name, source in SOURCES.items():
        assert name == source.name
        assert source.description
        assert source.licence
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert source.archive or source.wheel
        if source.wheel:
            assert re.fullmatch(r"[\w-]+==[\w.]+", source.wheel.requirement)
        if source.url:
            assert re.match(
                r"https://raw.githubusercontent.com/[^/]+/[^/]+/[0-9a-f]{40}/", source.url
            )


def test_archived_sources_resolve_from_the_real_data_directory(
    data_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXDISTILL_DATA", str(data_directory))
    for name, source in SOURCES.items():
        if source.archive:
            assert fetch.sha256_of(sources.resolve(name)) == source.sha256


# The real sources.


def eight_grams(document: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", document.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


@pytest.mark.slow
def test_real_sources_resolve_and_lee_is_disjoint(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the user's own pip and data directory
    monkeypatch.setenv("JAXDISTILL_CACHE", str(cache))
    for name in ("smollm2-135m-instruct", "lee-background", "lee-evaluation"):
        assert fetch.sha256_of(sources.resolve(name)) == SOURCES[name].sha256
    background, evaluation = (
        sources.resolve(name).read_text(SOURCES[name].encoding).splitlines()
        for name in ("lee-background", "lee-evaluation")
    )
    assert (len(background), len(set(background))) == (300, 293)
    assert (len(evaluation), len(set(evaluation))) == (50, 50)
    trained = set().union(*map(eight_grams, background))
    assert not any(eight_grams(document) & trained for document in evaluation)
