# SPDX-License-Identifier: MIT
"""Streams of named records: each distinct filter is applied and encoded once per batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np

from nlproto.errors import Error
from nlproto.filter import Filter, parse
from nlproto.pipeline import NamedBatch, Pipeline
from nlproto.processes import Key, Process
from nlproto.supervise import Failures
from nlproto.wire import BATCH, encode_batch, encode_snaps

__all__ = ["Piece", "Stream", "Streams", "Subscriber"]

_MAX_RECORDS = 8192
"""In one data frame: 1 MiB."""
_MAX_ENCODED = 1 << 16


@dataclass(frozen=True, slots=True)
class Piece:
    """What one stream takes from one batch, encoded."""

    payload: bytes
    count: int
    processes: tuple[tuple[Key, int, bytes], ...]
    """(key, generation, JSON) of every process that the records name."""
    snaps: bytes = b""
    """First bytes of the packets, as the module sends them; empty when none are there."""

    @property
    def size(self) -> int:
        return len(self.payload) + len(self.snaps)


class Subscriber(Protocol):
    def offer(self, seen: int, piece: Piece | None) -> None: ...

    def lose(self, seen: int, matched: int) -> None: ...


@dataclass(slots=True)
class Stream:
    """All subscribers with the same filter, the same rights, and with or without snaps."""

    text: str
    uid: int | None
    snaps: bool
    filter: Filter | None
    subscribers: set[Subscriber] = field(default_factory=set)


class Streams:
    """join, leave and deliver in the event loop's thread, publish in the worker's.

    `post(function)` runs a function in the event loop's thread. At most `max_pending` bytes wait
    for that thread; what comes above is lost for every subscriber, and counted for each.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        post: Callable[[Callable[[], None]], None],
        max_filters: int,
        max_pending: int = 32 << 20,
    ) -> None:
        self.max_filters = max_filters
        self._pipeline = pipeline
        self._processes = pipeline.processes
        self._post = post
        self._max_pending = max_pending
        self._pending = 0
        self._pending_lock = threading.Lock()
        self._streams: dict[tuple[str, int | None, bool], Stream] = {}
        self._snapshot: tuple[Stream, ...] = ()
        self._encoded: dict[Key, tuple[Process, int, bytes]] = {}
        self._generation = 0
        self._failures = Failures("a client's filter")

    def __len__(self) -> int:
        return len(self._snapshot)

    def join(
        self, text: str, uid: int | None, subscriber: Subscriber, snaps: bool = False
    ) -> Stream:
        """Add a subscriber. Raises UsageError for a filter that is wrong, Error for too many."""
        filter = parse(text, resolve=False)
        key = (str(filter), uid, snaps)
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= self.max_filters:
                raise Error(f"{self.max_filters} different filters are in use; use one of those")
            stream = Stream(*key, filter if key[0] else None)
            self._streams[key] = stream
            self._changed()
        stream.subscribers.add(subscriber)
        return stream

    def leave(self, stream: Stream, subscriber: Subscriber) -> None:
        stream.subscribers.discard(subscriber)
        if not stream.subscribers:
            self._streams.pop((stream.text, stream.uid, stream.snaps), None)
            self._changed()

    def _changed(self) -> None:
        """The module takes first bytes only while a stream wants them."""
        snapping = any(stream.snaps for stream in self._snapshot)
        self._snapshot = tuple(self._streams.values())
        wanted = any(stream.snaps for stream in self._snapshot)
        if wanted != snapping:
            self._pipeline.want_snaps(wanted)

    def publish(self, batch: NamedBatch) -> None:
        """Filter and encode for every stream, then hand over to the event loop."""
        streams = self._snapshot
        if not streams:
            return
        records, total = batch.records, len(batch.records)
        pieces: list[tuple[Stream, int, list[Piece]]] = []
        size = 0
        failed: list[tuple[Stream, int]] = []
        for stream in streams:
            try:
                chosen = self._choose(stream, records)
                made = [
                    self._encode(batch.head, chosen[at : at + _MAX_RECORDS], stream)
                    for at in range(0, len(chosen), _MAX_RECORDS)
                ]
            except Exception as error:  # one client's filter must not cost the others theirs
                self._failures.add(error)
                failed.append((stream, 0))
                continue
            size += sum(piece.size for piece in made)
            pieces.append((stream, len(chosen), made))
        if failed:
            self._post(lambda: _lose(failed, total))
        with self._pending_lock:
            full = self._pending + size > self._max_pending and self._pending > 0
            if not full:
                self._pending += size
        if full:
            lost = [(stream, count) for stream, count, _ in pieces]
            self._post(lambda: _lose(lost, total))
        else:
            self._post(lambda: self._deliver(pieces, total, size))

    def _choose(self, stream: Stream, records: np.ndarray) -> np.ndarray:
        mask = None
        if stream.uid is not None:
            mask = (records["tgid"] != 0) & (records["uid"] == stream.uid)
        if stream.filter is not None:
            fits = stream.filter.mask(records, self._processes)
            mask = fits if mask is None else mask & fits
        return records if mask is None else records[mask]

    def _encode(self, head: np.void, records: np.ndarray, stream: Stream) -> Piece:
        clean: np.void = np.zeros(1, BATCH)[0]
        for name in ("version", "instance", "mono_ns", "real_ns", "boot_ns"):
            clean[name] = head[name]
        named = tuple(self._named(records, stream.uid))
        snaps = b""
        if stream.snaps:
            found = [snap for snap in map(self._pipeline.snaps.find, records) if snap is not None]
            snaps = encode_snaps(clean, found) if found else b""
        return Piece(encode_batch(clean, records), len(records), named, snaps)

    def _named(self, records: np.ndarray, uid: int | None) -> Iterable[tuple[Key, int, bytes]]:
        named = records[records["tgid"] != 0]
        pairs = np.empty((len(named), 2), np.uint64)
        pairs[:, 0] = named["tgid"]
        pairs[:, 1] = named["start_ns"]
        for tgid, start_ns in set(map(tuple, pairs.tolist())):
            process = self._processes.get(tgid, start_ns)
            if process is not None and (uid is None or process.uid == uid):
                yield self._encode_process(process)

    def _encode_process(self, process: Process) -> tuple[Key, int, bytes]:
        known = self._encoded.get(process.key)
        if known is not None and (known[0] is process or known[0] == process):
            return process.key, known[1], known[2]
        if len(self._encoded) > _MAX_ENCODED:
            self._encoded.clear()
        self._generation += 1
        encoded = msgspec.json.encode(process)
        self._encoded[process.key] = (process, self._generation, encoded)
        return process.key, self._generation, encoded

    def _deliver(
        self, pieces: list[tuple[Stream, int, list[Piece]]], total: int, size: int
    ) -> None:
        with self._pending_lock:
            self._pending -= size
        for stream, _, made in pieces:
            for subscriber in tuple(stream.subscribers):
                subscriber.offer(total, made[0] if made else None)
                for piece in made[1:]:
                    subscriber.offer(0, piece)


def _lose(lost: list[tuple[Stream, int]], total: int) -> None:
    for stream, count in lost:
        for subscriber in tuple(stream.subscribers):
            subscriber.lose(total, count)
