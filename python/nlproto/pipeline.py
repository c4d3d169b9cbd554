# SPDX-License-Identifier: MIT
"""Engine -> receiver thread -> MessageQueue -> worker thread -> subscribers.

The receiver only counts and copies, so that the kernel's socket buffer is emptied in time. The
worker takes all batches that wait as one array: the more there is to do, the cheaper a record.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np

from nlproto.account import Account
from nlproto.clock import Clock
from nlproto.engine import Engine
from nlproto.errors import Error
from nlproto.merge import Merge
from nlproto.portmap import PortMap
from nlproto.processes import Processes
from nlproto.queue import MessageQueue
from nlproto.wire import Batch, ProcessEvent, SnapBatch

__all__ = ["NamedBatch", "Names", "Pipeline", "QUEUE_BYTES"]

QUEUE_BYTES = 64 << 20
_PROCESS_BYTES = 600  # a ProcessEvent with its strings
_CHUNK = 64  # batches that the worker takes at once
_POLL = 0.1  # s, longest wait of either thread
_FLUSH_NS = 20_000_000  # SNIFFER_FLUSH_MS_DEFAULT, see Merge

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedBatch:
    """Records with their owners, in order of time; several batches of the engine made one."""

    head: np.void
    """BATCH of the last one. Its clocks are right for all, its counters for its CPU alone."""
    records: np.ndarray
    """RECORD; not to be written by subscribers, who share it."""
    clock: Clock


class Names(Protocol):
    """What names records in user space: Namer."""

    def name(self, records: np.ndarray, clock: Clock) -> None:
        """Fill in owner, `how` and `flags` of the records that the engine could not name."""

    def learn(self, event: ProcessEvent) -> None:
        """Take note of a process event."""


@dataclass(slots=True)
class _Marker:
    """Goes through the queue behind everything before it."""

    passed: threading.Event


Item = Batch | ProcessEvent | SnapBatch | _Marker
Take = Callable[[NamedBatch], None]


class Pipeline:
    """The way of a record from `engine` to subscribers; a context manager that owns two threads.

    `on_failure(error)` is called in the receiver thread when the engine fails; the receiver then
    waits for switch(). Leaving the context reads the engine's tail and drains the queue first.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        account: Account,
        processes: Processes,
        namer: Names | None = None,
        portmap: PortMap | None = None,
        queue: MessageQueue[Item] | None = None,
        on_failure: Callable[[Error], None] | None = None,
        on_snaps: Callable[[SnapBatch], None] | None = None,
    ) -> None:
        self.account = account
        self.processes = processes
        self.portmap = portmap
        self.namer = namer
        self.queue: MessageQueue[Item] = queue or MessageQueue(QUEUE_BYTES)
        self.account_lock = threading.Lock()
        self.beat = time.monotonic()
        """When the worker last went round; old when it hangs."""
        self._engine = engine
        self._next: Engine | None = None
        self._failed = False
        self._on_failure = on_failure
        self._on_snaps = on_snaps
        self._takes: tuple[Take, ...] = ()
        self._merge = Merge(_FLUSH_NS)
        self._head: np.void | None = None
        self._stopping = threading.Event()
        self._barriers: list[_Marker] = []
        self._barrier_lock = threading.Lock()
        self._receiver = threading.Thread(target=self._receive, name="receiver", daemon=True)
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def failed(self) -> bool:
        """Whether the engine failed and no other took its place yet."""
        return self._failed

    def __enter__(self) -> Pipeline:
        self._worker.start()
        self._receiver.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Read the engine's tail, hand everything to the subscribers, end both threads."""
        self._stopping.set()
        self._receiver.join()
        self.queue.close()
        self._worker.join()

    def subscribe(self, take: Take) -> Callable[[], None]:
        """Call `take` in the worker thread for each batch; returns the function that ends it."""
        self._takes = (*self._takes, take)

        def cancel() -> None:
            self._takes = tuple(other for other in self._takes if other is not take)

        return cancel

    def switch(self, engine: Engine) -> None:
        """Go on with another engine (already open); the present one is finished first."""
        self._next = engine

    def barrier(self) -> threading.Event:
        """An event that is set once all packets recorded until now went to the subscribers."""
        marker = _Marker(threading.Event())
        with self._barrier_lock:
            self._barriers.append(marker)
        return marker.passed

    # Receiver thread

    def _receive(self) -> None:
        while not self._stopping.is_set():
            if self._next is not None:
                self._change_engine()
            markers = self._take_barriers()
            if self._failed:
                self._stopping.wait(_POLL)
            else:
                self._read(self._flush(0.01) if markers else _POLL)
            for marker in markers:
                self.queue.put(marker, 0)
        if not self._failed:
            self._finish()
        for marker in self._take_barriers():
            self.queue.put(marker, 0)

    def _take_barriers(self) -> list[_Marker]:
        with self._barrier_lock:
            markers, self._barriers = self._barriers, []
        return markers

    def _flush(self, default: float) -> float:
        """Make the engine send what it holds; how long to read then, in s."""
        flush = getattr(self._engine, "flush", None)
        if flush is None:
            return 2 * _FLUSH_NS / 1e9
        try:
            flush()
        except Error as error:
            log.debug("flush: %s", error)
        return default

    def _read(self, timeout: float) -> None:
        try:
            for event in self._engine.read(timeout):
                self._put(event)
        except Error as error:
            self._failed = True
            if self._on_failure is not None:
                self._on_failure(error)

    def _put(self, event: Batch | ProcessEvent | SnapBatch) -> None:
        if isinstance(event, Batch):
            records = np.array(event.records)
            head = np.array(event.head)[()]
            with self.account_lock:
                self.account.add(head)
            lost = self.queue.put(Batch(head, records), records.nbytes + head.nbytes, len(records))
            if lost:
                with self.account_lock:
                    self.account.lose("queue", lost)
        elif isinstance(event, ProcessEvent):
            lost = self.queue.put(event, _PROCESS_BYTES)
            if lost:
                with self.account_lock:
                    self.account.lose("queue", lost)
        elif self._on_snaps is not None:
            self._on_snaps(event)

    def _change_engine(self) -> None:
        if not self._failed:
            self._finish()
        engine, self._next = self._next, None
        assert engine is not None
        self._engine = engine
        self._failed = False

    def _finish(self) -> None:
        try:
            for event in self._engine.finish():
                self._put(event)
        except Error as error:
            log.warning("the engine's tail could not be read: %s", error)

    # Worker thread

    def _work(self) -> None:
        while True:
            self.beat = time.monotonic()
            items = self.queue.get_many(_CHUNK, _FLUSH_NS / 1e9 if len(self._merge) else _POLL)
            markers = []
            for item in items:
                if isinstance(item, Batch):
                    self._head = item.head
                    self._merge.add(item.records, int(item.head["mono_ns"]))
                elif isinstance(item, ProcessEvent):
                    self._learn(item)
                elif isinstance(item, _Marker):
                    markers.append(item)
            ended = not items and self.queue.closed
            idle = not items and len(self._merge) > 0
            self._emit(self._merge.drain() if markers or ended or idle else self._merge.take())
            for marker in markers:
                marker.passed.set()
            if ended:
                return

    def _learn(self, event: ProcessEvent) -> None:
        self.processes.add_event(event)
        if self.namer is not None:
            self.namer.learn(event)

    def _emit(self, records: np.ndarray) -> None:
        if not len(records) or self._head is None:
            return
        clock = Clock.from_head(self._head)
        if self.namer is not None:
            self.namer.name(records, clock)
        with self.account_lock:
            self.account.deliver(records["how"])
        self.processes.add_records(records)
        if self.portmap is not None:
            self.portmap.update(records)
        batch = NamedBatch(self._head, records, clock)
        for take in self._takes:
            try:
                take(batch)
            except Exception:
                log.exception("a subscriber failed on a batch of %d records", len(records))
