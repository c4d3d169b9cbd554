# SPDX-License-Identifier: MIT
"""Streams of named records. Each distinct filter is applied and encoded once for each batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from daemon.serve.publisher import EncodedPiece, Lane, LaneBatch, Publisher, Stream, Subscriber
from daemon.sharing.allowance import Allowance
from daemon.sharing.quota import Quota
from nlproto.client.told import ToldEnd
from nlproto.errors import Error
from nlproto.filters.filter import Filter
from nlproto.filters.words import MAX_COST
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records.batch import NamedBatch
from nlproto.records.ends import of_flows, record_keys
from nlproto.records.wire import BATCH, encode_batch, encode_first_bytes
from nlproto.tables.flows import encode_flows
from nlproto.tables.processes import Process, Processes, ProcessKey

__all__ = ["Streams"]

_MAX_ENCODED = 32 << 20
"""The most bytes of process details that are kept encoded."""
_MAX_PIECE = 256 << 10
"""The most bytes of process details in one piece, unless one process has more."""
_MEAN_COST = MAX_COST // 8
"""The most tests of all filters together, as a multiple of the number of filters."""


class Streams:
    """The streams of all subscribers. A context manager.

    join() and leave() are for the event loop's thread, publish() for the worker's. There are two
    publishers: one for users who see everything, one for the others. So neither waits for the
    other. Each may hold `max_bytes` of records, and have as much waiting for the event loop.
    `post(function)` runs a function in the event loop's thread. `allowance` is the CPU time of the
    second one.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        post: Callable[[Callable[[], None]], None],
        max_filters: int,
        max_bytes: int = 32 << 20,
        allowance: Allowance | None = None,
    ) -> None:
        self.max_filters = max_filters
        self._places: Quota[Stream] = Quota(max_filters)
        self._costs: Quota[Stream] = Quota(max_filters * _MEAN_COST)
        self._pipeline = pipeline
        self._processes = pipeline.processes
        self._post = post
        self._full = Publisher("streams-all", self._encode, post, max_bytes, max_bytes)
        self._others = Publisher("streams", self._encode, post, max_bytes, max_bytes, allowance)
        self._streams: dict[tuple[str, int | None, bool, bool], Stream] = {}
        self._lanes: dict[tuple[int | None, bool], Lane] = {}
        self._snapshot: tuple[Lane, ...] = ()
        self._encoder = _ProcessEncoder(_MAX_ENCODED)

    def __enter__(self) -> Streams:
        self._full.__enter__()
        self._others.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0.0)

    def stop(self, patience: float) -> None:
        """Publish what waits, for at most `patience` s. The event loop must be running."""
        self._full.stop(patience)
        self._others.stop(patience)

    def __len__(self) -> int:
        return len(self._streams)

    def figures(self) -> dict[str, Any]:
        return {
            "filters": len(self._streams),
            "max_filters": self.max_filters,
            "unfiltered_records": self._full.lost + self._others.lost,
        }

    def reconfigure(self, max_filters: int) -> None:
        self.max_filters = max_filters
        self._places.total = max_filters
        self._costs.total = max_filters * _MEAN_COST

    def join(
        self,
        filter: Filter,
        uid: int | None,
        subscriber: Subscriber,
        first_bytes: bool = False,
        user: int = 0,
        flows: bool = False,
    ) -> Stream:
        """Add a subscriber who may see records of `uid`; None: all. Raises Error for too many.

        `user` is the uid that counts in place of `uid`, for users with subordinate uids. `flows`:
        sums of flows in place of records.
        """
        text = str(filter)
        stream = self._streams.get((text, uid, first_bytes, flows))
        if stream is None:
            counted = None if uid is None else user
            if not self._places.has_room(counted):
                raise Error("too many different filters are in use; use one of them")
            if not self._costs.has_room(counted, filter.cost):
                raise Error("the filters in use have too many tests together; shorten this one")
            lane = self._lane(uid, user, flows)
            stream = Stream(text, lane, first_bytes, filter if text else None)
            self._streams[text, uid, first_bytes, flows] = stream
            lane.streams = (*lane.streams, stream)
            self._changed()
            self._places.take(stream, counted)
            self._costs.take(stream, counted, filter.cost)
        stream.subscribers.add(subscriber)
        return stream

    def _lane(self, uid: int | None, user: int, flows: bool) -> Lane:
        lane = self._lanes.get((uid, flows))
        if lane is None:
            lane = self._lanes[uid, flows] = Lane(uid, user, flows)
        return lane

    def leave(self, stream: Stream, subscriber: Subscriber) -> None:
        stream.subscribers.discard(subscriber)
        if stream.subscribers:
            return
        lane = stream.lane
        key = stream.text, stream.uid, stream.first_bytes, lane.flows
        if self._streams.pop(key, None) is None:
            return
        lane.streams = tuple(other for other in lane.streams if other is not stream)
        if not lane.streams:
            del self._lanes[lane.uid, lane.flows]
        self._places.give_back(stream)
        self._costs.give_back(stream)
        self._changed()

    def _changed(self) -> None:
        """Ask the module for packets, and for first bytes, only while a stream wants them."""
        before = any(stream.first_bytes for lane in self._snapshot for stream in lane.streams)
        self._snapshot = tuple(self._lanes.values())
        self._full.lanes = sum(lane.uid is None for lane in self._snapshot)
        self._others.lanes = len(self._snapshot) - self._full.lanes
        self._pipeline.want_packets(any(not lane.flows for lane in self._snapshot))
        wanted = any(stream.first_bytes for stream in self._streams.values())
        if wanted != before:
            self._pipeline.want_first_bytes(wanted)

    # Worker thread

    def publish(self, batch: NamedBatch) -> None:
        """Give the batch, or what each uid may see of it, to the publishers."""
        present: set[int] | None = None
        for lane in self._snapshot:
            if lane.flows:
                self._put_flows(lane, batch)
            elif not len(batch.records):
                continue
            elif lane.uid is None:
                self._full.put(lane, LaneBatch(_clean(batch.head), batch.records))
            else:
                if present is None:
                    present = set(np.unique(batch.records["uid"]).tolist())
                if lane.uid in present:
                    self._put_own(lane, batch)

    def _put_flows(self, lane: Lane, batch: NamedBatch) -> None:
        """Put the batch's sums, without hashes, from which a user could forge collisions."""
        flows = batch.flows
        if flows is None or not len(flows):
            return
        head = _clean(batch.head)
        if lane.uid is None:
            flows = flows.copy()
        else:
            flows = flows[(flows["tgid"] != 0) & (flows["uid"] == lane.uid)]
            if not len(flows):
                return
            head = _clean(batch.head, int(flows["last_ns"].max()))
        flows["hash"] = 0
        (self._full if lane.uid is None else self._others).put(lane, LaneBatch(head, flows))

    def _put_own(self, lane: Lane, batch: NamedBatch) -> None:
        """Put a user's own records. Numbers and clocks show nothing of what others send."""
        records = batch.records
        own = records[(records["tgid"] != 0) & (records["uid"] == lane.uid)]
        if not len(own):
            return
        own["seq"] = (lane.records + np.arange(len(own))).astype(own["seq"].dtype)
        own["cpu"] = 0
        lane.records += len(own)
        self._others.put(lane, LaneBatch(_clean(batch.head, int(own["time_ns"].max())), own))

    def mark(self, stream: Stream | None, function: Callable[[], None]) -> None:
        """Run `function` in the event loop's thread, behind all batches of `stream` so far."""
        if stream is None:
            self._post(function)
        else:
            (self._full if stream.uid is None else self._others).mark(stream.lane, function)

    # The publishers' threads

    def _encode(self, head: np.void, records: np.ndarray, stream: Stream) -> list[EncodedPiece]:
        if stream.filter is not None:
            details = self._processes if stream.uid is None else _Own(self._processes)
            records = records[stream.filter.mask(records, details)]
        return self._pieces(head, records, stream) if len(records) else []

    def _pieces(self, head: np.void, records: np.ndarray, stream: Stream) -> list[EncodedPiece]:
        named = self._named(records, stream.uid)
        details = sum(len(encoded) for _, _, encoded in named)
        if details > _MAX_PIECE and len(records) > 1:
            middle = len(records) // 2
            parts = records[:middle], records[middle:]
            return [piece for part in parts for piece in self._pieces(head, part, stream)]
        if stream.lane.flows:
            names = self._names(records, stream.uid)
            payload = encode_flows(head, records)
            size = len(payload) + len(names) + details
            return [EncodedPiece(payload, len(records), named, size=size, flows=True, names=names)]
        first_bytes = b""
        if stream.first_bytes:
            looked_up = map(self._pipeline.first_bytes.find, records)
            found = [one for one in looked_up if one is not None]
            first_bytes = encode_first_bytes(head, found) if found else b""
        payload = encode_batch(head, records)
        ends = self._ends(records, stream.uid)
        size = len(payload) + len(first_bytes) + len(ends) + details
        return [EncodedPiece(payload, len(records), named, first_bytes, ends, size)]

    def _names(self, flows: np.ndarray, uid: int | None) -> bytes:
        """Return names of far ends that the stream may know. Removes other names from `flows`."""
        ends = self._processes.ends if uid is None else self._processes.ends.for_own()
        found = {number: ends.text(number) for number in set(flows["domain"].tolist()) - {0}}
        told = {number: name for number, name in found.items() if name}
        if len(told) < len(found):
            flows["domain"][~np.isin(flows["domain"], list(told))] = 0
        return msgspec.json.encode(told) if told else b""

    def _ends(self, records: np.ndarray, uid: int | None) -> bytes:
        """Return what the stream may know of far ends."""
        ends = self._processes.ends if uid is None else self._processes.ends.for_own()
        domains, became = ends.domains(records), ends.translations(records)
        if not any(domains) and became is None:
            return b""
        nat = [None] * len(records) if became is None else of_flows(became, records)
        told = {
            key: (domain, one)
            for key, domain, one in zip(record_keys(records), domains, nat, strict=True)
            if domain or one is not None
        }
        return msgspec.json.encode([ToldEnd.of(key, *one) for key, one in told.items()])

    def _named(
        self, records: np.ndarray, uid: int | None
    ) -> tuple[tuple[ProcessKey, int, bytes], ...]:
        """Return the processes that `records` name and that the stream may know."""
        named = records[records["tgid"] != 0]
        pairs = np.empty((len(named), 2), np.uint64)
        pairs[:, 0] = named["tgid"]
        pairs[:, 1] = named["start_ns"]
        processes = self._processes.get_many({(pair[0], pair[1]) for pair in pairs.tolist()})
        return tuple(
            self._encoder.encode(process)
            for process in processes
            if uid is None or process.uid == uid
        )


