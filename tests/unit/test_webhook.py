# SPDX-License-Identifier: MIT
"""A finding goes to the address that was given, or was not taken."""

import http.server
import threading

import pytest

from hunter.watch.webhook import Webhook


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path}")
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/other")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.server.asked.append(f"GET {self.path}")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "taken"), [("/here", True), ("/away", False)])
def test_who_answers_with_another_address_has_not_taken_it(server, path, taken, monkeypatch):
    monkeypatch.setattr("hunter.watch.webhook._PAUSES_S", (0.0,))
    said = []
    with Webhook(f"http://127.0.0.1:{server.server_port}{path}", said.append) as hook:
        hook.put({"kind": "program"})
        assert hook.finish() is taken
    assert set(server.asked) == {f"POST {path}"}
    assert any("answers 302" in one for one in said) is not taken
