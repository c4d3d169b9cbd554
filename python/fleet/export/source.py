# SPDX-License-Identifier: MIT
"""Reads the daemon's stream of flows in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from typing import Any, Self

import msgspec
import numpy as np

from fleet.export.deltas import Deltas
from fleet.wire import ToldProcess
from nlproto.client.client import (
    AccountEvent,
    ClientEvent,
    DaemonClient,
    DaemonEvent,
    NamesEvent,
    ProcessesEvent,
    StreamBatch,
)
from nlproto.errors import Error, NoDaemon, NoPrivilege
from nlproto.tables.processes import Process, ProcessKey

__all__ = ["FlowSource"]

_POLL = 0.5  # s
_AGAIN = 1.0  # s between two tries to reach the daemon
_KNOWN = 1 << 16
"""The most processes whose details are kept."""
_PARENTS = 64

log = logging.getLogger(__name__)


class FlowSource:
    """A context manager. Hold `lock` to use anything public."""

    def __init__(self, path: str) -> None:
        self.lock = threading.Lock()
        self.deltas = Deltas()
        self.received = 0
        """Flows that the daemon has sent us."""
        self.dropped = 0
        """Flows for which we were too slow."""
        self.gap_ms = 0
        """Time without a daemon; the owner of the sum takes it from here."""
        self.account: dict[str, Any] = {}
        """The daemon's own."""
        self.engine = ""
        self.failure: Error | None = None
        """Why no more flows will come."""
        self._path = path
        self._known: OrderedDict[ProcessKey, ToldProcess] = OrderedDict()
        self._told_in: dict[ProcessKey, int] = {}
        """The hour for which details were sent."""
        self._away_since = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
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

    def _take(self, event: ClientEvent) -> None:
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
        """Keep what is known of a process. Changed details are sent."""
        key, told = process.key, _told(process)
        before = self._known.get(key)
        self._known[key] = told
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN:
            gone, _ = self._known.popitem(last=False)
            self._told_in.pop(gone, None)
        if before is None or msgspec.structs.replace(before, at_ns=told.at_ns) != told:
            self._told_in.pop(key, None)

    def due(self, flows: np.ndarray, hour: int) -> list[ToldProcess]:
        """Return details of the processes in FLOWs that were not yet sent in `hour`.

        So each hour has the owners of its flows, however long a process lives and hours are kept.
        """
        tgids, starts = flows["tgid"].astype(np.uint64), flows["start_ns"]
        order = np.argsort(starts ^ tgids << np.uint64(40))  # two with one key may be told apart
        order = order[tgids[order] != 0]
        tgids, starts = tgids[order], starts[order]
        differs = np.ones(len(order), bool)
        differs[1:] = (tgids[1:] != tgids[:-1]) | (starts[1:] != starts[:-1])
        found = []
        for key in zip(tgids[differs].tolist(), starts[differs].tolist(), strict=True):
            told = self._known.get(key)
            if told is not None and self._told_in.get(key) != hour:
                self._told_in[key] = hour
                found.append(msgspec.structs.replace(told, at_ns=time.time_ns()))
        return found

    def process(self, tgid: int, start_ns: int) -> ToldProcess | None:
        """Return what is known of a process."""
        return self._known.get((tgid, start_ns))

    def untold(self, processes: list[ToldProcess]) -> None:
        """Mark details as not sent after all."""
        for one in processes:
            self._told_in.pop((one.tgid, one.start_ns), None)


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
