# SPDX-License-Identifier: MIT
"""What flows did since they were last exported: sums of the daemon's sums."""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np

from fleet.export.beginners import Beginners
from fleet.wire import ROW
from nlproto.records import wire
from nlproto.records.clock import Clock
from nlproto.records.wire import joined, taken
from nlproto.tables.column_table import mix, random_seed
from nlproto.tables.flows import FLOW, KEY_FIELDS

__all__ = ["Deltas", "rows_of"]

_SUMS = ("packets_out", "bytes_out", "packets_in", "bytes_in")
_NAT = ("nat_laddr", "nat_raddr", "nat_lport", "nat_rport")
_LISTENER, _PREDATES = wire.lib.SNIFFER_HOW_LISTENER, wire.lib.SNIFFER_HOW_PREDATES
_AMBIGUOUS = np.uint32(wire.lib.SNIFFER_F_AMBIGUOUS)
_COMPACT = 16384
_HELD_NS = 5 * 10**9
"""So long the first packets of a connection wait for who accepts it."""
_HELD = 10_000
"""The most rows that wait so."""
_NAMES = 1 << 16
_OPENED_THERE = 2
"""The far end began."""


class Deltas:
    """FLOWs that wait to be exported, each once, with times in ns since 1970. Not thread-safe."""

    def __init__(self) -> None:
        self._seed = random_seed()
        self._parts: list[np.ndarray] = []
        self._waiting = 0
        """Rows since rows of one flow were last joined."""
        self._names: OrderedDict[int, str] = OrderedDict()
        self._beginners = Beginners()

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, flows: np.ndarray, clock: Clock) -> None:
        """Add FLOWs; `clock` converts their times to times of day."""
        own = joined([flows], FLOW)
        for name in ("first_ns", "last_ns"):
            own[name] += np.uint64(clock.real_offset_ns)
        self._put(own, len(self._parts))

    def give_back(self, flows: np.ndarray) -> None:
        """Add FLOWs again that take() returned and that were not exported."""
        self._put(flows, 0)

    def _put(self, flows: np.ndarray, place: int) -> None:
        self._parts.insert(place, flows)
        self._waiting += len(flows)
        if self._waiting > _COMPACT:
            self._parts = [self._merged()[0]]

    def tell(self, names: Mapping[int, str]) -> None:
        """Remember names of far ends by the numbers in `domain`."""
        self._names.update(names)
        while len(self._names) > _NAMES:
            self._names.popitem(last=False)

    def names_of(self, numbers: np.ndarray) -> dict[int, str]:
        """Return the names of `numbers`, as far as they are known."""
        wanted = set(numbers.tolist()) - {0}
        return {number: self._names[number] for number in wanted if number in self._names}

    def take(self, now_ns: int | None = None) -> np.ndarray:
        """Return what waits, the latest last, and clear it.

        `now_ns`, ns since 1970: what nobody accepted yet may stay for some seconds. None: all of
        it.
        """
        flows, keys = self._merged()
        rows = self._accepted(flows)
        self._parts = []
        if now_ns is not None:
            rows = self._without_held(flows, rows, now_ns)
        rows = rows[np.argsort(flows["last_ns"][rows])]
        flows = taken(flows, rows)
        tcp = np.flatnonzero((flows["proto"] == socket.IPPROTO_TCP) & (flows["cookie"] != 0))
        opened = flows["opened"][tcp]
        self._beginners.recall(keys[rows[tcp]], opened)
        flows["opened"][tcp] = opened
        return flows

    def _without_held(self, flows: np.ndarray, rows: np.ndarray, now_ns: int) -> np.ndarray:
        """Take back those of `rows` that wait for who accepts them; return the others."""
        listener, early = _early(flows)
        age = np.int64(now_ns) - flows["last_ns"].astype(np.int64)
        held = (listener | early & (flows["opened"] == _OPENED_THERE)) & (abs(age) < _HELD_NS)
        held = held[rows]
        if not 0 < np.count_nonzero(held) <= _HELD:
            return rows
        self.give_back(taken(flows, rows[held]))
        return np.asarray(rows[~held])

    def _accepted(self, flows: np.ndarray) -> np.ndarray:
        """Add the first packets of a TCP connection to who accepted it. Returns rows that stay.

        They came to the listener's socket or left without one, so they are flows of their own.
        """
        listener, early = _early(flows)
        if not early.any():
            return np.arange(len(flows))
        owned = flows["tgid"] != 0
        rows = np.flatnonzero(early | _is_tcp(flows) & owned)
        keys = mix(tuple(_ends(taken(flows, rows))), self._seed)
        rows = rows[order := np.lexsort((~early[rows], flows["first_ns"][rows], keys))]
        keys, places = keys[order], np.arange(len(rows))
        # the next row of the same ends that is the connection's own
        later = np.minimum.accumulate(np.where(early[rows], len(rows), places)[::-1])[::-1]
        last = np.searchsorted(keys, keys, "right") - 1
        accepted = early[rows] & (later <= last)
        # else the last one with an owner
        known = np.maximum.accumulate(np.where(owned[rows], places, -1))[last]
        later = np.where(accepted, later, known)
        found = np.flatnonzero(accepted | listener[rows] & (known > places))
        old, new = rows[found], rows[later[found]]
        for name in _SUMS:
            np.add.at(flows[name], new, flows[name][old])
        told = (flows["nat_lport"][old] != 0) & (flows["nat_lport"][new] == 0)
        for name in _NAT:
            flows[name][new[told]] = flows[name][old[told]]
        np.bitwise_or.at(flows["flags"], new, flows["flags"][old] & ~_AMBIGUOUS)
        np.maximum.at(flows["opened"], new, flows["opened"][old])
        np.maximum.at(flows["domain"], new, flows["domain"][old])
        np.minimum.at(flows["first_ns"], new, flows["first_ns"][old])
        kept = np.ones(len(flows), bool)
        kept[old] = False
        return np.flatnonzero(kept)

    def _merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Make one row for each flow. Return the rows and the hashes of their keys.

        Two flows with one hash may stay apart: sums add up.
        """
        self._waiting = 0
        flows = self._parts[0] if len(self._parts) == 1 else joined(self._parts, FLOW)
        keys = mix(tuple(_words(flows)), self._seed)
        order, begins = _groups(flows, keys)
        counts = np.diff(begins, append=len(flows))
        if len(begins) == len(flows):
            return flows, keys
        # uid, how and comm are from the latest
        latest = order[begins + counts - 1]
        merged = taken(flows, latest)
        several = np.flatnonzero(counts > 1)
        some = taken(flows, order[np.repeat(counts > 1, counts)])
        _add_up(merged, several, some, np.cumsum(counts[several]) - counts[several])
        return merged, keys[latest]


def _groups(flows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an order in which rows of one flow are adjacent, and where each flow begins in it."""
    places = np.uint64((1 << len(flows).bit_length()) - 1)
    # the hash's upper bits, then the place: sorting numbers is faster than sorting places
    mixed = np.sort(keys & ~places | np.arange(len(flows), dtype=np.uint64))
    order = (mixed & places).astype(np.int64)
    differs = np.ones(len(flows), bool)
    again = np.flatnonzero((mixed[1:] ^ mixed[:-1]) <= places) + 1
    some, before = taken(flows, order[again]), taken(flows, order[again - 1])
    # a SYN that nobody accepted yet begins another connection of the same ports
    other = (some["opened"] != 0) & _early(some)[1]
    for name in KEY_FIELDS:
        unlike = some[name] != before[name]
        other |= unlike.any(axis=1) if unlike.ndim == 2 else unlike
    differs[again] = other
    return order, np.flatnonzero(differs)


