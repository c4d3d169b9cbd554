# SPDX-License-Identifier: MIT
"""What NAT made of the ends of flows: both tuples of conntrack, joined.

A translated connection is seen as up to three pairs of ends: as its sender means it, as it goes on,
and between the two changes. Whoever sees one of the first two is told the other; who sees the third
is told how it goes on.

Its own network namespace's entry comes first. A flow of another namespace has the translation too
(a container behind its host), if both belong to one user and no third one can be meant. Where
several fit at one time and say different things, nothing is said.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nlproto.overheard.conntrack import Connections, Event
from nlproto.overheard.domains import flow_keys
from nlproto.records.ends import (
    TRANSLATED,
    Translated,
    Way,
    as_translated,
    is_incoming,
    record_keys,
)

__all__ = ["LIMIT", "Translations"]

LIMIT = 1 << 15
_KEPT_NS = 10_000_000_000
"""So long an ended connection's packets may still be on their way to us."""
_EARLY_NS = 5_000_000
"""The first packet may be stamped before conntrack enters its connection."""
_CLOCKS_NS = 1_000_000
"""So much may a packet's stamp and our clock differ."""
_BITS = 20
_ODD = 0x9E3779B1

_End = bytes
"""16 bytes of address, 2 of port."""
_Ends = tuple[int, int, _End, _End]
"""proto, family, the lower end, the higher."""


@dataclass(slots=True)
class _Entry:
    """Between the moments of each pair it happened; both are of the reader's clock."""

    netns: int
    owner: int
    event: Event
    begun_ns: tuple[int, int]
    ended_ns: tuple[int, int] | None = None

    def forms(self) -> set[tuple[_End, _End]]:
        """The pairs of ends under which it is seen, lower ones first."""
        (source, target), (far, near) = self.event.original, self.event.reply
        return {_sorted(source, target), _sorted(near, far), _sorted(source, far)}

    def other(self, near: _End, far: _End) -> tuple[_End, _End]:
        """What the ends of one of its forms are on the other side."""
        (source, target), (server, client) = self.event.original, self.event.reply
        pair = {near, far}
        if pair == {source, target}:
            became = {source: client, target: server}
        elif pair == {client, server}:
            became = {client: source, server: target}
        else:
            became = {source: client, server: server}
        return became.get(near, near), became.get(far, far)

    def may_be(self, first_ns: int, last_ns: int, heard_ns: int) -> bool:
        """Whether packets of that time can be its own; all that happened until then was heard."""
        if last_ns + _EARLY_NS < self.begun_ns[0]:
            return False
        if self.ended_ns is None:
            return last_ns <= heard_ns + _CLOCKS_NS
        return first_ns <= self.ended_ns[1]

    def is_sure(self, first_ns: int, last_ns: int) -> bool:
        """Whether it was there all of that time."""
        if first_ns < self.begun_ns[1]:
            return False
        return self.ended_ns is None or last_ns <= self.ended_ns[0]


