# SPDX-License-Identifier: MIT
"""Serves the page and its answers on loopback, to clients with the secret of its address.

Every user of the machine can connect to loopback. So each answer needs the secret. The browser
keeps it after the "#" of the address, and never sends it to another host. "Host" must be this
machine's name. Otherwise a foreign page could reach it through a name of its own (DNS
rebinding).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import math
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from hunter.web.live import LiveRates
from nlproto import Error, UsageError
from nlproto.client.client import DaemonClient

__all__ = ["PageServer"]

_HOST = "127.0.0.1"
_AT_ONCE = 16
"""The most connections, each with a thread. A new one closes the oldest without the secret."""
_IDLE_S = 5.0
_WHO: Mapping[str, Callable[[str], int | float | str]] = {
    **{"port": int, "pid": int, "limit": int, "since": float},
    **{"proto": str, "host": str, "pname": str},
}
_MAX_ROWS = 1000


class PageServer(ThreadingHTTPServer):
    """Listens on loopback at `port` (0: any free one), and serves in threads.

    `path` is the daemon's socket. Raises Error if the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, path: str, live: LiveRates) -> None:
        self.path = path
        self.live = live
        self.secret = secrets.token_urlsafe(24)
        self.page = (Path(__file__).parent / "page.html").read_bytes()
        self.policy = _policy(self.page.decode())
        self._strangers: dict[socket.socket, None] = {}
        """Connections that have not yet shown the secret, the oldest first."""
        self._open = 0
        self._changing = threading.Lock()
        """Held while the two above change: threads open and close connections."""
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise Error(
                f"cannot serve on {_HOST} port {port}: {error.strerror}; choose another --port"
            ) from None
        self.hosts = {f"{name}:{self.server_port}" for name in (_HOST, "localhost")}
        self._thread = threading.Thread(target=self.serve_forever, name="web", daemon=True)

    @property
    def url(self) -> str:
        """The address to open, with the secret."""
        return f"http://{_HOST}:{self.server_port}/#{self.secret}"

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread. Any user can connect, so idle connections make room."""
        with self._changing:
            full = self._open >= _AT_ONCE
            if full and not self._strangers:
                return self.shutdown_request(request)
            if full:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._strangers[request] = None
            self._open += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changing:
                self._strangers.pop(request, None)
                self._open -= 1

    def admit(self, request: socket.socket) -> None:
        """The connection has shown the secret: it is not closed for others."""
        with self._changing:
            self._strangers.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "packet-hunter"
    sys_version = ""
    timeout = _IDLE_S

    def do_GET(self) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            return self._refuse(403, "open the address that packet-hunter web printed")
        url = urlsplit(self.path)
        if url.path == "/":
            return self._answer(200, "text/html; charset=utf-8", self.server.page)
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.secret}".encode()):
            return self._refuse(401, "the address that packet-hunter web printed has the secret")
        self.server.admit(self.connection)
        try:
            body = self._asked(url.path, dict(parse_qsl(url.query)))
        except UsageError as error:
            return self._refuse(400, str(error))
        except Error as error:
            return self._refuse(503, str(error))
        if body is None:
            return self._refuse(404, "nothing is here")
        self._answer(200, "application/json", body)

    def _asked(self, path: str, words: Mapping[str, str]) -> bytes | None:
        match path:
            case "/live":
                return self.server.live.processes()
            case "/flows":
                return self.server.live.flows(_number(words, "pid"), _number(words, "start_ns"))
            case "/who":
                with DaemonClient(self.server.path) as client:
                    answer = client.who(**_question(words))
                return json.dumps(answer).encode()
        return None

    def _refuse(self, status: int, reason: str) -> None:
        self._answer(status, "application/json", json.dumps({"error": reason}).encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _number(words: Mapping[str, str], name: str) -> int:
    try:
        return int(words.get(name, ""))
    except ValueError:
        raise UsageError(f"{name} must be a number") from None


def _question(words: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of op "who". Raises UsageError."""
    found: dict[str, Any] = {"limit": _MAX_ROWS}
    for name, text in words.items():
        if name not in _WHO:
            raise UsageError(f"{name}: not a word of who")
        try:
            value = _WHO[name](text)
        except ValueError:
            raise UsageError(f"{name} must be a number") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} must be a number of seconds")
        found[name] = value
    return found


def _policy(page: str) -> str:
    """The page may run its own script and style, and load nothing else."""
    rules = [
        "default-src 'none'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    rules.append("frame-ancestors 'none'")
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(rules)
