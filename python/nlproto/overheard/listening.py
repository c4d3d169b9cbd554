# SPDX-License-Identifier: MIT
"""Listens in each network namespace to what names and translates far ends.

The pipeline's worker reads what waits in the rings before it hands a batch on. So what a process
asked for is known before what it did next is told.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from nlproto.engines.namespaces import CapturedNamespaces
from nlproto.errors import Error
from nlproto.host import netns
from nlproto.overheard import dns, hello
from nlproto.overheard.domains import Beginnings, Domains
from nlproto.overheard.live import LiveEnds
from nlproto.overheard.names import Names
from nlproto.overheard.streams import Streams
from nlproto.overheard.tap import Packet, Tap
from nlproto.records.ends import Way
from nlproto.running.budget import Budget
from nlproto.running.supervise import Failures

__all__ = ["Overheard"]

_OWN_RING, _OTHER_RING = 1 << 19, 1 << 17
_AT_ONCE = 128  # packets of one ring before it is the next one's turn
_SHARE, _SAVED_NS = 8, 500_000_000
"""Of one processor; so much may be saved up for a burst."""
_UDP, _TCP = int(socket.IPPROTO_UDP), int(socket.IPPROTO_TCP)
_SYN, _ACK, _RST = 2, 16, 4
_PREFIX = 2  # bytes before a message over TCP (RFC 1035, 4.2.2)


class _Place:
    """What is open in one namespace."""

    def __init__(self, inode: int, ring_bytes: int, tls: bool) -> None:
        self.inode = inode
        self.taps = [Tap(ring_bytes)]
        try:
            if tls:
                self.taps.append(Tap(ring_bytes, tls=True))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for tap in self.taps:
            tap.close()


class Overheard:
    """A context manager. `tls`: read names in ClientHellos to port 443, too.

    hear() belongs to one thread, `ends` to any. Where it may not listen it says so once through
    `notify`, and knows nothing.
    """

    def __init__(
        self,
        notify: Callable[[str], None],
        tls: bool = False,
        beginnings: Beginnings | None = None,
    ) -> None:
        self._notify = notify
        self._tls = tls
        self.names = Names()
        self.domains = Domains(self.names, beginnings)
        self.ends = LiveEnds(self.domains)
        self.malformed = 0
        self._places: dict[int, _Place] = {}
        self._taps: dict[int, tuple[_Place, Tap]] = {}
        self._poll = select.poll()
        self._own = netns.own()
        self._others: CapturedNamespaces[_Place] = CapturedNamespaces(self._open, self._own, notify)
        self._answers: Streams = Streams(256, _PREFIX + 65535)
        self._hellos: Streams = Streams(256, hello.MAX_HELLO + 4096)
        self._budget = Budget(_SHARE, _SAVED_NS, time.thread_time_ns)
        self._failures = Failures("names of far ends")

    def __enter__(self) -> Self:
        try:
            self._take(_Place(self._own, _OWN_RING, self._tls))
        except Error as error:
            self._notify(str(error))
            return self
        self._others.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._others.close(self._places.values())
        self._places.clear()
        self._taps.clear()

    def _open(self, inode: int, path: Path, ours: bool) -> _Place:
        return netns.run_inside(path, lambda: _Place(inode, _OTHER_RING, self._tls))

    def _take(self, place: _Place) -> None:
        self._places[place.inode] = place
        for tap in place.taps:
            self._taps[tap.fileno()] = place, tap
            self._poll.register(tap.fileno(), select.POLLIN)

    def _leave(self, inode: int) -> None:
        place = self._places.pop(inode, None)
        if place is not None:
            for tap in place.taps:
                self._poll.unregister(tap.fileno())
                del self._taps[tap.fileno()]
            self._others.give_back(place)

    def hear(self, flows: np.ndarray) -> None:
        """Read what waits; then fill in what is known of `flows` (FLOW)."""
        for inode, place in self._others.changes():
            self._leave(inode)
            if place is not None:
                self._take(place)
        self._read()
        self.domains.stamp(flows)

    def _read(self) -> None:
        if not self._taps or not self._budget.allows():
            return
        with self._budget.spend():
            for number, _ in self._poll.poll(0):
                place, tap = self._taps[number]
                for packet in tap.read(_AT_ONCE):
                    try:
                        self._heard(place.inode, packet)
                    except Exception as error:  # one packet must not cost others their names
                        self._failures.add(error)

    def _heard(self, inode: int, packet: Packet) -> None:
        near, far = (packet.target, packet.dport), (packet.source, packet.sport)
        if packet.sport != 53:
            way: Way = (inode, packet.proto, packet.family, *far, *near)
            self._hello(way, packet)
            return
        way = (inode, packet.proto, packet.family, *near, *far)
        if packet.proto == _UDP:
            self._answer(way, packet.payload, packet.time_ns)
        else:
            self._stream(way, packet)

    def _answer(self, way: Way, message: bytes, time_ns: int) -> None:
        try:
            self.domains.add_answer(way, dns.parse(message), time_ns)
        except dns.Malformed:
            self.malformed += 1

    def _stream(self, way: Way, packet: Packet) -> None:
        if packet.flags & _SYN:
            self._answers.begin(way, packet.seq + 1)
        elif packet.flags & _RST:
            self._answers.end(way)
        elif packet.payload:
            data = self._answers.add(way, packet.seq, packet.payload)
            while data is not None and len(data) >= _PREFIX:
                size = int.from_bytes(data[:_PREFIX])
                if len(data) < _PREFIX + size:
                    break
                message = bytes(data[_PREFIX : _PREFIX + size])
                del data[: _PREFIX + size]
                self._answer(way, message, packet.time_ns)

    def _hello(self, way: Way, packet: Packet) -> None:
        if way not in self._hellos:
            if not packet.payload.startswith(b"\x16\x03"):
                return
            self._hellos.begin(way, packet.seq)
        data = self._hellos.add(way, packet.seq, packet.payload)
        if data is None:
            return
        name = hello.server_name(bytes(data))
        if name is not None:
            self._hellos.end(way)
        if name:
            self.domains.add_hello(way, name, packet.time_ns)

    def figures(self) -> dict[str, Any]:
        """Return sizes and losses, for stats."""
        dropped = sum(tap.count_dropped() for _, tap in list(self._taps.values()))
        return {
            **self.domains.counts(),
            "names": len(self.names),
            "malformed": self.malformed,
            "dropped": dropped,
            "namespaces": len(self._places),
        }
