# SPDX-License-Identifier: MIT
"""Listens in each network namespace to DNS, TLS and conntrack.

The pipeline's worker reads the rings before it hands a batch on. So the name that a process asked
for is known before the flow that used it is delivered.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from nlproto.engines.namespaces import CapturedNamespaces
from nlproto.errors import Error
from nlproto.host import netns
from nlproto.kernel import conntrack
from nlproto.overheard import dns, hello
from nlproto.overheard.dns_questions import DnsQuestions
from nlproto.overheard.domains import Beginnings, Domains
from nlproto.overheard.live import LiveEnds
from nlproto.overheard.names import NumberedNames
from nlproto.overheard.streams import TcpStreams
from nlproto.overheard.tap import Tap, TappedPacket
from nlproto.overheard.translations import LIMIT, Translations
from nlproto.records.ends import Way
from nlproto.running.budget import Budget, UserBudgets
from nlproto.running.supervise import Failures

__all__ = ["Overheard"]

_OWN_RING, _OTHER_RING = 1 << 19, 1 << 17
_OWN_EVENTS, _OTHER_EVENTS = 4 << 20, 1 << 18
"""Room in bytes for conntrack's waiting events."""
_LOOK_NS = 1_000_000_000  # between two checks whether this kernel translates addresses now
_RENEW_NS = 30_000_000_000
"""Time between two full readings of a namespace whose events were lost."""
_OLDER_NS, _OLDER_SHARE, _DOUBT_SHARE = 2_000_000_000, 200, 20
"""Time between two checks of connections whose end the kernel does not report.

In ns; as a multiple of a check's duration; the same if another connection may have followed."""
_EVENTS_AT_ONCE = 1024
_AT_ONCE = 128  # packets of one ring, before the next ring's turn
_SHARE, _EVENTS_SHARE, _SAVED_NS = 32, 16, 500_000_000
"""Part of one processor's time, and how much may be saved up for a burst.

Users' namespaces together have as much again, and one user at most half of that."""
_UDP, _TCP = int(socket.IPPROTO_UDP), int(socket.IPPROTO_TCP)
_SYN, _ACK, _RST = 2, 16, 4
_PREFIX = 2  # bytes before a message over TCP (RFC 1035, 4.2.2)
_OPENED = 4096  # the most TCP connections to servers that are not established yet


class _Place:
    """The sockets open in one namespace."""

    def __init__(self, inode: int, names: str, nat: bool, own: bool = False) -> None:
        self.inode = inode
        self.taps: list[Tap] = []
        self.connections: conntrack.Conntrack | None = None
        self.refused = ""
        """Why translations are not known; "" if they are."""
        self.known: tuple[list[conntrack.ConntrackEvent], bool] = [], False
        self.known_ns = 0
        """The moment of the last full reading, and whether there was more than fits."""
        self.look_ns = 0
        """When to check again for ended connections whose end is not reported."""
        self.doubts = False
        self.may_look_ns = 0
        """Not before this moment."""
        self.heard_ns = 0
        """Whether all earlier events of conntrack were read."""
        self.opened_ns = time.monotonic_ns()
        ring_bytes = _OWN_RING if own else _OTHER_RING
        try:
            if names != "off":
                self.taps.append(Tap(ring_bytes))
            if names == "sni":
                self.taps.append(Tap(ring_bytes, tls=True))
            if nat:
                self._hear_nat(_OWN_EVENTS if own else _OTHER_EVENTS)
        except BaseException:
            self.close()
            raise

    def _hear_nat(self, receive_bytes: int) -> None:
        try:
            self.connections = conntrack.Conntrack(receive_bytes)
            self.known = self.connections.read_known(LIMIT)
            self.known_ns = time.monotonic_ns()
        except Error as error:
            self.refused = str(error)

    def close(self) -> None:
        for tap in self.taps:
            tap.close()
        if self.connections is not None:
            self.connections.close()


