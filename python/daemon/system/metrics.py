# SPDX-License-Identifier: MIT
"""Prometheus metrics on loopback or a UNIX socket; off unless configured."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from daemon.system.config import Config
from daemon.system.series import Labels, Series
from nlproto.errors import Error, UsageError
from nlproto.records.batch import NamedBatch
from nlproto.records.wire import text
from nlproto.running.supervise import Failures, keep_going
from nlproto.tables.attempts import Attempts
from nlproto.tables.outcome import RST
from nlproto.tables.processes import Process
from nlproto.tables.shares import NOBODY, Payers

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

__all__ = ["Metrics"]

_SUMS = ("packets_in", "bytes_in", "packets_out", "bytes_out")
_TCP = ("retransmits", "looks", "rtt_us", "rtts", "reset_in", "reset_out", "refused", "unanswered")
_ALL = (*_SUMS, *_TCP, "drops")
_BYTES = (_ALL.index("bytes_in"), _ALL.index("bytes_out"))

_FAMILIES: dict[str, Labels] = {
    "process": ("comm",),
    "unit": ("unit",),
    "container": ("container", "name", "pod"),
}
"""Labels of the sums of traffic, by the word in the family's name."""


class DetailedProcesses(Protocol):
    """What is known of processes (nlproto.tables.processes.Processes)."""

    def get(self, tgid: int, start_ns: int, /) -> Process | None: ...


log = logging.getLogger(__name__)


