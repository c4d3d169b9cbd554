# SPDX-License-Identifier: MIT
"""Engine -> receiver thread -> MessageQueue -> worker thread -> subscribers.

The receiver only counts and copies, so that the kernel's socket buffer is emptied in time. The
worker takes all waiting batches as one array, so a record costs less under load.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from nlproto.engines.engine import Engine, Event
from nlproto.errors import Error
from nlproto.pipeline.account import Account
from nlproto.pipeline.naming import RecordNamer
from nlproto.pipeline.order import TimeOrder
from nlproto.pipeline.queue import MessageQueue
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.records.first_bytes import FirstBytes
from nlproto.records.process_event import ProcessEvent
from nlproto.records.wire import (
    BATCH,
    FLOW_RECORD,
    RECORD,
    Batch,
    FlowBatch,
    joined,
    lib,
    plain_copy,
)
from nlproto.running.supervise import PATIENCE, Failures, described, keep_going
from nlproto.tables.column_table import random_seed
from nlproto.tables.flows import group, settle_opened, summarize
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes

__all__ = ["QUEUE_BYTES", "Pipeline"]

QUEUE_BYTES = 64 << 20
"""Room for batches between receiver and worker."""
_PROCESS_BYTES = 2000  # a ProcessEvent with its strings
_CHUNK = 64  # the most batches that the worker takes at once
_ASK = 1.0  # s between two looks at the engine's own figures
_NO_RECORDS = np.empty(0, RECORD)
_POLL = 0.1  # s, between two looks for an engine that replaces one that failed
_IDLE = 1.0  # s, longest wait of the worker, which is woken
_FLUSH_NS = 20_000_000  # SNIFFER_FLUSH_MS_DEFAULT, see TimeOrder

log = logging.getLogger(__name__)


class Hears(Protocol):
    """Knows the names of far ends: nlproto.overheard.listening.Overheard."""

    def hear(self, flows: np.ndarray) -> None:
        """Fill in what is known of these FLOWs."""

    def figures(self) -> dict[str, Any]:
        """Return sizes and losses; from any thread."""


@dataclass(slots=True)
class _Barrier:
    """Passes through the queue behind everything that is in it."""

    passed: Callable[[], None]


QueueItem = Event | _Barrier
OnBatch = Callable[[NamedBatch], None]
B = TypeVar("B", Batch, FlowBatch)


class Pipeline:
    """Leads records from `engine` to subscribers. A context manager that owns two threads.

    The engine comes open; the pipeline closes it. If the engine fails, the receiver calls
    `on_failure(error)` and waits for switch(). Leaving the context reads the rest of the engine's
    stream and empties the queue first.

    Other failures are logged. Their records are lost in "failed", and both threads go on. A thread
    that only fails for `patience` s ends and calls `on_death(error)`; the program must end.

    `packets` False: take sums of flows if the engine has them, until want_packets().
    """

    def __init__(
        self,
        engine: Engine,
        *,
        account: Account,
        processes: Processes,
        namer: RecordNamer | None = None,
        portmap: PortMap | None = None,
        queue: MessageQueue[QueueItem] | None = None,
        on_failure: Callable[[Error], None] | None = None,
        on_death: Callable[[Error], None] | None = None,
        patience: float = PATIENCE,
        packets: bool = True,
        overheard: Hears | None = None,
    ) -> None:
        self.account = account
        self.processes = processes
        self.portmap = portmap
        self.namer = namer
        self.overheard = overheard
        # not "or": an empty queue is false
        self.queue: MessageQueue[QueueItem] = MessageQueue(QUEUE_BYTES) if queue is None else queue
        self.account_lock = threading.Lock()
        self.beat = time.monotonic()
        """When the worker last went round. Old if it hangs."""
        self.engine_stats: dict[str, object] = {}
        """The engine's own figures, at most a second old."""
        self._asked = 0.0
        self._engine = engine
        self._next: Engine | None = None
        self._switched = threading.Event()
        self._failed_at: float | None = None
        self._on_failure = on_failure
        self._on_death = on_death
        self._receiving = Failures("receiver", patience)
        self._working = Failures("worker", patience)
        self.first_bytes = FirstBytes()
        self._wants_first_bytes = False
        self._packets = packets
        self._asked_for = True
        """Whether the engine was last asked for packets; it is at its start."""
        self._takes: tuple[OnBatch, ...] = ()
        self._order = TimeOrder(_FLUSH_NS)
        self._head: np.void | None = None
        self._seed = random_seed()
        self._stopping = threading.Event()
        self._barriers: list[_Barrier] = []
        self._barrier_lock = threading.Lock()
        self._opened = False
        self._receiver = threading.Thread(target=self._receive, name="receiver", daemon=True)
        self._worker = threading.Thread(
            target=lambda: keep_going(self._work, self._working, self._die, urgent=True),
            name="worker",
            daemon=True,
        )

    @property
    def engine(self) -> Engine:
        """The present source of records."""
        return self._engine

    @property
    def failed(self) -> bool:
        """Whether the engine failed and no other has replaced it yet."""
        return self._failed_at is not None

    def __enter__(self) -> Pipeline:
        self._worker.start()
        self._receiver.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Read the rest of the engine's stream, hand all to the subscribers, end both threads."""
        self._stopping.set()
        self._engine.wake()
        self._receiver.join()
        self.queue.close()
        self._worker.join()
        # nothing, unless the worker has died
        left = self.queue.get_many(len(self.queue))
        batches = [one for one in left if isinstance(one, Batch | FlowBatch)]
        self._lose(sum(batch.count for batch in batches) + len(self._order))

    def _die(self, error: Error) -> None:
        if self._on_death is None:
            log.critical("%s", error)
        else:
            self._on_death(error)

    def subscribe(self, take: OnBatch) -> Callable[[], None]:
        """Call `take` in the worker thread for each batch. Returns a function that ends this."""
        self._takes = (*self._takes, take)

        def cancel() -> None:
            self._takes = tuple(other for other in self._takes if other is not take)

        return cancel

    def want_first_bytes(self, wanted: bool) -> bool:
        """Start or stop filling `first_bytes`. Returns whether the engine can. From any thread.

        The kernel sends them up to a flush interval after their record, which waits for them.
        """
        self._wants_first_bytes = wanted
        self._order.interval_ns = _FLUSH_NS * (2 if wanted else 1)
        return self._engine.want_first_bytes(wanted)

    def want_packets(self, wanted: bool) -> None:
        """Give subscribers single packets, or flows alone. From any thread.

        It holds for everything recorded after a later barrier(). No record is lost or added twice.
        """
        self._packets = wanted
        self._engine.wake()

    def switch(self, engine: Engine, timeout: float = 2.0) -> None:
        """Replace the engine by another open one, which is the pipeline's then; the old one ends.

        Returns when it has taken over, or after `timeout` s.
        """
        self._switched.clear()
        self._next = engine
        self._engine.wake()
        self._switched.wait(timeout)

    def barrier(self, passed: Callable[[], None]) -> None:
        """Call `passed` in the worker when all packets recorded until now went to subscribers."""
        with self._barrier_lock:
            self._barriers.append(_Barrier(passed))
        self._engine.wake()

    # Receiver thread

    def _receive(self) -> None:
        keep_going(self._receive_once, self._receiving, self._die)
        if not self.failed:
            self._finish()
        self._close(self._engine)
        for marker in self._take_barriers():
            self.queue.put(marker, 0)

    def _receive_once(self) -> bool:
        """Go round once. Returns whether to go on."""
        if not self._opened:
            self._open()
        if self._stopping.is_set():
            return False
        if self._next is not None:
            self._change_engine()
        markers = self._take_barriers()
        try:
            self._choose_group()
            if markers:
                self._read_all()
            elif self.failed:
                self._stopping.wait(_POLL)
            else:
                self._read(self._engine.read(max(0.0, self._asked + _ASK - time.monotonic())))
        finally:
            for marker in markers:
                self.queue.put(marker, 0)
        self._ask_engine()
        return True

    def _close(self, engine: Engine) -> None:
        try:
            engine.__exit__(None, None, None)
        except Exception as error:
            self._receiving.add(error, "closing the engine")

    def _open(self) -> None:
        engine = self._engine
        engine.awaited = self._is_awaited
        with self.account_lock:
            self.account.open(engine.opening, engine.instance, engine.group)
        self._opened = self._asked_for = True
        self._asked = 0.0
        self._ask_engine()

    def _is_awaited(self) -> bool:
        return bool(self._barriers) or self._next is not None or self._stopping.is_set()

    def _choose_group(self) -> None:
        """Ask the engine for packets or for flows, as wanted."""
        wanted = self._packets
        if wanted == self._asked_for or self.failed:
            return
        self._asked_for = wanted
        engine, before = self._engine, self._engine.group
        try:
            engine.want_packets(wanted)
        except Error as error:
            self._fail(error)
            return
        if engine.group != before:
            with self.account_lock:
                self.account.go_over(engine.opening, engine.instance, engine.group)

    def _take_barriers(self) -> list[_Barrier]:
        with self._barrier_lock:
            markers, self._barriers = self._barriers, []
        return markers

    def _read_all(self) -> None:
        """Read everything recorded until now. What did not come is lost."""
        if self.failed:
            return
        self._read(self._engine.catch_up())
        if not self.failed:
            with self.account_lock:
                self.account.close(self._engine.closing, self._engine.group)

    def _read(self, events: Iterable[Event]) -> None:
        try:
            for event in events:
                self._put(event)
        except Error as error:
            self._fail(error)
        except Exception as error:
            self._receiving.add(error, f"engine {self._engine.name}")
            self._fail(Error(f"engine {self._engine.name} broke: {described(error)}"))

    def _fail(self, error: Error) -> None:
        self._failed_at = time.monotonic()
        if self._on_failure is not None:
            self._on_failure(error)
        else:
            log.error("engine %s: %s", self._engine.name, error)

    def _ask_engine(self) -> None:
        """Refresh the engine's own figures. Only this thread uses the engine."""
        if self.failed or time.monotonic() - self._asked < _ASK:
            return
        self._asked = time.monotonic()
        with contextlib.suppress(Error):
            self.engine_stats = self._engine.stats()

    def _lose(self, records: int) -> None:
        if records:
            with self.account_lock:
                self.account.lose("failed", records)

    def _put(self, event: Event) -> None:
        if isinstance(event, Batch | FlowBatch):
            lost = self._put_batch(event)
            self._receiving.clear()
        elif isinstance(event, ProcessEvent):
            lost = self.queue.put(event, _PROCESS_BYTES)
        else:
            lost = 0
            self.first_bytes.keep(event)
        if lost:
            with self.account_lock:
                self.account.lose("queue", lost)

    def _put_batch(self, batch: Batch | FlowBatch) -> int:
        """Count, copy and queue a batch. Returns how many older records were dropped for it."""
        head: np.void = np.frombuffer(batch.head.tobytes(), BATCH)[0]  # copy() takes 7 us
        copy: Batch | FlowBatch
        # tobytes() copies plain bytes; a copy of the array would go field by field
        if isinstance(batch, Batch):
            found = plain_copy(batch.records)
            copy = Batch(head, found)
            with self.account_lock:
                self.account.add(head, found)
        else:
            found = plain_copy(batch.flows)
            copy = FlowBatch(head, found, batch.wire_packets, batch.wire_bytes)
            with self.account_lock:
                self.account.add(head, None, copy.count, "flows")
        return self.queue.put(copy, found.nbytes + head.nbytes, copy.count)

    def _change_engine(self) -> None:
        engine, self._next = self._next, None
        assert engine is not None
        if not self.failed:
            self._finish(_begin(engine))
        old, self._engine = self._engine, engine
        self._close(old)
        if self._wants_first_bytes:
            engine.want_first_bytes(True)
        if self._failed_at is not None:
            with self.account_lock:
                self.account.gap(time.monotonic() - self._failed_at)
            self._failed_at = None
        self._open()
        self._switched.set()

    def _finish(self, until_ns: int | None = None) -> None:
        try:
            for event in self._engine.finish(until_ns):
                self._put(event)
            with self.account_lock:
                self.account.close(self._engine.closing, self._engine.group)
        except Error as error:
            log.warning("the rest of the engine's stream could not be read: %s", error)
        except Exception as error:
            self._receiving.add(error, "the engine's tail")

    # Worker thread

    def _work(self) -> bool:
        """Go round once. Returns whether to go on."""
        self.beat = time.monotonic()
        items = self.queue.get_many(
            _CHUNK, self._order.interval_ns / 1e9 if len(self._order) else _IDLE
        )
        for item in items:
            if isinstance(item, ProcessEvent):
                self._attempt("a process event", self._learn, item)
        self._name([item for item in items if isinstance(item, Batch)], self._arrive)
        self._name([item for item in items if isinstance(item, FlowBatch)], self._arrive_flows)
        markers = [item for item in items if isinstance(item, _Barrier)]
        ended = not items and self.queue.closed
        idle = not items and len(self._order) > 0
        self._emit(self._order.drain() if markers or ended or idle else self._order.take())
        for marker in markers:
            self._attempt("a question", marker.passed)
        return not ended

    def _name(self, batches: list[B], arrive: Callable[[list[B]], None]) -> None:
        if batches and not self._attempt("naming", arrive, batches):
            for batch in batches:  # one of them is at fault: lose it alone
                if not self._attempt("naming", arrive, [batch]):
                    self._lose(batch.count)

    def _attempt(self, what: str, work: Callable[..., object], *arguments: object) -> bool:
        """Call work(*arguments). Returns whether it went well."""
        try:
            work(*arguments)
        except Exception as error:
            self._working.add(error, what)
            return False
        return True

    def _arrive(self, batches: list[Batch]) -> None:
        """Name now, while sockets and processes can still be looked up."""
        records = joined([batch.records for batch in batches])
        if self.namer is not None:
            self.namer.name(records)
        self.processes.add_records(records)
        self._head = batches[-1].head
        self._order.add(records, max(int(batch.head["mono_ns"]) for batch in batches))

    def _arrive_flows(self, batches: list[FlowBatch]) -> None:
        """Hand on at once: flows need no order."""
        merged = joined([batch.flows for batch in batches], FLOW_RECORD)
        records = joined([merged["last"]])
        if self.namer is not None:
            self.namer.name(records)
        self.processes.add_records(records)
        flows, belongs = group(records, self._seed)
        np.minimum.at(flows["first_ns"], belongs, merged["first_ns"])
        settle_opened(flows, belongs, merged)
        if self.portmap is not None:
            self.portmap.update(flows)
        head = batches[-1].head
        batch = NamedBatch(head, _NO_RECORDS, Clock.from_head(head), flows)
        self._hand_on(batch, records["how"], merged["records"])

    def _learn(self, event: ProcessEvent) -> None:
        process = self.processes.add_event(event)
        if self.portmap is not None and event.event == lib.SNIFFER_EVENT_EXIT:
            self.portmap.forget_process(process.key)

    def _emit(self, records: np.ndarray) -> None:
        """Hand records on. Those that did not reach every subscriber are lost."""
        if not len(records):
            return
        assert self._head is not None
        try:
            flows = summarize(records, self._seed)
            if self.portmap is not None:
                self.portmap.update(flows)
        except Exception as error:
            self._working.add(error, "summing up")
            self._lose(len(records))
            return
        batch = NamedBatch(self._head, records, Clock.from_head(self._head), flows)
        self._hand_on(batch, records["how"])

    def _hand_on(
        self, batch: NamedBatch, hows: np.ndarray, counts: np.ndarray | None = None
    ) -> None:
        """`hows` has a value for each record of the batch, which stands for `counts` records."""
        if self.overheard is not None and batch.flows is not None:
            self._attempt("names of far ends", self.overheard.hear, batch.flows)
        if not all([self._attempt("a subscriber", take, batch) for take in self._takes]):
            self._lose(len(hows) if counts is None else int(counts.sum()))
            return
        with self.account_lock:
            self.account.deliver(hows, counts)
        self._working.clear()


def _begin(engine: Engine) -> int | None:
    """Return where the next engine's stream begins, so that no packet is in both."""
    try:
        return engine.begin()
    except Error:  # it has gone again: reading it will raise
        return None
