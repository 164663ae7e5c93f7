"""Files of the hub, against a local server."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.data import fetch, hub
from tests.data.servers import Server, files_under, send

pytestmark = pytest.mark.usefixtures("cache")

CONTENT = b"Call me Ishmael.\n" * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WRONG = CONTENT.replace(b"Ishmael", b"Ismael!", 1)
ADDRESS = "/owner/model/resolve/v1/model.safetensors"


@pytest.fixture
def hub_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    return server


def fetch_model() -> Path:
    return hub.fetch_hub("owner/model", "model.safetensors", "v1")


def test_hub_large_file_is_verified_through_the_redirect(hub_server: Server, cache: Path) -> None:
    hub_server.answers[ADDRESS] = send(
        b"", status=302, Location="/store/1", X_Linked_ETag=f'"{DIGEST}"', ETag='"not-this"'
    )
    hub_server.answers["/store/1"] = send(CONTENT, ETag='"nor-this"')
    path = fetch_model()
    assert path.read_bytes() == CONTENT
    assert files_under(cache) == ["model.safetensors", "model.safetensors.digest"]
    assert fetch_model() == path
    assert hub_server.asked == [ADDRESS, "/store/1"]  # the second call asked nothing


def test_hub_small_file_is_verified_by_its_git_blob_id(hub_server: Server) -> None:
    # `printf 'what is up, doc?' | git hash-object --stdin`, from the Git book.
    blob = "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    hub_server.answers[ADDRESS] = send(b"what is up, doc?", ETag=f'W/"{blob}"')
    assert fetch_model().read_bytes() == b"what is up, doc?"


@pytest.mark.parametrize("header", ["X_Linked_ETag", "ETag"])
def test_hub_file_with_another_digest_is_refused(
    hub_server: Server, cache: Path, header: str
) -> None:
    headers: dict[str, Any] = {header: f'"{DIGEST}"'}
    hub_server.answers[ADDRESS] = send(WRONG, **headers)
    with pytest.raises(fetch.IntegrityError) as error:
        fetch_model()
    assert DIGEST in str(error.value)
    assert hashlib.sha256(WRONG).hexdigest() in str(error.value)
    assert files_under(cache) == []


@pytest.mark.parametrize("headers", [{}, {"ETag": '"short"'}])
def test_hub_file_without_a_digest_is_refused(
    hub_server: Server, cache: Path, headers: dict[str, Any]
) -> None:
    hub_server.answers[ADDRESS] = send(CONTENT, **headers)
    with pytest.raises(fetch.IntegrityError, match="declares no digest"):
        fetch_model()
    assert files_under(cache) == []


def test_hub_digest_of_another_host_is_not_believed(hub_server: Server, cache: Path) -> None:
    port = hub_server.http.server_address[1]
    store = f"http://localhost:{port}/store/1"
    hub_server.answers[ADDRESS] = send(b"", status=302, Location=store)
    hub_server.answers["/store/1"] = send(CONTENT, ETag=f'"{DIGEST}"')
    with pytest.raises(fetch.IntegrityError, match="declares no digest"):
        fetch_model()
    assert files_under(cache) == []


def test_hub_truncated_file_is_refused(hub_server: Server, cache: Path) -> None:
    hub_server.answers[ADDRESS] = send(
        CONTENT[:5000], declared=len(CONTENT), X_Linked_ETag=f'"{DIGEST}"'
    )
    with pytest.raises(fetch.UnavailableError, match=r"5000|IncompleteRead"):
        fetch_model()
    assert files_under(cache) == []


def test_hub_missing_file_is_named(hub_server: Server) -> None:
    with pytest.raises(fetch.UnavailableError, match=r"v1/model.safetensors: HTTP Error 404"):
        fetch_model()


def test_unreachable_hub_names_the_setting(
    unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", unreachable)
    with pytest.raises(fetch.UnavailableError, match="HF_ENDPOINT"):
        fetch_model()


def test_corrupt_cached_hub_file_is_fetched_again(hub_server: Server) -> None:
    hub_server.answers[ADDRESS] = send(CONTENT, X_Linked_ETag=f'"{DIGEST}"')
    fetch_model().write_bytes(WRONG)
    assert fetch_model().read_bytes() == CONTENT
    assert hub_server.asked == [ADDRESS, ADDRESS]


@pytest.mark.parametrize(
    ("repo", "filename", "revision"),
    [
        ("model", "model.safetensors", "v1"),
        ("../model", "model.safetensors", "v1"),
        ("owner/model", "../../model.safetensors", "v1"),
        ("owner/model", "/etc/model.safetensors", "v1"),
        ("owner/model", "model.safetensors", "../v1"),
        ("owner/model", "model.safetensors", ""),
    ],
)
def test_hub_names_cannot_leave_the_cache(repo: str, filename: str, revision: str) -> None:
    with pytest.raises(ValueError, match="hub"):
        hub.fetch_hub(repo, filename, revision)
