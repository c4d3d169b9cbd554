# SPDX-License-Identifier: MIT
"""Finds what NAT made of the ends of flows, from both tuples of conntrack's entries.

A translated connection has up to three pairs of ends: the sender's, the translated one, and one
between two translations. A flow with one of the first two gets the other. A flow with the third
gets the translated one.

Its own network namespace's entry comes first. A flow of another namespace has the translation too
(a container behind its host). Both must belong to one user, and no third one can be meant. Where
several fit at one time and say different things, nothing is said. What one namespace makes of the
ends may be translated once more in the next: then the last ends are reported.

In one zone of a namespace only one connection at a time has an original tuple. So a beginning ends
the connection that had it before. This matters because the kernel reports no end of connections
older than the first listener (nf_conntrack_events=2). They are checked now and then.
"""

from __future__ import annotations

import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nlproto.kernel.conntrack import ConntrackEvent
from nlproto.records.ends import (
    TRANSLATED,
    FlowKey,
    Translated,
    Way,
    as_translated,
    flow_keys,
    is_incoming,
    record_keys,
)

__all__ = ["LIMIT", "Translations"]

LIMIT = 1 << 15
"""The most connections in the table."""
_KEPT_NS = 10_000_000_000
"""How long an ended connection's packets may still be under way to us."""
_EARLY_NS = 5_000_000
"""The first packet's time may be before conntrack's entry."""
_CLOCKS_NS = 1_000_000
"""How far a packet's time and our clock may differ."""
_TIMES = "first_ns", "last_ns", "opened"
_BITS = 20
_FLOWS = 8
_ODD = 0x9E3779B1

_End = bytes
"""16 bytes of address, 2 of port."""
_Ends = tuple[int, int, _End, _End]
"""proto, family, the lower end, the higher."""
_Place = tuple[int, int, int, int, tuple[_End, _End]]
"""netns, zone, family, proto, original tuple. One connection at a time has such a key."""


@dataclass(slots=True)
class _Entry:
    """The event happened between the two moments of a pair, by the reader's clock."""

    netns: int
    owner: int
    event: ConntrackEvent
    begun_ns: tuple[int, int]
    alive_ns: int = 0
    """At this moment it surely existed."""
    flows: set[FlowKey] = field(default_factory=set)
    """Last sight of datagrams, for an entry whose end would not be reported."""
    doubted: bool = False
    """Its end would not be reported, and a connection with its ends has begun since."""
    ended_ns: tuple[int, int] | None = None

    def forms(self) -> set[tuple[_End, _End]]:
        """The pairs of ends that a flow of it may have, lower end first."""
        (source, target), (far, near) = self.event.original, self.event.reply
        return {_sorted(source, target), _sorted(near, far), _sorted(source, far)}

    def other(self, near: _End, far: _End) -> tuple[_End, _End]:
        """Return the translated ends for one of these pairs."""
        (source, target), (server, client) = self.event.original, self.event.reply
        pair = {near, far}
        if pair == {source, target}:
            became = {source: client, target: server}
        elif pair == {client, server}:
            became = {client: source, server: target}
        else:
            became = {source: client, server: server}
        return became.get(near, near), became.get(far, far)

    def may_be(self, first_ns: int, last_ns: int, heard_ns: int, opens: bool) -> bool:
        """Return whether packets of that time can be its own; all events until then were read.

        `opens`: the packets begin a connection.
        """
        if last_ns + _EARLY_NS < self.begun_ns[0] or self.doubted:
            return False
        if opens and first_ns > self.begun_ns[1] + _CLOCKS_NS:
            return False
        if self.ended_ns is None:
            return last_ns <= heard_ns + _CLOCKS_NS
        return first_ns <= self.ended_ns[1]

    def may_be_others(self, last_ns: int) -> bool:
        """Return whether its successor can have sent packets of that time, which may be its own.

        If one reading reported its beginning and its end, they count as its own.
        """
        return self.ended_ns is not None and self.begun_ns[0] < self.ended_ns[0] < last_ns

    def is_sure(self, first_ns: int, last_ns: int, opens: bool) -> bool:
        """Return whether it existed all of that time. `opens`: the packets begin a connection."""
        if opens:
            return self.begun_ns[1] >= first_ns
        if first_ns < self.begun_ns[1]:
            return False
        return self.ended_ns is None or last_ns <= self.ended_ns[0]


