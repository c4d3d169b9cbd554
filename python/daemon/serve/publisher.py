# SPDX-License-Identifier: MIT
"""Filters and encodes for subscribers in a thread of its own, so that no filter delays the worker.

What a subscriber may see waits in the lane of its uid. Lanes are bounded, and the users take turns.
So only the user with expensive filters loses records.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from daemon.sharing.allowance import Allowance, Meter
from daemon.sharing.rounds import Rounds
from nlproto.filters.filter import Filter
from nlproto.running.urgency import Urgency
from nlproto.tables.processes import ProcessKey

__all__ = ["Lane", "EncodedPiece", "Publisher", "Stream", "Subscriber"]

MAX_RECORDS = 2048
"""The most records in one data frame, 256 KiB. Then another stream has its turn."""
_PATIENCE = 0.1  # s between two checks whether the event loop has caught up
_COMPLAIN = 60.0  # s between two log entries about failures

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """One stream's part of one batch, encoded."""

    payload: bytes
    count: int
    processes: tuple[tuple[ProcessKey, int, bytes], ...]
    """(key, generation, JSON) of every process that the records name."""
    first_bytes: bytes = b""
    """First bytes of the packets, as the module sends them; empty if there are none."""
    ends: bytes = b""
    """JSON of the far ends' names; empty if no record has one."""
    size: int = 0
    """Bytes of all parts."""
    flows: bool = False
    names: bytes = b""
    """JSON of the far ends' names by their numbers in flows; empty if no flow has one."""


class Subscriber(Protocol):
    def offer(self, seen: int, piece: EncodedPiece | None) -> None: ...

    def lose(self, seen: int, matched: int) -> None: ...


@dataclass(eq=False, slots=True)
class Lane:
    """What waits for the streams of one uid; None: of all users who see everything."""

    uid: int | None
    user: int
    """The user whose turn it takes: the uid, or the user that it is subordinate to."""
    flows: bool = False
    """Whether it takes sums of flows in place of records."""
    streams: tuple[Stream, ...] = ()
    records: int = 0
    """How many records of this uid there were: its clients have it as `seq`."""
    items: deque[LaneItem] = field(default_factory=deque)
    bytes: int = 0
    work: Iterator[None] | None = None


@dataclass(eq=False, slots=True)
class Stream:
    """All subscribers with the same filter, the same rights, and the same wish for first bytes."""

    text: str
    lane: Lane
    first_bytes: bool
    filter: Filter | None
    subscribers: set[Subscriber] = field(default_factory=set)

    @property
    def uid(self) -> int | None:
        return self.lane.uid


@dataclass(frozen=True, slots=True)
class LaneBatch:
    """The part of a batch that the subscribers of a lane may see; `head` is a clean BATCH."""

    head: np.void
    records: np.ndarray
    """RECORD, or FLOW in a lane of flows."""


@dataclass(slots=True)
class Lost:
    """Stands where batches were dropped for lack of room."""

    records: int


LaneItem = LaneBatch | Lost | Callable[[], None]
Encode = Callable[[np.void, np.ndarray, Stream], list[EncodedPiece]]
Post = Callable[[Callable[[], None]], None]


