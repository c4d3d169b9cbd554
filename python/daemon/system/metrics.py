# SPDX-License-Identifier: MIT
"""Prometheus metrics on loopback or a UNIX socket; off unless configured."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from daemon.system.config import Config
from nlproto.errors import Error, UsageError
from nlproto.records.batch import NamedBatch
from nlproto.records.wire import text
from nlproto.running.supervise import Failures, keep_going

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

__all__ = ["Metrics"]

_SUMS = ("packets_in", "bytes_in", "packets_out", "bytes_out")
_OTHER = b"other"
_UNNAMED = b""

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

            from daemon.system.scrapes import listen
        except ImportError:
            raise UsageError(
                "'metrics' needs prometheus-client: pip install 'packet-hunter[metrics]'"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(self.collect))
        try:
            self._server = listen(self._config.metrics)
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
