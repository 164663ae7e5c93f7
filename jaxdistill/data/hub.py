"""Files of the Hugging Face hub, verified against the digest that the hub declares."""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import IO

from jaxdistill.data import fetch

DEFAULT_ENDPOINT = "https://huggingface.co"


def fetch_hub(repo: str, filename: str, revision: str) -> Path:
    """Download one file of a hub repository into the cache and return its path.

    The hub declares the digest of every file: sha256 for large files, the git blob id for small
    ones. A cached file is verified again and returned without asking the hub, so give a commit as
    the revision: a branch stays at what it was when it was first fetched.

    Args:
      repo: `owner/name`.
      filename: path inside the repository, such as "model.safetensors".
      revision: commit, tag or branch.
    Raises: fetch.UnavailableError if the hub cannot be reached or has no such file;
      fetch.IntegrityError if the bytes are not those declared, or no digest is declared.
    """
    _check_names(repo, filename, revision)
    cached = fetch.cache_directory() / "hub" / repo / revision / filename
    record = cached.with_name(cached.name + ".digest")
    if cached.is_file() and record.is_file() and digest_matches(cached, record.read_text()):
        return cached
    with fetch.staging(cached) as directory:
        staged, staged_record = directory / cached.name, directory / record.name
        declared = _download(_address(repo, filename, revision), staged, filename)
        if not digest_matches(staged, declared):
            raise fetch.IntegrityError(
                f"{filename} of {repo} at {revision}: the hub declares {declared}, but the file of "
                f"{staged.stat().st_size} bytes that came has sha256 {fetch.sha256_of(staged)}; "
                "it was refused: try again"
            )
        staged_record.write_text(declared)
        os.replace(staged_record, record)
        os.replace(staged, cached)
    return cached


def digest_matches(path: Path, digest: str) -> bool:
    """Whether a file has the digest: 64 digits are a sha256, 40 the id of a git blob."""
    if len(digest) == 64:
        return fetch.sha256_of(path) == digest
    # A git blob id is the sha1 of this header and the content.
    blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(fetch.CHUNK_BYTES):
            blob.update(chunk)
    return blob.hexdigest() == digest


def _check_names(repo: str, filename: str, revision: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"a hub repository is named 'owner/name', got {repo!r}")
    for part in (repo, filename, revision):
        if not part or ".." in part or PurePosixPath(part).is_absolute() or "\\" in part:
            raise ValueError(f"{part!r} cannot name a repository, file or revision of the hub")


def _address(repo: str, filename: str, revision: str) -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    revision, filename = urllib.parse.quote(revision, safe=""), urllib.parse.quote(filename)
    return f"{endpoint}/{repo}/resolve/{revision}/{filename}"


def _download(address: str, destination: Path, label: str) -> str:
    """Download to `destination` and return the digest that the hub declared."""
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
        with opener.open(address, timeout=fetch.TIMEOUT_SECONDS) as response:
            declared = redirects.linked_etag or response.headers.get("X-Linked-ETag")
            if declared is None and _same_host(address, response.url):
                declared = response.headers.get("ETag")  # elsewhere it is the store's own
            digest = (declared or "").removeprefix("W/").strip('"')
            if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", digest):
                raise fetch.IntegrityError(
                    f"{address} declares no digest (found {declared!r}), so its bytes cannot be "
                    "verified; check HF_ENDPOINT"
                )
            fetch.save_response(response, destination, label)
    except (OSError, http.client.HTTPException) as error:
        raise fetch.UnavailableError(
            f"{address}: {error}; check the names, the network and HF_ENDPOINT"
        ) from error
    return digest


def _same_host(first: str, second: str) -> bool:
    return urllib.parse.urlsplit(first).netloc == urllib.parse.urlsplit(second).netloc


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps X-Linked-ETag, which only the hub's own answer carries."""

    linked_etag: str | None = None

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        self.linked_etag = self.linked_etag or headers.get("X-Linked-ETag")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