class Translations:
    """At most `limit` connections. One thread feeds it, any may ask.

    `owner_of`: the uid that owns a network namespace, 0 for ours and root's, None: not known.
    """

    def __init__(self, owner_of: Callable[[int], int | None], limit: int = LIMIT) -> None:
        self.limit = limit
        self.evicted = 0
        self.overflows = 0
        """How often a socket had no room for events."""
        self.heard_ns: dict[int, int] = {}
        """Until when all events of a namespace were read. An entry may have ended since."""
        self._owner_of = owner_of
        self._entries: dict[int, _Entry] = {}
        """Entries by their id()."""
        self._there: dict[_Place, _Entry] = {}
        """Entries that are not known to have ended."""
        self._older: dict[int, set[int]] = {}
        """For each namespace, the ids of entries whose end may not be reported."""
        self._orders: dict[int, OrderedDict[int, None]] = {}
        self._ended: OrderedDict[int, int] = OrderedDict()
        self._by_ends: dict[_Ends, list[_Entry]] = {}
        self._ports = np.zeros(1 << _BITS, np.uint16)
        """How many pairs of ends have these ports, or ports with the same hash."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def cut(self) -> bool:
        """Whether some translated connections are not known."""
        return bool(self.evicted or self.overflows)

    def counts(self) -> Counter[str]:
        """Return sizes and losses, for stats."""
        return Counter(
            connections=len(self), evicted=self.evicted, overflows=self.overflows, limit=self.limit
        )

    # # Incoming facts

    def add(self, netns: int, event: ConntrackEvent, since_ns: int, now_ns: int) -> None:
        """Conntrack of `netns` reported `one`, at a moment after `since_ns` and until `now_ns`."""
        entry = self._there.get(_place_of(netns, event))
        if event.ended:
            if entry is not None and entry.event.number == event.number:
                self._end(entry, since_ns, now_ns)
        elif entry is None or entry.event != event:
            if entry is not None:
                self._end(entry, since_ns, now_ns)
            self._insert(_Entry(netns, self._owner(netns), event, (since_ns, now_ns), now_ns))
        self._forget(now_ns - _KEPT_NS)

    def hear_until(self, netns: int, moment_ns: int) -> None:
        """All earlier events of this namespace were read."""
        self.heard_ns[netns] = moment_ns

    def add_known(
        self, netns: int, known: list[ConntrackEvent], cut: bool, began_ns: int, now_ns: int
    ) -> None:
        """Enter the connections between these moments. Our others had ended by the second one.

        `cut`: there were more.
        """
        self.overflows += cut
        there = {_place_of(netns, event): event for event in known}
        for place, entry in list(self._there.items()):
            if place[0] != netns:
                continue
            if there.get(place) == entry.event:
                entry.alive_ns = began_ns
                entry.doubted &= there[place].closing
                del there[place]
            elif place in there or not cut:
                self._end(entry, max(entry.begun_ns[0], entry.alive_ns), now_ns)
        since_ns = self.heard_ns.get(netns, 0)
        for event in there.values():
            entry = _Entry(netns, self._owner(netns), event, (since_ns, now_ns), began_ns)
            if not since_ns:
                entry.begun_ns = 0, 0
            self._older.setdefault(netns, set()).add(id(entry))
            self._insert(entry)

    def doubt(self, flows: np.ndarray) -> set[int]:
        """Distrust connections that one of `flows` (FLOW) may have followed without an event.

        Either the end is not reported (see above), or nothing is tracked any more: a flow that
        opens a closing connection has not passed conntrack. Returns the namespaces to check.
        """
        found: set[int] = set()
        if not self._entries:
            return found
        begins = flows["opened"] != 0
        if self._older:
            begins |= flows["proto"] == socket.IPPROTO_UDP
        some = flows[begins]
        some = some[self.maybe(some["lport"], some["rport"])]
        for key, first_ns in zip(flow_keys(some), some["first_ns"].tolist(), strict=True):
            _, proto, family, near, lport, far, rport = key[2]
            ends = _sorted(near + lport.to_bytes(2), far + rport.to_bytes(2))
            for entry in self._by_ends.get((proto, family, *ends), ()):
                if entry.ended_ns is not None or first_ns <= entry.begun_ns[1] + _CLOCKS_NS:
                    continue
                older = id(entry) in self._older.get(entry.netns, ())
                if proto == socket.IPPROTO_TCP or (older and self._is_new(entry, key)):
                    entry.doubted = True
                    found.add(entry.netns)
        return found

    def _is_new(self, entry: _Entry, key: FlowKey) -> bool:
        """Return whether nobody knew this flow as the entry's. One flow has one socket."""
        if key in entry.flows:
            return False
        if len(entry.flows) >= _FLOWS:
            entry.flows.clear()
        entry.flows.add(key)
        return True

    def any_older(self, netns: int) -> bool:
        """Return whether there are connections whose end the kernel may not report."""
        return netns in self._older

    def leave(self, netns: int) -> None:
        """The namespace has ended, or nobody listens there any more."""
        self.heard_ns.pop(netns, None)
        for entry in [one for one in self._entries.values() if one.netns == netns]:
            self._remove(entry)

    def _owner(self, netns: int) -> int:
        owner = self._owner_of(netns)
        return -1 if owner is None else owner

    def _insert(self, entry: _Entry) -> None:
        event = entry.event
        self._there[_place_of(entry.netns, event)] = self._entries[id(entry)] = entry
        self._orders.setdefault(entry.owner, OrderedDict())[id(entry)] = None
        for low, high in entry.forms():
            self._by_ends.setdefault((event.proto, event.family, low, high), []).append(entry)
            self._ports[_slot(low, high)] += 1
        while len(self._entries) > self.limit:
            self._evict()

    def _end(self, entry: _Entry, since_ns: int, now_ns: int) -> None:
        entry.ended_ns = since_ns, now_ns
        self._ended[id(entry)] = now_ns
        self._miss(entry)

    def _miss(self, entry: _Entry) -> None:
        del self._there[_place_of(entry.netns, entry.event)]
        older = self._older.get(entry.netns)
        if older is not None:
            older.discard(id(entry))
            if not older:
                del self._older[entry.netns]

    def _evict(self) -> None:
        """Remove the oldest entry of the user with most entries."""
        if self._ended:
            self._remove(self._entries[next(iter(self._ended))])
            return
        order = max(self._orders.values(), key=len)
        self._remove(self._entries[next(iter(order))])
        self.evicted += 1

    def _forget(self, before_ns: int) -> None:
        while self._ended:
            key, ended_ns = next(iter(self._ended.items()))
            if ended_ns > before_ns:
                return
            self._remove(self._entries[key])

    def _remove(self, entry: _Entry) -> None:
        key = id(entry)
        if entry.ended_ns is None:
            self._miss(entry)
        self._ended.pop(key, None)
        order = self._orders[entry.owner]
        del order[key]
        if not order:
            del self._orders[entry.owner]
        event = entry.event
        for low, high in entry.forms():
            ends = event.proto, event.family, low, high
            # a new list: others may read the old one
            rest = [one for one in self._by_ends[ends] if one is not entry]
            if rest:
                self._by_ends[ends] = rest
            else:
                del self._by_ends[ends]
            self._ports[_slot(low, high)] -= 1
        del self._entries[key]

    # # Questions

    def maybe(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return one bool for each pair of ports (uint16): may a translated connection have it?

        If it may not, no further look is needed.
        """
        if not self._by_ends:  # on most machines the table of ports takes no memory
            return np.zeros(len(one), bool)
        low, high = np.minimum(one, other).astype(np.uint32), np.maximum(one, other)
        mixed = (low << np.uint32(16) | high) * np.uint32(_ODD)
        found: np.ndarray = self._ports[mixed >> np.uint32(32 - _BITS)] != 0
        return found

    def find(self, way: Way, first_ns: int, last_ns: int, opens: bool = False) -> Translated | None:
        """Return what the ends of a flow became; None: nothing, or it is not certain.

        `opens`: these packets begin a connection.
        """
        return self._find(
            way,
            lambda one: one.may_be(first_ns, last_ns, self.heard_ns.get(one.netns, 0), opens),
            lambda one: one.is_sure(first_ns, last_ns, opens),
            lambda one: one.may_be_others(last_ns),
        )

    def find_now(self, way: Way) -> Translated | None:
        """Return what the ends of an open socket have become."""
        return self._find(
            way,
            lambda one: one.ended_ns is None and not one.doubted,
            lambda one: False,
            lambda one: False,
        )

    def _find(
        self,
        way: Way,
        may_be: Callable[[_Entry], bool],
        is_sure: Callable[[_Entry], bool],
        may_be_others: Callable[[_Entry], bool],
    ) -> Translated | None:
        netns, proto, family, near, lport, far, rport = way
        ends = near + lport.to_bytes(2), far + rport.to_bytes(2)
        passed: set[int] = set()
        became = None
        while True:
            key = (proto, family, *_sorted(*ends))
            entries = self._by_ends.get(key, ())
            fitting = [one for one in entries if one.netns not in passed and may_be(one)]
            own = [one for one in fitting if one.netns == netns]
            if not own and fitting:
                owner = self._owner_of(netns)
                own = [one for one in fitting if one.owner == owner and owner is not None]
                if len({one.netns for one in own}) > 1:
                    break
            found = {one.other(*ends) for one in own}
            if len(found) > 1:
                found = {one.other(*ends) for one in own if is_sure(one)}
            if len(found) != 1 or all(may_be_others(one) for one in own):
                break
            became = ends = found.pop()
            passed.add(own[0].netns)
        if became is None:
            return None
        (its_near, its_far) = became
        return (
            its_near[:16],
            int.from_bytes(its_near[16:]),
            its_far[:16],
            int.from_bytes(its_far[16:]),
        )

    def stamp(self, flows: np.ndarray) -> None:
        """Fill in the `nat_` fields of FLOWs that this is known of."""
        for row, _, found in self._of(flows):
            near, flows["nat_lport"][row], far, flows["nat_rport"][row] = found
            flows["nat_laddr"][row] = np.frombuffer(near, np.uint64)
            flows["nat_raddr"][row] = np.frombuffer(far, np.uint64)

    def of_flows(self, flows: np.ndarray) -> dict[FlowKey, Translated]:
        """Return what the ends of FLOWs became that this is known of."""
        return {key: found for _, key, found in self._of(flows)}

    def _of(self, flows: np.ndarray) -> Iterator[tuple[int, FlowKey, Translated]]:
        if not self._entries:
            return
        rows = np.flatnonzero(self.maybe(flows["lport"], flows["rport"]))
        some = flows[rows]
        times = zip(*(some[name].tolist() for name in _TIMES), strict=True)
        for row, key, (first, last, opened) in zip(
            rows.tolist(), flow_keys(some), times, strict=True
        ):
            found = self.find(key[2], first, last, bool(opened))
            if found is not None:
                yield row, key, found

    def of_records(self, records: np.ndarray) -> np.ndarray | None:
        """Return TRANSLATED for each record; None: nothing is known of any of them."""
        if not self._entries:
            return None
        rows = np.flatnonzero(self.maybe(records["sport"], records["dport"]))
        if not len(rows):
            return None
        some = records[rows]
        found = np.zeros(len(records), TRANSLATED)
        moments = some["time_ns"].tolist()
        for row, key, moment, incoming in zip(
            rows.tolist(), record_keys(some), moments, is_incoming(some), strict=True
        ):
            became = self.find(key[2], moment, moment)
            if became is not None:
                found[row] = as_translated(became, incoming)
        return found if found["sport"].any() else None


def _sorted(one: _End, other: _End) -> tuple[_End, _End]:
    return (one, other) if one <= other else (other, one)


def _place_of(netns: int, event: ConntrackEvent) -> _Place:
    return netns, event.zone, event.family, event.proto, event.original


def _slot(one: _End, other: _End) -> int:
    low, high = sorted((int.from_bytes(one[16:]), int.from_bytes(other[16:])))
    return ((low << 16 | high) * _ODD & 0xFFFFFFFF) >> (32 - _BITS)
