"""The snapshot of a hub id: what the hub says counts where it says anything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from hasten.models import defaults
from hasten.models.defaults import cached_snapshot
from tests.hub_cache import COMMIT, write_hub_cache

MODEL = "someone/small"
PATH = f"/api/models/{MODEL}"
Hub = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and a client that knows of no proxy. Nobody listens where the hub is."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    close_session()
    yield
    close_session()


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "transformer" / "config.json").write_text('{"layers": 1}')
    return write_hub_cache(tmp_path / "hub", MODEL, model)


@pytest.fixture
def hub_says(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Call it with a status and JSON for a hub that answers so when it is asked for the model; it
    returns the paths asked for. Of all else it knows nothing, so that nothing of it is kept."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, told: dict[str, Any]) -> list[str]:
        asked: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == PATH
                asked.extend([self.path] * known)
                self.send_response(status if known else 404)
                self.end_headers()
                self.wfile.write(json.dumps(told if known else {}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_commit_that_the_hub_has(snapshot: Path, hub_says: Hub) -> None:
    asked = hub_says(200, {"id": MODEL, "sha": COMMIT})
    assert cached_snapshot(MODEL) == snapshot
    assert asked == [PATH]


@pytest.mark.usefixtures("snapshot")
def test_another_commit_on_the_hub(hub_says: Hub) -> None:
    hub_says(200, {"id": MODEL, "sha": COMMIT[::-1]})
    assert cached_snapshot(MODEL) is None


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_refuses(snapshot: Path, hub_says: Hub, status: int) -> None:
    """As for a gated model without a token."""
    asked = hub_says(status, {"error": "no"})
    assert cached_snapshot(MODEL) == snapshot
    assert asked == [PATH]


def test_no_hub(snapshot: Path, monkeypatch: pytest.MonkeyPatch, hub_says: Hub) -> None:
    assert cached_snapshot(MODEL) == snapshot  # nobody listens
    asked = hub_says(200, {"id": MODEL, "sha": COMMIT[::-1]})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cached_snapshot(MODEL) == snapshot
    assert asked == []


def test_a_hub_that_never_answers(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        start = time.monotonic()
        assert cached_snapshot(MODEL) == snapshot
    assert time.monotonic() - start < 10


def test_nothing_in_the_cache(tmp_path: Path, hub_says: Hub) -> None:
    asked = hub_says(200, {"id": MODEL, "sha": COMMIT})
    assert cached_snapshot(MODEL) is None
    refs = tmp_path / "hub" / "models--someone--small" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)  # resolved, and nothing loaded yet
    assert cached_snapshot(MODEL) is None
    assert asked == []


def test_the_snapshot_of_the_main_branch(snapshot: Path, tmp_path: Path) -> None:
    refs = tmp_path / "hub" / "models--someone--small" / "refs"
    other = snapshot.with_name("f" * 40)
    other.mkdir()
    (other / "model_index.json").write_text("{}")
    assert cached_snapshot(MODEL) == snapshot
    (refs / "main").write_text(other.name)
    assert cached_snapshot(MODEL) == other


@pytest.mark.parametrize("name", ["a b/c", "someone/", "a--b/..c"])
def test_what_cannot_be_the_name_of_a_model(name: str) -> None:
    assert cached_snapshot(name) is None


def test_the_environment_says_where_the_cache_is_and_torch_is_not_loaded(
    snapshot: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from hasten.models.defaults import cached_snapshot\n"
        f"print(cached_snapshot({MODEL!r}))\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **places},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{snapshot}\n", "")
