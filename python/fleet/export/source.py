# SPDX-License-Identifier: MIT
"""Reads the daemon's stream of flows in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from types import TracebackType
from typing import Any, Self

from fleet.export.deltas import Deltas
from fleet.wire import ToldProcess
from nlproto.client.client import (
    AccountEvent,
    DaemonClient,
    DaemonEvent,
    Event,
    NamesEvent,
    ProcessesEvent,
    StreamBatch,
)
from nlproto.errors import Error, NoDaemon, NoPrivilege
from nlproto.tables.processes import Process, ProcessKey

__all__ = ["Source"]

_POLL = 0.5  # s
_AGAIN = 1.0  # s between two tries to reach the daemon
_TOLD = 1 << 16
_MOST_PROCESSES = 20_000
"""That wait to be told."""
_PARENTS = 64

log = logging.getLogger(__name__)


class Source:
    """A context manager. Everything public is to be used with `lock` held."""

    def __init__(self, path: str) -> None:
        self.lock = threading.Lock()
        self.deltas = Deltas()
        self.processes: dict[ProcessKey, ToldProcess] = {}
        """Details that wait to be told."""
        self.received = 0
        """Flows that the daemon gave us."""
        self.dropped = 0
        """Flows that we were too slow for."""
        self.gap_ms = 0
        """Time without a daemon; who keeps the sum takes it from here."""
        self.account: dict[str, Any] = {}
        """The daemon's own."""
        self.engine = ""
        self.failure: Error | None = None
        """Why no flow will ever come."""
        self._path = path
        self._told: OrderedDict[ProcessKey, int] = OrderedDict()
        self._away_since = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        complained = ""
        while not self._stopping.is_set():
            try:
                with DaemonClient(self._path) as client:
                    self._begin(client)
                    complained = ""
                    self._follow(client)
            except NoPrivilege as error:
                self.failure = error
                return
            except Error as error:
                if str(error) != complained:
                    log.warning("%s", complained := str(error))
            self._count_gap()
            self._stopping.wait(_AGAIN)

    def _begin(self, client: DaemonClient) -> None:
        if not client.daemon.get("everything"):
            raise NoPrivilege(
                f"the daemon at {self._path} shows this user only its own traffic;"
                " run as a member of its group (packet-hunter)"
            )
        account = client.start(flows=True)["account"]
        self._count_gap()
        with self.lock:
            self.engine = str(client.daemon.get("engine", ""))
            self.account = account or {}
        log.info("daemon %s, engine %s", client.daemon.get("version"), self.engine)

    def _count_gap(self) -> None:
        now = time.monotonic()
        with self.lock:
            self.gap_ms += round((now - self._away_since) * 1000)
            self._away_since = now

    def _follow(self, client: DaemonClient) -> None:
        dropped = 0
        try:
            while not self._stopping.is_set():
                events = client.read(_POLL)
                with self.lock:
                    self._away_since = time.monotonic()
                    for event in events:
                        if isinstance(event, StreamBatch):
                            self.dropped += event.dropped - dropped
                            dropped = event.dropped
                        self._take(event)
                if any(isinstance(one, DaemonEvent) and one.name == "bye" for one in events):
                    raise NoDaemon("the daemon has ended")
            client.unsubscribe()
            with self.lock:
                for event in client.read(0):
                    self._take(event)
        finally:
            self._away_since = time.monotonic()

    def _take(self, event: Event) -> None:
        if isinstance(event, StreamBatch):
            flows = event.batch.flows
            if flows is not None:
                self.received += len(flows)
                self.deltas.add(flows, event.batch.clock)
        elif isinstance(event, NamesEvent):
            self.deltas.tell(event.names)
        elif isinstance(event, ProcessesEvent):
            for process in event.processes:
                self._learn(process)
        elif isinstance(event, AccountEvent):
            self.account = event.account
        elif isinstance(event, DaemonEvent) and "engine" in event.fields:
            self.engine = str(event.fields["engine"])

    def _learn(self, process: Process) -> None:
        """Tell of it, unless all that is known of it was told before."""
        key = process.key
        state = hash(process)
        if self._told.get(key) == state or len(self.processes) >= _MOST_PROCESSES:
            return
        self._told[key] = state
        self._told.move_to_end(key)
        if len(self._told) > _TOLD:
            self._told.popitem(last=False)
        self.processes[key] = _told(process)


def _told(process: Process) -> ToldProcess:
    return ToldProcess(
        tgid=process.tgid,
        start_ns=process.start_ns,
        at_ns=time.time_ns(),
        comm=process.comm,
        exe=process.exe,
        cmdline=process.cmdline,
        ppid=process.ppid,
        parents=tuple(f"{one.pid} {one.comm}" for one in process.parents[:_PARENTS]),
        uid=process.uid,
        user=process.user,
        unit=process.unit,
        container=process.container,
        container_name=process.container_name,
        image=process.image,
        pod=process.pod,
        sha256=process.sha256,
    )