class Translations:
    """At most `limit` connections; fed in one thread, asked in any.

    `owner_of`: the uid whose a network namespace is, 0 for ours and root's, None: not known.
    """

    def __init__(self, owner_of: Callable[[int], int | None], limit: int = LIMIT) -> None:
        self.limit = limit
        self.evicted = 0
        self.overflows = 0
        """How often events found no room in a socket."""
        self.heard_ns: dict[int, int] = {}
        """Until when all events of a namespace are read: who is not known to have ended may have
        done so since."""
        self._owner_of = owner_of
        self._entries: dict[tuple[int, int, tuple[bytes, bytes]], _Entry] = {}
        self._orders: dict[int, OrderedDict[tuple[int, int, tuple[bytes, bytes]], None]] = {}
        self._ended: OrderedDict[tuple[int, int, tuple[bytes, bytes]], int] = OrderedDict()
        self._by_ends: dict[_Ends, list[_Entry]] = {}
        self._ports = np.zeros(1 << _BITS, np.uint16)
        """How many forms have this pair of ports, or one with the same hash."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def cut(self) -> bool:
        """Whether connections are not known that should be."""
        return bool(self.evicted or self.overflows)

    def counts(self) -> Counter[str]:
        """Return sizes and losses, for stats."""
        return Counter(
            connections=len(self), evicted=self.evicted, overflows=self.overflows, limit=self.limit
        )

    # What is heard

    def add(self, netns: int, event: Event, since_ns: int, now_ns: int) -> None:
        """Conntrack of `netns` told it, at some moment after `since_ns` and until `now_ns`."""
        key = netns, event.number, event.original
        entry = self._entries.get(key)
        if event.ended:
            if entry is not None and entry.ended_ns is None:
                entry.ended_ns = since_ns, now_ns
                self._ended[key] = now_ns
        elif entry is None or entry.ended_ns is not None:
            if entry is not None:
                self._remove(key)
            self._insert(key, _Entry(netns, self._owner(netns), event, (since_ns, now_ns)))
        self._forget(now_ns - _KEPT_NS)

    def hear_until(self, netns: int, moment_ns: int) -> None:
        """All that happened there before is told."""
        self.heard_ns[netns] = moment_ns

    def add_known(self, netns: int, connections: Connections) -> None:
        """Take what was there when we began to listen; what else we had has ended meanwhile."""
        there = {(netns, event.number, event.original): event for event in connections.known}
        connections.known = []
        self.overflows += connections.cut
        now_ns = time.monotonic_ns()
        for key, entry in list(self._entries.items()):
            if key[0] == netns and key not in there and not connections.cut:
                if entry.ended_ns is None:
                    entry.ended_ns = entry.begun_ns[0], now_ns
                    self._ended[key] = now_ns
        for key, event in there.items():
            if key not in self._entries:
                self._insert(key, _Entry(netns, self._owner(netns), event, (0, 0)))

    def leave(self, netns: int) -> None:
        """The namespace has gone, or is not heard any more."""
        self.heard_ns.pop(netns, None)
        for key in [one for one in self._entries if one[0] == netns]:
            self._remove(key)

    def _owner(self, netns: int) -> int:
        owner = self._owner_of(netns)
        return -1 if owner is None else owner

    def _insert(self, key: tuple[int, int, tuple[bytes, bytes]], entry: _Entry) -> None:
        self._entries[key] = entry
        self._orders.setdefault(entry.owner, OrderedDict())[key] = None
        event = entry.event
        for low, high in entry.forms():
            self._by_ends.setdefault((event.proto, event.family, low, high), []).append(entry)
            self._ports[_place(low, high)] += 1
        while len(self._entries) > self.limit:
            self._evict()

    def _evict(self) -> None:
        """The user with most gives, his oldest."""
        if self._ended:
            self._remove(next(iter(self._ended)))
            return
        order = max(self._orders.values(), key=len)
        self._remove(next(iter(order)))
        self.evicted += 1

    def _forget(self, before_ns: int) -> None:
        while self._ended:
            key, ended_ns = next(iter(self._ended.items()))
            if ended_ns > before_ns:
                return
            self._remove(key)

    def _remove(self, key: tuple[int, int, tuple[bytes, bytes]]) -> None:
        entry = self._entries.pop(key)
        self._ended.pop(key, None)
        order = self._orders[entry.owner]
        del order[key]
        if not order:
            del self._orders[entry.owner]
        event = entry.event
        for low, high in entry.forms():
            ends = event.proto, event.family, low, high
            # a new list: others may be reading the old one
            rest = [one for one in self._by_ends[ends] if one is not entry]
            if rest:
                self._by_ends[ends] = rest
            else:
                del self._by_ends[ends]
            self._ports[_place(low, high)] -= 1

    # Who asks

    def maybe(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Where these ports (uint16) can be a translated connection's."""
        if not self._by_ends:  # most machines: the table of ports takes no memory
            return np.zeros(len(one), bool)
        low, high = np.minimum(one, other).astype(np.uint32), np.maximum(one, other)
        mixed = (low << np.uint32(16) | high) * np.uint32(_ODD)
        found: np.ndarray = self._ports[mixed >> np.uint32(32 - _BITS)] != 0
        return found

    def find(self, way: Way, first_ns: int, last_ns: int) -> Translated | None:
        """What the ends of a flow became; None: nothing, or nobody can tell."""
        return self._find(
            way,
            lambda one: one.may_be(first_ns, last_ns, self.heard_ns.get(one.netns, 0)),
            lambda one: one.is_sure(first_ns, last_ns),
        )

    def find_now(self, way: Way) -> Translated | None:
        """What the ends of a socket that is there have become."""
        return self._find(way, lambda one: one.ended_ns is None, lambda one: False)

    def _find(
        self, way: Way, may_be: Callable[[_Entry], bool], is_sure: Callable[[_Entry], bool]
    ) -> Translated | None:
        netns, proto, family, near, lport, far, rport = way
        local, remote = near + lport.to_bytes(2), far + rport.to_bytes(2)
        entries = self._by_ends.get((proto, family, *_sorted(local, remote)))
        if entries is None:
            return None
        fitting = [one for one in entries if may_be(one)]
        own = [one for one in fitting if one.netns == netns]
        if not own and fitting:
            owner = self._owner_of(netns)
            own = [one for one in fitting if one.owner == owner and owner is not None]
            if len({one.netns for one in own}) > 1:
                return None
        found = {one.other(local, remote) for one in own}
        if len(found) > 1:
            found = {one.other(local, remote) for one in own if is_sure(one)}
        if len(found) != 1:
            return None
        became, its_far = found.pop()
        return became[:16], int.from_bytes(became[16:]), its_far[:16], int.from_bytes(its_far[16:])

    def stamp(self, flows: np.ndarray) -> None:
        """Fill in the `nat_` fields of FLOWs that this is known of."""
        if not self._entries:
            return
        rows = np.flatnonzero(self.maybe(flows["lport"], flows["rport"]))
        if not len(rows):
            return
        some = flows[rows]
        times = zip(some["first_ns"].tolist(), some["last_ns"].tolist(), strict=True)
        for row, key, (first, last) in zip(rows.tolist(), flow_keys(some), times, strict=True):
            found = self.find(key[2], first, last)
            if found is not None:
                near, flows["nat_lport"][row], far, flows["nat_rport"][row] = found
                flows["nat_laddr"][row] = np.frombuffer(near, np.uint64)
                flows["nat_raddr"][row] = np.frombuffer(far, np.uint64)

    def of_records(self, records: np.ndarray) -> np.ndarray | None:
        """Return TRANSLATED of each record; None: of none of them is anything known."""
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


def _place(one: _End, other: _End) -> int:
    low, high = sorted((int.from_bytes(one[16:]), int.from_bytes(other[16:])))
    return ((low << 16 | high) * _ODD & 0xFFFFFFFF) >> (32 - _BITS)
