# SPDX-License-Identifier: MIT
"""Engine -> receiver thread -> MessageQueue -> worker thread -> subscribers.

The receiver only counts and copies, so that the kernel's socket buffer is emptied in time. The
worker takes all batches that wait as one array: the more there is to do, the cheaper a record.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nlproto.engines.engine import Engine
from nlproto.errors import Error
from nlproto.pipeline.account import Account
from nlproto.pipeline.order import TimeOrder
from nlproto.pipeline.queue import MessageQueue
from nlproto.records.clock import Clock
from nlproto.records.first_bytes import FirstBytes
from nlproto.records.wire import BATCH, RECORD, Batch, ProcessEvent, SnapBatch, lib
from nlproto.running.supervise import PATIENCE, Failures, described, keep_going
from nlproto.tables.flows import summarize
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes

__all__ = ["NamedBatch", "Names", "Pipeline", "QUEUE_BYTES"]

QUEUE_BYTES = 64 << 20
_RAW = np.dtype((np.void, RECORD.itemsize))
_PROCESS_BYTES = 600  # a ProcessEvent with its strings
_CHUNK = 64  # batches that the worker takes at once
_ASK = 1.0  # s between two looks at the engine's own figures
_DRAIN = 0.5  # s
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
    flows: np.ndarray | None = None
    """The records summed up (nlproto.tables.flows.FLOW), when the pipeline made this batch."""


class Names(Protocol):
    """What names records in user space: Namer."""

    def name(self, records: np.ndarray) -> None:
        """Fill in owner, `how` and `flags` of the records that the engine could not name."""


@dataclass(slots=True)
class _Barrier:
    """Goes through the queue behind everything before it."""

    passed: Callable[[], None]


Item = Batch | ProcessEvent | SnapBatch | _Barrier
OnBatch = Callable[[NamedBatch], None]


class Pipeline:
    """The way of a record from `engine` to subscribers; a context manager that owns two threads.

    The engine comes open and is closed here. `on_failure(error)` is called in the receiver thread
    when it fails; the receiver then waits for switch(). Leaving the context reads the engine's
    tail and drains the queue first.

    What fails otherwise is logged, its records are lost in "failed", and both threads go on. One
    that only fails for `patience` s ends and calls `on_death(error)`: the program must end too.
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
        on_death: Callable[[Error], None] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.account = account
        self.processes = processes
        self.portmap = portmap
        self.namer = namer
        # not "or": an empty queue is false
        self.queue: MessageQueue[Item] = MessageQueue(QUEUE_BYTES) if queue is None else queue
        self.account_lock = threading.Lock()
        self.beat = time.monotonic()
        """When the worker last went round; old when it hangs."""
        self.engine_stats: dict[str, object] = {}
        """What the engine said of itself a second ago."""
        self._asked = 0.0
        self._engine = engine
        self._next: Engine | None = None
        self._switched = threading.Event()
        self._failed_at: float | None = None
        self._on_failure = on_failure
        self._on_death = on_death
        self._receiving = Failures("receiver", patience)
        self._working = Failures("worker", patience)
        self.snaps = FirstBytes()
        self._snapping = False
        self._takes: tuple[OnBatch, ...] = ()
        self._merge = TimeOrder(_FLUSH_NS)
        self._head: np.void | None = None
        self._seed = secrets.randbits(64)
        self._stopping = threading.Event()
        self._barriers: list[_Barrier] = []
        self._barrier_lock = threading.Lock()
        self._opened = False
        self._receiver = threading.Thread(target=self._receive, name="receiver", daemon=True)
        self._worker = threading.Thread(
            target=lambda: keep_going(self._work, self._working, self._die),
            name="worker",
            daemon=True,
        )

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def failed(self) -> bool:
        """Whether the engine failed and no other took its place yet."""
        return self._failed_at is not None

    def __enter__(self) -> Pipeline:
        self._worker.start()
        self._receiver.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Read the engine's tail, hand everything to the subscribers, end both threads."""
        self._stopping.set()
        self._receiver.join()
        self.queue.close()
        self._worker.join()
        # nothing, unless the worker has died
        left = [one for one in self.queue.get_many(len(self.queue)) if isinstance(one, Batch)]
        self._lose(sum(len(batch.records) for batch in left) + len(self._merge))

    def _die(self, error: Error) -> None:
        if self._on_death is None:
            log.critical("%s", error)
        else:
            self._on_death(error)

    def subscribe(self, take: OnBatch) -> Callable[[], None]:
        """Call `take` in the worker thread for each batch; returns the function that ends it."""
        self._takes = (*self._takes, take)

        def cancel() -> None:
            self._takes = tuple(other for other in self._takes if other is not take)

        return cancel

    def want_snaps(self, wanted: bool) -> bool:
        """Fill `snaps` from now on, or no more; whether the engine can. From any thread.

        A snap leaves the kernel up to a flush interval after its record: records wait for it.
        """
        self._snapping = wanted
        self._merge.interval_ns = _FLUSH_NS * (2 if wanted else 1)
        return self._engine.want_snaps(wanted)

    def switch(self, engine: Engine, timeout: float = 2.0) -> None:
        """Go on with another engine (already open), which is ours then; the present one ends.

        Returns when it has taken over, or after `timeout` s.
        """
        self._switched.clear()
        self._next = engine
        self._switched.wait(timeout)

    def barrier(self, passed: Callable[[], None]) -> None:
        """Call `passed` in the worker once all packets recorded until now went to subscribers."""
        with self._barrier_lock:
            self._barriers.append(_Barrier(passed))

    # Receiver thread

    def _receive(self) -> None:
        keep_going(self._receive_once, self._receiving, self._die)
        if not self.failed:
            self._finish()
        try:
            self._engine.__exit__(None, None, None)
        except Exception as error:
            self._receiving.add(error, "closing the engine")
        for marker in self._take_barriers():
            self.queue.put(marker, 0)

    def _receive_once(self) -> bool:
        """Go round once; whether to go on."""
        if not self._opened:
            self._open()
        if self._stopping.is_set():
            return False
        if self._next is not None:
            self._change_engine()
        markers = self._take_barriers()
        try:
            if markers:
                self._read_all()
            elif self.failed:
                self._stopping.wait(_POLL)
            else:
                self._read(_POLL)
        finally:
            for marker in markers:
                self.queue.put(marker, 0)
        self._ask_engine()
        return True

    def _open(self) -> None:
        with self.account_lock:
            self.account.open(self._engine.opening, self._engine.instance)
        self._opened = True
        self._asked = 0.0
        self._ask_engine()

    def _take_barriers(self) -> list[_Barrier]:
        with self._barrier_lock:
            markers, self._barriers = self._barriers, []
        return markers

    def _read_all(self) -> None:
        """Everything recorded until now."""
        if self.failed:
            return
        try:
            self._engine.flush()
        except Error as error:
            self._fail(error)
        # what comes after the flush belongs to nobody's question: a flood must not hold us here
        until = time.monotonic() + _DRAIN
        while not self.failed and self._read(0.0) and time.monotonic() < until:
            pass

    def _read(self, timeout: float) -> int:
        """How many events came."""
        count = 0
        try:
            for event in self._engine.read(timeout):
                self._put(event)
                count += 1
        except Error as error:
            self._fail(error)
        except Exception as error:
            self._receiving.add(error, f"engine {self._engine.name}")
            self._fail(Error(f"engine {self._engine.name} broke: {described(error)}"))
        return count

    def _fail(self, error: Error) -> None:
        self._failed_at = time.monotonic()
        if self._on_failure is not None:
            self._on_failure(error)
        else:
            log.error("engine %s: %s", self._engine.name, error)

    def _ask_engine(self) -> None:
        """Keep the engine's own figures fresh; engines belong to this thread."""
        if self.failed or time.monotonic() - self._asked < _ASK:
            return
        self._asked = time.monotonic()
        try:
            self.engine_stats = self._engine.stats()
        except Error as error:
            log.debug("engine stats: %s", error)

    def _lose(self, records: int) -> None:
        if records:
            with self.account_lock:
                self.account.lose("failed", records)

    def _put(self, event: Batch | ProcessEvent | SnapBatch) -> None:
        if isinstance(event, Batch):
            records = np.array(event.records)
            head: np.void = np.array([event.head], BATCH)[0]
            with self.account_lock:
                self.account.add(head, records)
            lost = self.queue.put(Batch(head, records), records.nbytes + head.nbytes, len(records))
            self._receiving.clear()
        elif isinstance(event, ProcessEvent):
            lost = self.queue.put(event, _PROCESS_BYTES)
        else:
            lost = 0
            self.snaps.keep(event)
        if lost:
            with self.account_lock:
                self.account.lose("queue", lost)

    def _change_engine(self) -> None:
        engine, self._next = self._next, None
        assert engine is not None
        if not self.failed:
            self._finish(_begin(engine))
        old, self._engine = self._engine, engine
        try:
            old.__exit__(None, None, None)
        except Exception as error:
            self._receiving.add(error, "closing the engine")
        if self._snapping:
            engine.want_snaps(True)
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
                self.account.close(self._engine.closing)
        except Error as error:
            log.warning("the engine's tail could not be read: %s", error)
        except Exception as error:
            self._receiving.add(error, "the engine's tail")

    # Worker thread

    def _work(self) -> bool:
        """Go round once; whether to go on."""
        self.beat = time.monotonic()
        items = self.queue.get_many(
            _CHUNK, self._merge.interval_ns / 1e9 if len(self._merge) else _POLL
        )
        for item in items:
            if isinstance(item, ProcessEvent):
                self._attempt("a process event", self._learn, item)
        batches = [item for item in items if isinstance(item, Batch)]
        if batches and not self._attempt("naming", self._arrive, batches):
            for batch in batches:  # one of them is to blame, and is lost alone
                if not self._attempt("naming", self._arrive, [batch]):
                    self._lose(len(batch.records))
        markers = [item for item in items if isinstance(item, _Barrier)]
        ended = not items and self.queue.closed
        idle = not items and len(self._merge) > 0
        self._emit(self._merge.drain() if markers or ended or idle else self._merge.take())
        for marker in markers:
            self._attempt("a question", marker.passed)
        return not ended

    def _attempt(self, what: str, work: Callable[..., object], *arguments: object) -> bool:
        """Do work(*arguments); whether it went well."""
        try:
            work(*arguments)
        except Exception as error:
            self._working.add(error, what)
            return False
        return True

    def _arrive(self, batches: list[Batch]) -> None:
        """Name at once, while sockets and processes are still there to be asked about."""
        # as plain bytes: NumPy compares the fields of structures for each pair
        raw = np.concatenate([batch.records.view(_RAW) for batch in batches])
        records = raw.view(RECORD)
        if self.namer is not None:
            self.namer.name(records)
        self.processes.add_records(records)
        self._head = batches[-1].head
        self._merge.add(records, max(int(batch.head["mono_ns"]) for batch in batches))

    def _learn(self, event: ProcessEvent) -> None:
        process = self.processes.add_event(event)
        if self.portmap is not None and event.event == lib.SNIFFER_EVENT_EXIT:
            self.portmap.forget_process(process.key)

    def _emit(self, records: np.ndarray) -> None:
        """Hand on; what did not reach every subscriber is lost."""
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
        if not all([self._attempt("a subscriber", take, batch) for take in self._takes]):
            self._lose(len(records))
            return
        with self.account_lock:
            self.account.deliver(records["how"])
        self._working.clear()


def _begin(engine: Engine) -> int | None:
    """Where the next engine's stream begins, so that no packet is told by both."""
    try:
        return engine.begin()
    except Error as error:  # it has gone again already: reading it will tell
        log.debug("engine %s: %s", engine.name, error)
        return None
