"""Fixtures of the tests that fetch: an empty cache, an isolated pip, a local server."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.servers import Server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no data directory, and a pip that sees only `tmp_path/wheels`."""
    monkeypatch.setenv("JAXDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXDISTILL_DATA", raising=False)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def unreachable(server: Server) -> str:
    """An address where nothing listens (port 1 is never given to anybody)."""
    return re.sub(r":\d+$", ":1", server.address)