class Overheard:
    """A context manager. `listen_to`: "dns", "sni" (also ClientHellos to port 443) or "off".

    It listens to NAT in any case, once this kernel uses it. hear() is for one thread, `ends` for
    any. Where it may not listen, it says so once through `notify`, and knows nothing.
    """

    def __init__(
        self,
        notify: Callable[[str], None],
        listen_to: str = "dns",
        beginnings: Beginnings | None = None,
        finder: netns.Finder | None = None,
    ) -> None:
        self._notify = notify
        self._listen_to = listen_to
        self._nat = conntrack.is_there()
        self.names = NumberedNames()
        self.domains = Domains(self.names, beginnings)
        self.translations = Translations(self._owner_of)
        self.ends = LiveEnds(self.domains, self.translations)
        self.malformed = 0
        self.unasked = 0
        """Answers to a question that no socket of this machine was seen to ask."""
        self._questions = DnsQuestions()
        self._opened: OrderedDict[Way, int] = OrderedDict()
        """What a server that accepts has to acknowledge."""
        self._places: dict[int, _Place] = {}
        self._told = ""
        self._looked_ns = time.monotonic_ns()
        self._events: dict[int, tuple[_Place, conntrack.Conntrack]] = {}
        self._taps: dict[int, tuple[_Place, Tap]] = {}
        self._poll = select.poll()
        self._own = netns.own()
        self._others: CapturedNamespaces[_Place] = CapturedNamespaces(
            self._open, self._own, notify, finder=finder
        )
        self._answers: TcpStreams = TcpStreams(256, _PREFIX + 65535)
        self._hellos: TcpStreams = TcpStreams(256, hello.MAX_HELLO + 4096)
        self._budget = Budget(_SHARE, _SAVED_NS, time.monotonic_ns, time.thread_time_ns)
        self._users_budget = UserBudgets(2 * _SHARE, _SHARE, _SAVED_NS, time.monotonic_ns)
        self._events_budget = Budget(
            _EVENTS_SHARE, _SAVED_NS, time.monotonic_ns, time.thread_time_ns
        )
        self._failures = Failures("names of far ends")

    def __enter__(self) -> Self:
        try:
            self._take(self._open_own())
        except Error as error:
            self._notify(str(error))
            return self
        if self._nat or self._listen_to != "off":
            self._others.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._others.close(self._places.values())
        self._places.clear()
        self._taps.clear()
        self._events.clear()

    def _open_own(self) -> _Place:
        return _Place(self._own, self._listen_to, self._nat, own=True)

    def _open(self, inode: int, path: Path, ours: bool) -> _Place:
        return netns.run_inside(path, inode, lambda: _Place(inode, self._listen_to, self._nat))

    def _owner_of(self, inode: int) -> int | None:
        return 0 if inode == self._own else self._others.owner(inode)

    def _take(self, place: _Place) -> None:
        self._leave(place.inode, of_good=False)
        self._places[place.inode] = place
        if place.refused and place.refused != self._told:
            self._told = place.refused
            self._notify(place.refused)
        if place.connections is not None:
            self._events[place.connections.fileno()] = place, place.connections
            self._poll.register(place.connections.fileno(), select.POLLIN)
            place.heard_ns = place.opened_ns
            self.translations.add_known(place.inode, *place.known, place.opened_ns, place.known_ns)
            place.known = [], False
            place.look_ns = place.opened_ns + _OLDER_NS
            self.translations.hear_until(place.inode, place.opened_ns)
        for tap in place.taps:
            self._taps[tap.fileno()] = place, tap
            self._poll.register(tap.fileno(), select.POLLIN)

    def _leave(self, inode: int, of_good: bool = True) -> None:
        """With `of_good` False the same namespace is opened again."""
        place = self._places.pop(inode, None)
        if place is not None:
            for tap in place.taps:
                self._poll.unregister(tap.fileno())
                del self._taps[tap.fileno()]
            if place.connections is not None:
                self._poll.unregister(place.connections.fileno())
                del self._events[place.connections.fileno()]
            self._others.give_back(place)
        if of_good:
            self.translations.leave(inode)

    def hear(self, flows: np.ndarray) -> None:
        """Read what waits. Then fill in what is known of `flows` (FLOW)."""
        for inode, place in self._others.changes():
            if place is None:
                self._leave(inode)
            else:
                self._take(place)
        self._look()
        self._read()
        for inode in self.translations.doubt(flows):
            if inode in self._places:
                self._places[inode].look_ns = self._places[inode].may_look_ns
                self._places[inode].doubts = True
        self._look_for_older()
        self.domains.stamp(flows)
        self.translations.stamp(flows)

    def _look(self) -> None:
        """Return whether this kernel has begun to translate addresses."""
        now = time.monotonic_ns()
        if self._nat or now - self._looked_ns < _LOOK_NS:
            return
        self._looked_ns = now
        self._nat = conntrack.is_there()
        if self._nat and self._listen_to == "off":
            self._others.start()
            self._renew(self._own)
        elif self._nat:
            self._renew(*self._places)

    def _renew(self, *inodes: int) -> None:
        """Listen to these namespaces again, beginning with the present entries."""
        for inode in inodes:
            if inode != self._own:
                self._others.renew(inode)
                continue
            try:
                self._take(self._open_own())
            except Error as error:
                self._notify(str(error))

    def _read_events(self, place: _Place, connections: conntrack.Conntrack) -> None:
        began = time.monotonic_ns()
        events = list(connections.read(_EVENTS_AT_ONCE))
        now = time.monotonic_ns()
        for event in events:
            if event is not None:
                self.translations.add(place.inode, event, place.heard_ns, now)
        if None in events:
            self.translations.overflows += 1
            if now - place.opened_ns > _RENEW_NS:
                self._renew(place.inode)
        if len(events) < _EVENTS_AT_ONCE:
            self._heard_all(place, began)

    def _read(self) -> None:
        if not (self._taps or self._events):
            return
        began = time.monotonic_ns()
        ready = [number for number, _ in self._poll.poll(0)]
        for number in self._events.keys() - ready:
            self._heard_all(self._events[number][0], began)
        if self._events_budget.allows():
            with self._events_budget.spend():
                for number in self._events.keys() & ready:
                    self._attempt(self._read_events, *self._events[number])
        may_read = self._budget.allows()
        for number in ready:
            if number not in self._taps:
                continue
            place, tap = self._taps[number]
            owner = self._owner_of(place.inode)
            if owner == 0 and may_read:
                with self._budget.spend():
                    self._read_tap(place, tap)
            elif owner and self._users_budget.allows(owner):
                with self._users_budget.spend(owner):
                    self._read_tap(place, tap)

    def _read_tap(self, place: _Place, tap: Tap) -> None:
        for packet in tap.read(_AT_ONCE):
            try:
                self._heard(place.inode, packet)
            except Exception as error:  # one packet must not cost others their names
                self._failures.add(error)

    def _heard_all(self, place: _Place, moment_ns: int) -> None:
        place.heard_ns = moment_ns
        self.translations.hear_until(place.inode, moment_ns)

    def _look_for_older(self) -> None:
        """Check which connections have ended, where the end is not reported or is in doubt."""
        now = time.monotonic_ns()
        for place, connections in list(self._events.values()):
            if now < place.look_ns:
                continue
            if (place.doubts or self.translations.any_older(place.inode)) and (
                self._events_budget.allows()
            ):
                with self._events_budget.spend():
                    self._attempt(self._look_at_all, place, connections)

    def _look_at_all(self, place: _Place, connections: conntrack.Conntrack) -> None:
        began = time.monotonic_ns()
        place.doubts = False
        place.look_ns = began + _OLDER_NS
        known, cut = connections.read_known(LIMIT)
        now = time.monotonic_ns()
        self.translations.add_known(place.inode, known, cut, began, now)
        place.look_ns = now + max(_OLDER_NS, _OLDER_SHARE * (now - began))
        place.may_look_ns = now + _DOUBT_SHARE * (now - began)

    def _attempt(
        self,
        action: Callable[[_Place, conntrack.Conntrack], None],
        place: _Place,
        connections: conntrack.Conntrack,
    ) -> None:
        try:
            action(place, connections)
        except Exception as error:
            self._failures.add(error)

    def _heard(self, inode: int, packet: TappedPacket) -> None:
        near, far = (packet.target, packet.dport), (packet.source, packet.sport)
        if packet.outgoing:
            near, far = far, near
        way: Way = (inode, packet.proto, packet.family, *near, *far)
        if packet.outgoing and packet.dport != 53:
            self._hello(way, packet)
        elif packet.outgoing:
            self._asks(way, packet)
        elif packet.proto == _UDP:
            self._answer(way, packet.payload, packet)
        else:
            self._stream(way, packet)

    def _asks(self, way: Way, packet: TappedPacket) -> None:
        """A client sends its question over TCP in one piece, as a rule with its length."""
        payload = packet.payload
        if packet.proto == _TCP and packet.flags & _SYN:
            self._answers.end(way)
            self._opened[way] = (packet.seq + 1) % (1 << 32)
            self._opened.move_to_end(way)
            if len(self._opened) > _OPENED:
                self._opened.popitem(last=False)
        messages = [payload]
        if packet.proto == _TCP:
            while _PREFIX < len(payload):
                end = _PREFIX + int.from_bytes(payload[:_PREFIX])
                messages.append(payload[_PREFIX:end])
                payload = payload[end:]
        for message in messages:
            with contextlib.suppress(dns.MalformedDns):
                self._questions.note(way, dns.question(message), packet.time_ns)

    def _answer(self, way: Way, message: bytes, packet: TappedPacket) -> None:
        """Behind NAT of its own namespace, as with Docker, a question goes to another port."""
        try:
            question = dns.question(message, answer=True)
            asked = self._questions.take(way, question, packet.time_ns)
            if asked or _only_here(packet):
                self.domains.add_answer(way, dns.parse(message), packet.time_ns, asked)
            else:
                self.unasked += 1
        except dns.MalformedDns:
            self.malformed += 1

    def _stream(self, way: Way, packet: TappedPacket) -> None:
        if packet.flags & _SYN:
            acked = self._opened.pop(way, packet.ack if _only_here(packet) else None)
            if acked == packet.ack:
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
                self._answer(way, message, packet)

    def _hello(self, way: Way, packet: TappedPacket) -> None:
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
            "unasked": self.unasked,
            "dropped": dropped,
            "namespaces": len(self._places),
            "nat": {"on": self._nat, "cut": self.translations.cut, **self.translations.counts()},
        }


def _only_here(packet: TappedPacket) -> bool:
    """Return whether no network can have sent the packet."""
    v4 = packet.family == socket.AF_INET
    return packet.loopback and v4 and packet.source[0] == packet.target[0] == 127