class _Own:
    """Processes, with what a user of limited rights may know of far ends."""

    def __init__(self, processes: Processes) -> None:
        self.get = processes.get
        self.ends = processes.ends.for_own()


class _ProcessEncoder:
    """Encodes each state of a process once, while there is room for the results. Any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._encoded: dict[ProcessKey, tuple[Process, int, bytes]] = {}
        self._generation = 0
        self._lock = threading.Lock()

    def encode(self, process: Process) -> tuple[ProcessKey, int, bytes]:
        """Return (key, number of this state, JSON)."""
        key = process.key
        with self._lock:
            known = self._encoded.get(key)
            if known is not None and (known[0] is process or known[0] == process):
                return key, known[1], known[2]
            encoded = msgspec.json.encode(process)
            if self._bytes > self._max_bytes:
                self._encoded.clear()
                self._bytes = 0
            self._generation += 1
            self._bytes += len(encoded) + (0 if known is None else -len(known[2]))
            self._encoded[key] = process, self._generation, encoded
            return key, self._generation, encoded


def _clean(head: np.void, until_ns: int | None = None) -> np.void:
    """Return a head without counters, its clocks set back to `until_ns` of CLOCK_MONOTONIC."""
    clean: np.void = np.zeros(1, BATCH)[0]
    for name in ("version", "instance", "mono_ns", "real_ns", "boot_ns"):
        clean[name] = head[name]
    if until_ns is not None:
        back = int(head["mono_ns"]) - until_ns
        for name in ("mono_ns", "real_ns", "boot_ns"):
            clean[name] = int(head[name]) - back
    return clean
