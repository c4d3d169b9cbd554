# SPDX-License-Identifier: MIT
"""A receiver of OpenTelemetry logs over HTTP, on loopback."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

__all__ = ["Stub", "receiver"]


class Stub(HTTPServer):
    """Answers with what `answers` has next, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, bytes]] = []
        self.taken: list[dict[str, Any]] = []
        self.heads: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/logs"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        data = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
        code, body = self.server.answers.pop(0) if self.server.answers else (200, b"{}")
        self.server.heads.append(self.headers)
        if code == 200:
            (resource,) = json.loads(data)["resourceLogs"]
            self.server.taken += resource["scopeLogs"][0]["logRecords"]
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.url)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def receiver() -> Iterator[Stub]:
    """One that answers as long as the block runs."""
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield stub
        finally:
            stub.shutdown()
            thread.join()