class Metrics:
    """Sums traffic and serves it with the daemon's figures; a context manager.

    Sums are by name of process, unit and container. Of each at most `metrics_processes` have
    counters of their own. Others count as "other", so the number of series is bounded. `figures`
    returns what stats shows.
    """

    def __init__(
        self,
        config: Config,
        figures: Callable[[], dict[str, Any]],
        processes: DetailedProcesses | None = None,
        payers: Payers | None = None,
    ) -> None:
        self._config = config
        self._figures = figures
        self._processes = processes
        payer_of = (lambda uid: NOBODY if uid is None else uid) if payers is None else payers.of_one
        self._series = {name: Series(_BYTES, payer_of) for name in _FAMILIES}
        self._attempts = Attempts()
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

        # it tries forever: the daemon works without metrics too
        keep_going(serve, Failures("metrics", math.inf), lambda error: None)

    def reconfigure(self, config: Config) -> None:
        self._config = config

    def take(self, batch: NamedBatch) -> None:
        """Add a batch. Worker thread."""
        if self._server is None or batch.flows is None:
            return
        flows = batch.flows
        self._sum(
            flows,
            {name: flows[name] for name in _SUMS}
            | {"reset_in": flows["tcp_in"] & RST != 0, "reset_out": flows["tcp_out"] & RST != 0},
        )
        for failed in self._attempts.take(flows, time.monotonic_ns()):
            with self._lock:
                self._add(failed.tgid, failed.start_ns, failed.comm, _one(failed.why))

    def learn(self, flows: np.ndarray) -> None:
        """Add figures of connections (FLOWs with their new retransmits). Any thread."""
        if self._server is None or not len(flows):
            return
        measured = flows["rtt_us"] != 0
        columns = {"retransmits": flows["retransmits"], "rtt_us": flows["rtt_us"]}
        self._sum(flows, columns | {"rtts": measured, "looks": np.ones(len(flows), bool)})

    def drop(self, tgid: int, start_ns: int, comm: bytes, count: int) -> None:
        """Any thread: add packets that the kernel dropped at a socket of a process."""
        if self._server is None:
            return
        with self._lock:
            self._add(tgid, start_ns, comm, _one("drops", count))

    def drop_for(self, tgid: int, start_ns: int, comm: bytes, reason: str, count: int) -> None:
        """Any thread: add packets that the kernel dropped for a reason, at or from a process."""
        if self._server is None:
            return
        most = self._config.metrics_processes
        with self._lock:
            for family, labels, uid in self._labels(tgid, start_ns, comm):
                self._series[family].add_reason(labels, reason, count, uid, most)

    def _sum(self, flows: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        found, inverse = np.unique(flows[["tgid", "start_ns", "comm"]], return_inverse=True)
        sums = np.zeros((len(found), len(_ALL)), np.uint64)
        for name, values in columns.items():
            np.add.at(sums[:, _ALL.index(name)], inverse, values.astype(np.uint64))
        with self._lock:
            for (tgid, start_ns, comm), of_one in zip(found.tolist(), sums, strict=True):
                self._add(tgid, start_ns, comm, of_one)

    def _add(self, tgid: int, start_ns: int, comm: bytes, values: np.ndarray) -> None:
        most = self._config.metrics_processes
        for family, labels, uid in self._labels(tgid, start_ns, comm):
            self._series[family].add(labels, values, uid, most)

    def _labels(
        self, tgid: int, start_ns: int, comm: bytes
    ) -> Iterator[tuple[str, Labels, int | None]]:
        """Yield (family, labels, uid). All names below a user's managers and runtimes are one."""
        if not tgid:
            yield "process", ("(unnamed)",), None
            return
        process = self._processes.get(tgid, start_ns) if self._processes is not None else None
        uid = None if process is None else process.uid
        yield "process", (text(comm),), uid
        if process is None:
            return
        if process.unit:
            yield "unit", (process.unit.partition("/")[0],), uid
        container, of_user, _ = process.container.partition("/")
        if of_user:
            yield "container", (container, "", ""), uid
        elif container:
            yield "container", (container, process.container_name, process.pod), uid

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
        for name, labels in _FAMILIES.items():
            yield from self._traffic(name, labels)
            yield from self._tcp(name, labels)
            yield self._dropped(name, labels)

    def _traffic(self, name: str, labels: Labels) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        with self._lock:
            sums = {of: values.tolist() for of, values in self._series[name].sums.items()}
        for offset, unit in ((0, "packets"), (1, "bytes")):
            family = CounterMetricFamily(
                f"packet_hunter_{name}_{unit}", f"Wire {unit} by {name}", labels=[*labels, "dir"]
            )
            for of, values in sums.items():
                family.add_metric([*of, "in"], values[offset])
                family.add_metric([*of, "out"], values[offset + 2])
            yield family

    def _tcp(self, name: str, labels: Labels) -> Iterator[Metric]:
        """Return known figures. An unknown figure is left out, not 0."""
        from prometheus_client.core import CounterMetricFamily, SummaryMetricFamily

        with self._lock:
            sums = {
                of: dict(zip(_ALL, values.tolist(), strict=True))
                for of, values in self._series[name].sums.items()
            }
        begin = f"packet_hunter_{name}"
        retransmits = CounterMetricFamily(
            f"{begin}_retransmits", f"TCP segments sent again by {name}", labels=labels
        )
        rtt = SummaryMetricFamily(
            f"{begin}_rtt_seconds",
            f"Round trip times of TCP connections by {name}, as the kernel smooths them",
            labels=labels,
        )
        resets = CounterMetricFamily(
            f"{begin}_resets", f"TCP connections with a reset by {name}", labels=[*labels, "dir"]
        )
        failed = CounterMetricFamily(
            f"{begin}_failed_connects",
            f"TCP connection attempts that failed by {name}",
            labels=[*labels, "why"],
        )
        dropped = CounterMetricFamily(
            f"{begin}_dropped",
            f"Packets that the kernel dropped at sockets of {name}, mostly for want of room",
            labels=labels,
        )
        for of, one in sums.items():
            dropped.add_metric(of, one["drops"])
            if one["looks"]:
                retransmits.add_metric(of, one["retransmits"])
            if one["rtts"]:
                rtt.add_metric(of, one["rtts"], one["rtt_us"] / 1e6)
            for way in ("in", "out"):
                resets.add_metric([*of, way], one[f"reset_{way}"])
            for why in ("refused", "unanswered"):
                failed.add_metric([*of, why], one[why])
        yield from (retransmits, rtt, resets, failed, dropped)

    def _dropped(self, name: str, labels: Labels) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(
            f"packet_hunter_{name}_dropped_by_reason",
            f"Packets that the kernel dropped, from or to {name}, by its reason",
            labels=[*labels, "reason"],
        )
        with self._lock:
            for of, reasons in self._series[name].reasons.items():
                for reason, count in reasons.items():
                    family.add_metric([*of, reason], count)
        return family


def _one(name: str, count: int = 1) -> np.ndarray:
    values = np.zeros(len(_ALL), np.uint64)
    values[_ALL.index(name)] = count
    return values


class _Collector:
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> list[Metric]:
        """Describe nothing in advance: names are known only with the figures."""
        return []