def _add_up(merged: np.ndarray, at: np.ndarray, flows: np.ndarray, begins: np.ndarray) -> None:
    """Add up `flows`, of which those of one flow begin at `begins`, into the rows `at`."""
    for name in _SUMS:
        merged[name][at] = np.add.reduceat(flows[name], begins)
    merged["flags"][at] = np.bitwise_or.reduceat(flows["flags"], begins)
    for name in ("opened", "domain", "last_ns"):
        merged[name][at] = np.maximum.reduceat(flows[name], begins)
    merged["first_ns"][at] = np.minimum.reduceat(flows["first_ns"], begins)
    told = np.where(flows["nat_lport"] != 0, np.arange(len(flows)), -1)
    latest = np.maximum.reduceat(told, begins)
    for name in _NAT:
        merged[name][at[latest >= 0]] = flows[name][latest[latest >= 0]]


def rows_of(flows: np.ndarray) -> np.ndarray:
    """Return ROWs of FLOWs."""
    rows = np.zeros(len(flows), ROW)
    for name in _COMMON:
        rows[name] = flows[name]
    rows["protocol"] = flows["proto"]
    rows["initiated"] = np.where(flows["forwarded"] == 0, flows["opened"], 0)
    rows["nat"] = np.where(flows["nat_lport"] != 0, flows["family"], 0)
    return rows


_COMMON = tuple(name for name in FLOW.names or () if name in (ROW.names or ()))


def _is_tcp(flows: np.ndarray) -> np.ndarray:
    found: np.ndarray = (flows["proto"] == socket.IPPROTO_TCP) & (flows["forwarded"] == 0)
    return found


def _early(flows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows may be the first packets of a connection that is accepted later.

    Those that the listener's socket got, and with them those that had no socket.
    """
    tcp, how = _is_tcp(flows), flows["how"]
    listener = tcp & ((how == _LISTENER) | (how == _PREDATES))
    return listener, listener | tcp & (flows["tgid"] != 0) & (flows["cookie"] == 0)


def _words(flows: np.ndarray) -> Iterator[np.ndarray]:
    """Return the key as a few columns."""
    yield flows["cookie"]
    yield flows["start_ns"]
    yield flows["tgid"]
    yield from _ends(flows)


def _ends(flows: np.ndarray) -> Iterator[np.ndarray]:
    """Return both ends of a connection, and where it is, as a few columns."""
    for name in ("laddr", "raddr"):
        yield flows[name][:, 0] ^ (flows[name][:, 1] * np.uint64(0x9E3779B97F4A7C15))
    yield flows["netns"]
    ports = flows["lport"].astype(np.uint64) << np.uint64(16) | flows["rport"]
    yield ports << np.uint64(8) | flows["proto"]
