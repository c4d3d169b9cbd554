# SPDX-License-Identifier: MIT
"""Prometheus metrics on loopback or a UNIX socket; off unless configured."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import socketserver
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

import numpy as np

from daemon.sharing.allowance import Allowance
from daemon.system.config import Config
from daemon.system.directory import HeldDirectory
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.errors import Error, UsageError
from nlproto.pipeline.pipeline import NamedBatch
from nlproto.records.wire import text
from nlproto.running.supervise import Failures, keep_going

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["Metrics"]

_SUMS = ("packets_in", "bytes_in", "packets_out", "bytes_out")
_ACCEPT_AGAIN = 0.5  # s
_OTHER = b"other"
_UNNAMED = b""
_AT_ONCE = 8
"""Connections, each with a thread."""

log = logging.getLogger(__name__)


class Metrics:
    """Sums traffic by process name and serves it with the daemon's figures; a context manager.

    Only the first `metrics_processes` names get counters of their own; later ones count as
    "other", so that the number of series stays bounded. `figures` gives what stats shows.
    """

    def __init__(self, config: Config, figures: Callable[[], dict[str, Any]]) -> None:
        self._config = config
        self._figures = figures
        self._sums: dict[bytes, np.ndarray] = {}
        self._lock = threading.Lock()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Metrics:
        if self._config.metrics is None:
            return self
        try:
            from prometheus_client import CollectorRegistry, make_wsgi_app
        except ImportError:
            raise UsageError(
                "'metrics' needs prometheus-client: pip install 'packet-hunter[metrics]'"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(self.collect))
        try:
            self._server = _listen(self._config.metrics)
        except OSError as error:
            where = self._config.metrics
            raise Error(f"metrics {where}: {error.strerror or error}; choose another") from None
        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()
        log.info("metrics on %s", self._config.metrics)
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self) -> None:
        def serve() -> bool:
            assert self._server is not None
            self._server.serve_forever()
            return False

        # without end: the daemon does its work without metrics too
        keep_going(serve, Failures("metrics", math.inf), lambda error: None)

    def reconfigure(self, config: Config) -> None:
        self._config = config

    def take(self, batch: NamedBatch) -> None:
        """Worker thread: add a batch."""
        if self._server is None or batch.flows is None:
            return
        flows = batch.flows
        names = np.where(flows["tgid"] != 0, flows["comm"], _UNNAMED)
        found, inverse = np.unique(names, return_inverse=True)
        sums = np.zeros((len(found), len(_SUMS)), np.uint64)
        for column, field in enumerate(_SUMS):
            np.add.at(sums[:, column], inverse, flows[field])
        with self._lock:
            for name, values in zip(found.tolist(), sums, strict=True):
                if name not in self._sums and len(self._sums) >= self._config.metrics_processes:
                    name = _OTHER
                self._sums[name] = self._sums.get(name, np.uint64(0)) + values

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        figures = self._figures()
        account = figures["account"]
        for field, text_of in (
            ("packets", "IP packets the engine saw"),
            ("skipped", "Packets without a record (fragment, truncated, other protocol)"),
            ("records", "Records made"),
            ("delivered", "Records delivered"),
            ("named", "Delivered records with a process"),
        ):
            yield CounterMetricFamily(f"packet_hunter_{field}", text_of, value=account[field])
        for field, label, text_of in (
            ("lost", "place", "Records lost, by place"),
            ("unnamed", "reason", "Delivered records without a process, by reason"),
        ):
            family = CounterMetricFamily(f"packet_hunter_{field}", text_of, labels=[label])
            for name, value in account[field].items():
                family.add_metric([name], value)
            yield family
        for name, text_of, value in (
            ("queue_bytes", "Bytes between receiver and worker", figures["queue"]["bytes"]),
            ("clients", "Connected clients", figures["clients"]["connected"]),
            (
                "client_queue_bytes",
                "Bytes that wait for clients",
                figures["clients"]["queued_bytes"],
            ),
            ("history_flows", "Flows in memory", figures["history"]["flows"]),
            ("processes", "Processes known", figures["processes"]["known"]),
            ("ports", "Entries of the port map", figures["ports"]["known"]),
        ):
            yield GaugeMetricFamily(f"packet_hunter_{name}", text_of, value=value)
        yield from self._by_process()

    def _by_process(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        with self._lock:
            sums = {name: values.tolist() for name, values in self._sums.items()}
        for offset, unit in ((0, "packets"), (1, "bytes")):
            family = CounterMetricFamily(
                f"packet_hunter_process_{unit}",
                f"Wire {unit} by process name",
                labels=["comm", "dir"],
            )
            for name, values in sums.items():
                shown = text(name) if name else "(unnamed)"
                family.add_metric([shown, "in"], values[offset])
                family.add_metric([shown, "out"], values[offset + 2])
            yield family


class _Collector:
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> list[Metric]:
        """Nothing beforehand: names are known when the figures are."""
        return []


class _NoErrors(ServerHandler):
    """wsgiref's own, which writes a traceback to stderr when a client does not read."""

    def log_exception(self, exc_info: Any) -> None:
        log.debug("metrics: %s", exc_info[1])


class _Quiet(WSGIRequestHandler):
    timeout = 5

    def handle(self) -> None:
        """One request. (The inherited method does the same with a handler that is not quiet.)"""
        self.raw_requestline = self.rfile.readline(65537)
        if len(self.raw_requestline) > 65536:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
            return
        if not self.parse_request():
            return
        handler = _NoErrors(
            self.rfile,
            self.wfile,  # type: ignore[arg-type]
            self.get_stderr(),
            self.get_environ(),
            multithread=True,
        )
        handler.request_handler = self  # type: ignore[attr-defined]
        handler.run(self.server.get_app())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def address_string(self) -> str:
        return str(self.client_address[0]) if self.client_address else "unix"


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each of the last _AT_ONCE connections; older ones are closed for new ones.

    All of them have a small part of a CPU: on TCP any user can ask.
    """

    daemon_threads = True
    request_queue_size = 16
    failures = Failures("metrics")

    def __init__(self, *arguments: Any) -> None:
        self._allowance = Allowance(share=0.1)
        self._connections: OrderedDict[socket.socket, None] = OrderedDict()
        self._changing = threading.Lock()
        super().__init__(*arguments)

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
            time.sleep(_ACCEPT_AGAIN)  # who waits makes the socket readable all the time
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
        # it tells of everybody's traffic
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


def _listen(where: str) -> WSGIServer:
    if os.path.isabs(where):
        return _UnixServer(where, _Quiet)
    host, _, port = where.rpartition(":")
    address = (host.strip("[]"), int(port))
    return (_Server6 if host.startswith("[") else _Server)(address, _Quiet)