class Publisher:
    """A thread that takes batches out of lanes; a context manager.

    All its lanes together hold `max_bytes`, each an equal part, and one more batch each.
    `post(function)` runs a function in the event loop's thread. While more than `max_pending` bytes
    wait for that thread, this one waits. Batches that a full lane drops are lost only for its
    subscribers. Each counts their records as matched and dropped, because no filter has seen them.
    `allowance`: the CPU time that the thread may take.
    """

    def __init__(
        self,
        name: str,
        encode: Encode,
        post: Post,
        max_bytes: int,
        max_pending: int,
        allowance: Allowance | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_pending = max_pending
        self.lanes = 0
        """How many lanes share the room."""
        self.lost = 0
        """Records that a lane had no room for."""
        self._encode = encode
        self._post = post
        self._pending = 0
        self._rounds: Rounds[Lane] = Rounds()
        self._changed = threading.Condition()
        self._allowance = allowance
        self._until: float | None = None
        self._complained = -_COMPLAIN
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0.0)

    def stop(self, patience: float) -> None:
        """Publish what waits, then end. What is left after `patience` s is lost."""
        with self._changed:
            self._until = time.monotonic() + patience
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def put(self, lane: Lane, batch: LaneBatch) -> None:
        """Add a batch to a lane. Any thread."""
        size = batch.records.nbytes
        with self._changed:
            room = self.max_bytes // max(1, self.lanes)
            while lane.bytes + size > room and self._drop_oldest(lane):
                pass
            lane.items.append(batch)
            lane.bytes += size
            self._rounds.add(lane.user, lane)
            self._changed.notify()

    def _drop_oldest(self, lane: Lane) -> bool:
        """Replace the dropped batches by one entry with their number of records."""
        for index, item in enumerate(lane.items):
            if isinstance(item, LaneBatch):
                lane.bytes -= item.records.nbytes
                self.lost += len(item.records)
                before = lane.items[index - 1] if index else None
                if isinstance(before, Lost):
                    before.records += len(item.records)
                    del lane.items[index]
                else:
                    lane.items[index] = Lost(len(item.records))
                return True
        return False

    def mark(self, lane: Lane, function: Callable[[], None]) -> None:
        """Run `function` in the event loop's thread behind all earlier batches. Any thread."""
        with self._changed:
            lane.items.append(function)
            self._rounds.add(lane.user, lane)
            self._changed.notify()

    # The thread

    def _run(self) -> None:
        urgency = Urgency()
        meter = Meter(self._allowance)
        while True:
            if self._allowance is None:
                urgency.look()
            self._rest(meter.pause())
            with self._changed:
                self._changed.wait_for(lambda: self._rounds or self._until is not None)
                lane = self._rounds.next()
            if lane is None:
                return
            try:
                self._step(lane)
            except Exception:
                self._complain("a step of a lane failed")

    def _rest(self, seconds: float) -> None:
        """Wait if the CPU time for these users is used up."""
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._until is not None, seconds)

    def _step(self, lane: Lane) -> None:
        """Do one stream's part of one batch. Then another one has its turn."""
        try:
            if lane.work is None:
                self._begin(lane)
            if lane.work is not None and next(lane.work, self) is self:
                lane.work = None
        finally:  # others wait behind the stream that failed
            with self._changed:
                if lane.work is not None or lane.items:
                    self._rounds.add(lane.user, lane)

    def _begin(self, lane: Lane) -> None:
        with self._changed:
            item = lane.items.popleft()
            if isinstance(item, LaneBatch):
                lane.bytes -= item.records.nbytes
                if self._until is not None and time.monotonic() > self._until:
                    self.lost += len(item.records)
                    item = Lost(len(item.records))
        if isinstance(item, LaneBatch):
            lane.work = self._publish(lane, item)
        elif isinstance(item, Lost):
            self._tell_lost(lane.streams, item.records)
        else:
            self._post(item)

    def _publish(self, lane: Lane, batch: LaneBatch) -> Iterator[None]:
        for at in range(0, len(batch.records), MAX_RECORDS):
            records = batch.records[at : at + MAX_RECORDS]
            for stream in lane.streams:
                pieces = self._made(batch.head, records, stream)
                if pieces is None or not self._wait_for_loop():
                    self._tell_lost((stream,), len(records))
                else:
                    self._offer(stream, len(records), pieces)
                yield

    def _made(
        self, head: np.void, records: np.ndarray, stream: Stream
    ) -> list[EncodedPiece] | None:
        try:
            return self._encode(head, records, stream)
        except Exception:
            self._complain(f"records are lost for the subscribers of {stream.text[:80]!r}")
            return None

    def _complain(self, message: str) -> None:
        if time.monotonic() > self._complained + _COMPLAIN:
            self._complained = time.monotonic()
            log.exception("%s", message)

    def _wait_for_loop(self) -> bool:
        """Return whether the event loop takes what it is given."""
        with self._changed:
            while self._pending > self.max_pending:
                if self._until is not None and time.monotonic() > self._until:
                    return False
                self._changed.wait(_PATIENCE)
        return True

    def _offer(self, stream: Stream, seen: int, pieces: list[EncodedPiece]) -> None:
        size = sum(piece.size for piece in pieces)
        with self._changed:
            self._pending += size

        def deliver() -> None:
            with self._changed:
                self._pending -= size
                self._changed.notify()
            for subscriber in tuple(stream.subscribers):
                subscriber.offer(seen, pieces[0] if pieces else None)
                for piece in pieces[1:]:
                    subscriber.offer(0, piece)

        self._post(deliver)

    def _tell_lost(self, streams: tuple[Stream, ...], records: int) -> None:
        def tell() -> None:
            for stream in streams:
                for subscriber in tuple(stream.subscribers):
                    subscriber.lose(records, records)

        self._post(tell)
