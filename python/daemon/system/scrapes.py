# SPDX-License-Identifier: MIT
"""Serves metrics on loopback or a UNIX socket. Imported only if they are on: it takes memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import socketserver
import stat
import sys
import threading
import time
from collections import OrderedDict
from functools import partial
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from daemon.sharing.allowance import Allowance
from daemon.system.directory import HeldDirectory
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.running.supervise import Failures

__all__ = ["listen"]

_ACCEPT_AGAIN = 0.5  # s
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_AT_ONCE = 8
"""The most connections, each with a thread."""

log = logging.getLogger(__name__)


class _NoErrors(ServerHandler):
    """wsgiref's own handler writes a traceback to stderr when a client does not read."""

    def log_exception(self, exc_info: Any) -> None:
        log.debug("metrics: %s", exc_info[1])


class _Quiet(WSGIRequestHandler):
    timeout = 5

    def handle(self) -> None:
        """Handle one request. (The inherited method's handler is not quiet.)"""
        self.raw_requestline = self.rfile.readline(65537)
        if len(self.raw_requestline) > 65536:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
            return
        if not self.parse_request():
            return
        if not self._is_asked_by_its_name():
            self.send_error(403, "ask for 127.0.0.1, [::1] or localhost")
            return
        handler = _NoErrors(
            self.rfile,
            self.wfile,  # type: ignore[arg-type]
            self.get_stderr(),
            self.get_environ(),
            multithread=True,
        )
        handler.request_handler = self  # type: ignore[attr-defined]
        handler.run(partial(self.server.make, self.request))  # type: ignore[attr-defined]

    def _is_asked_by_its_name(self) -> bool:
        """A page of another machine can reach loopback by a name of its own (DNS rebinding)."""
        host = self.headers.get("Host")
        unix = self.connection.family == socket.AF_UNIX
        return unix or host is None or host.rpartition(":")[0] in _NAMES or host in _NAMES

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def address_string(self) -> str:
        return str(self.client_address[0]) if self.client_address else "unix"


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each of the last _AT_ONCE connections. A new one closes the oldest.

    All together have a small part of a CPU, because on TCP any user can ask. Answers are made one
    after another: together they would hold up the threads that record.
    """

    daemon_threads = True
    request_queue_size = 16
    failures = Failures("metrics")

    def __init__(self, *arguments: Any) -> None:
        self._allowance = Allowance(share=0.1)
        self._connections: OrderedDict[socket.socket, None] = OrderedDict()
        self._changing = threading.Lock()
        self._making = threading.Lock()
        super().__init__(*arguments)

    def make(self, request: Any, environ: dict[str, Any], start_response: Any) -> Any:
        """Return the answer, unless the connection was closed for a new one meanwhile."""
        with self._making:
            if request not in self._connections:
                raise ConnectionAbortedError
            return self.get_app()(environ, start_response)  # type: ignore[misc]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        self._allowance.spend(time.thread_time())

    def process_request(self, request: Any, client_address: Any) -> None:
        time.sleep(min(self._allowance.spend(0), 1.0))
        with self._changing:
            self._connections[request] = None
            old = None
            if len(self._connections) > _AT_ONCE:
                old, _ = self._connections.popitem(last=False)
                with contextlib.suppress(OSError):
                    old.shutdown(socket.SHUT_RDWR)  # its thread closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._changing:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            self.failures.add(error)
            time.sleep(_ACCEPT_AGAIN)  # waiting clients keep the socket readable
            raise

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, or is slow, is no failure of ours."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.failures.add(error)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self._place = HeldDirectory(
            str(self.server_address), os.path.dirname(DEFAULT_SOCKET), 0o755
        )
        found = self._place.stat()
        if found is not None:
            if not stat.S_ISSOCK(found.st_mode):
                raise OSError(errno.EEXIST, "it exists and is no socket")
            self._place.unlink(found)
        # it shows everybody's traffic
        self._mine = self._place.bind(self.socket, 0o660)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def server_close(self) -> None:
        super().server_close()
        place: HeldDirectory | None = getattr(self, "_place", None)
        if place is not None and place.fd >= 0:
            if (mine := getattr(self, "_mine", None)) is not None:
                place.unlink(mine)
            place.close()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = super().get_request()
        return connection, ("unix", 0)


def listen(where: str) -> WSGIServer:
    if os.path.isabs(where):
        return _UnixServer(where, _Quiet)
    host, _, port = where.rpartition(":")
    address = (host.strip("[]"), int(port))
    return (_Server6 if host.startswith("[") else _Server)(address, _Quiet)
