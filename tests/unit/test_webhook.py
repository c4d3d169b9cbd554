# SPDX-License-Identifier: MIT
"""A finding goes to the address that was given, or was not taken."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hunter.watch.webhook import Webhook
from waiting import stand_in


class _Server(http.server.ThreadingHTTPServer):
    """A server that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.asked: list[str] = []


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        stand_in(self.server).asked.append(f"POST {self.path}")
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", f"http://127.0.0.1:{stand_in(self.server).server_port}/other")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        stand_in(self.server).asked.append(f"GET {self.path}")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "taken"), [("/here", True), ("/away", False)])
def test_who_answers_with_another_address_has_not_taken_it(
    server: Any, path: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hunter.watch.webhook._PAUSES_S", (0.0,))
    said: list[Any] = []
    with Webhook(f"http://127.0.0.1:{server.server_port}{path}", said.append) as hook:
        hook.put({"kind": "program"})
        assert hook.finish() is taken
    assert set(server.asked) == {f"POST {path}"}
    assert any("answers 302" in one for one in said) is not taken
