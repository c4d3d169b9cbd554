# SPDX-License-Identifier: MIT
"""Flows of the past in memory: bounded, columns in NumPy, searched whole.

A linear search of a million flows by column takes a few milliseconds, less than keeping indexes
for every question that can be asked.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlproto.records.clock import Clock
from nlproto.records.wire import PROTO_NAMES, address_text, how_name, lib, text
from nlproto.tables.column_table import ColumnTable, mix
from nlproto.tables.flows import FLOW, KEY_FIELDS, address_bytes
from nlproto.tables.shares import NOBODY, Payers, surplus

__all__ = [
    "ROW_BYTES",
    "End",
    "FlowMemory",
    "Question",
    "flow_fields",
    "network_words",
    "payers_of",
]

_FIRST_ROWS = 1024
_ROW = np.dtype([*FLOW.descr, ("began_ns", "u8"), ("heard_ns", "u8"), ("id", "u8"), ("dirty", "?")])
"""began_ns and heard_ns are first_ns and last_ns by CLOCK_MONOTONIC, which nobody sets."""
ROW_BYTES = _ROW.itemsize + 120
"""Of a flow in memory, its place in the table included."""
_SUMS = ("packets_in", "bytes_in", "packets_out", "bytes_out")
_LAST = ("how", "uid", "inode", "comm")


End = tuple[int, bytes, int]
"""(family, 16 address bytes, port)."""


@dataclass(frozen=True, slots=True)
class Question:
    """Conditions that all must hold; None: any. Times are ns since 1970."""

    port: int | None = None
    proto: int | None = None
    host: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    """Of the far end; of a forwarded flow: of either."""
    pid: int | None = None
    pname: str | None = None
    uid: int | None = None
    """Only named flows of this owner; what a user without rights may see."""
    since_ns: int | None = None
    """Last packet at this time or later."""
    at_ns: int | None = None
    """First packet at or before, last packet at or after."""
    ends: tuple[End, End] | None = None
    """Of one flow, whichever of them is local."""
    limit: int = 1000

    @property
    def comm(self) -> bytes | None:
        """`pname` as the kernel keeps it: 15 bytes."""
        if self.pname is None:
            return None
        return self.pname.encode("utf-8", "replace")[: lib.SNIFFER_COMM_LEN - 1]


def payers_of(tgids: np.ndarray, uids: np.ndarray, payers: Payers | None = None) -> np.ndarray:
    """Whose share each flow counts against (uint32)."""
    return np.where(tgids != 0, uids if payers is None else payers.of(uids), np.uint32(NOBODY))


class FlowMemory:
    """At most `limit` flows; when full an eighth goes, of the payer with most of them.

    Within a payer the program with most flows gives, of it the process with most, of that the
    longest silent (nlproto.tables.shares): who sends much to others' services costs these
    services alone.
    Rows are FLOWs with times in ns since 1970. Thread-safe.
    """

    def __init__(self, limit: int, next_id: int = 1, payers: Payers | None = None) -> None:
        self.limit = limit
        self._payers = payers
        self.evicted = 0
        self.unstored = 0
        """Evicted before a store had taken their last state."""
        self.horizon_ns = 0
        """Last packet of the newest flow that is only in a file: later flows are all in here."""
        self._lock = threading.Lock()
        self._size = 0
        self._next_id = next_id
        self._table = ColumnTable(_ROW, KEY_FIELDS)
        self._table.grow(min(limit, _FIRST_ROWS))

    def __len__(self) -> int:
        return self._size

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return self._table.columns

    def update(self, flows: np.ndarray, clock: Clock) -> None:
        """Add FLOWs with CLOCK_MONOTONIC times, as summarize() makes them with one seed."""
        real = np.int64(clock.real_offset_ns)
        found, flows = flows, np.empty(len(flows), _ROW)
        for name in found.dtype.names or ():
            flows[name] = found[name]
        for name, wall in (("began_ns", "first_ns"), ("heard_ns", "last_ns")):
            flows[name] = found[wall]
            flows[wall] = found[wall].astype(np.int64) + real
        with self._lock:
            rows = self._table.find(flows)
            known = rows >= 0
            if known.any():
                self._add(rows[known], flows[known])
            new = flows[~known]
            if len(new):
                self._insert(new)

    def _add(self, rows: np.ndarray, flows: np.ndarray) -> None:
        columns = self._columns
        for name in _SUMS:
            columns[name][rows] += flows[name]
        earlier = flows["began_ns"] < columns["began_ns"][rows]
        for name in ("began_ns", "first_ns"):
            columns[name][rows[earlier]] = flows[name][earlier]
        later = flows["heard_ns"] >= columns["heard_ns"][rows]
        for name in ("heard_ns", "last_ns", *_LAST):
            columns[name][rows[later]] = flows[name][later]
        # the time of day may have been set back in between
        columns["first_ns"][rows] = np.minimum(columns["first_ns"][rows], columns["last_ns"][rows])
        columns["flags"][rows] |= flows["flags"]
        columns["dirty"][rows] = True

    def _insert(self, flows: np.ndarray) -> None:
        # no more at once than are evicted at once: or a flood would take everybody's place
        piece = max(1, self.limit // 8)
        while len(flows) > piece:
            self._insert(flows[:piece])
            flows = flows[piece:]
        if self._size + len(flows) > self.limit:
            self._evict(max(piece, self._size + len(flows) - self.limit))
        end = self._size + len(flows)
        if end > self._table.capacity:
            self._table.grow(min(self.limit, max(end, 2 * self._table.capacity)))
        place = slice(self._size, end)
        self._table.put(np.arange(self._size, end), flows)
        self._columns["id"][place] = np.arange(self._next_id, self._next_id + len(flows))
        self._columns["dirty"][place] = True
        self._next_id += len(flows)
        self._size = end

    def _evict(self, count: int) -> None:
        columns = {name: column[: self._size] for name, column in self._columns.items()}
        payers = payers_of(columns["tgid"], columns["uid"], self._payers)
        names = columns["comm"].view(np.uint64).reshape(self._size, 2)
        programs = mix((payers.astype(np.uint64), names[:, 0], names[:, 1]), 0)
        heard = columns["heard_ns"]
        age = heard.max(initial=0) - heard
        processes = mix((programs, columns["tgid"].astype(np.uint64), columns["start_ns"]), 0)
        groups = payers, programs, processes
        goes = surplus(age.view(np.int64), groups, max(0, self._size - count))
        self.horizon_ns = max(self.horizon_ns, int(columns["last_ns"][goes].max()))
        self.evicted += int(np.count_nonzero(goes))
        self.unstored += int(np.count_nonzero(columns["dirty"] & goes))
        stay = np.flatnonzero(~goes)
        self._table.keep(stay)
        self._size = len(stay)

    def renumber(self, offset: int) -> None:
        """Add `offset` to all ids: the file that they are for has others already."""
        with self._lock:
            self._columns["id"][: self._size] += np.uint64(offset)
            self._next_id += offset

    def waiting(self) -> int:
        """How many flows changed since a store took them."""
        with self._lock:
            return int(np.count_nonzero(self._columns["dirty"][: self._size]))

    def mark_all_changed(self) -> None:
        """A new file has none of them."""
        with self._lock:
            self._columns["dirty"][: self._size] = True

    def ask(self, question: Question) -> tuple[int, list[tuple[int, np.void]]]:
        """How many flows fit, and (id, FLOW) of the `limit` last seen, newest first."""
        with self._lock:
            rows = self._search(question)
            total = len(rows)
            last = self._columns["last_ns"][rows]
            if total > question.limit:
                keep = np.argpartition(last, total - question.limit)[-question.limit :]
                rows, last = rows[keep], last[keep]
            rows = rows[np.argsort(last, kind="stable")[::-1]]
            found = self._table.take(rows, FLOW)
            return total, list(zip(self._columns["id"][rows].tolist(), found, strict=True))

    def _search(self, question: Question) -> np.ndarray:
        size, columns = self._size, self._columns
        mask = np.ones(size, bool)
        if question.port is not None:
            mask &= (columns["lport"][:size] == question.port) | (
                columns["rport"][:size] == question.port
            )
        if question.since_ns is not None:
            mask &= columns["last_ns"][:size] >= max(0, question.since_ns)
        if question.at_ns is not None:
            moment = max(0, question.at_ns)
            mask &= columns["first_ns"][:size] <= moment
            mask &= columns["last_ns"][:size] >= moment
        for name, value in (("proto", question.proto), ("tgid", question.pid)):
            if value is not None:
                mask &= columns[name][:size] == value
        if question.ends is not None:
            one, other = question.ends
            mask &= self._between(one, other) | self._between(other, one)
        if question.uid is not None:
            mask &= (columns["tgid"][:size] != 0) & (columns["uid"][:size] == question.uid)
        if question.comm is not None:
            # as two numbers: comparing strings takes ten times as long
            names = columns["comm"][:size].view(np.uint64).reshape(size, 2)
            wanted = np.frombuffer(question.comm.ljust(16, b"\0"), np.uint64)
            mask &= names[:, 0] == wanted[0]
            mask &= names[:, 1] == wanted[1]
        rows = np.flatnonzero(mask)
        if question.host is not None and len(rows):
            family, base, bits = network_words(question.host)
            rows = rows[columns["family"][rows] == family]
            near = ((columns["raddr"][rows] & bits) == base).all(axis=1)
            lower = ((columns["laddr"][rows] & bits) == base).all(axis=1)
            rows = rows[near | (lower & (columns["forwarded"][rows] != 0))]
        return rows

    def _between(self, local: End, remote: End) -> np.ndarray:
        """A mask of the flows with these ends."""
        size, columns = self._size, self._columns
        mask = (columns["lport"][:size] == local[2]) & (columns["rport"][:size] == remote[2])
        for name, end in (("laddr", local), ("raddr", remote)):
            rows = np.flatnonzero(mask)
            same = (columns[name][rows] == np.frombuffer(end[1], np.uint64)).all(axis=1)
            mask[rows[~(same & (columns["family"][rows] == end[0]))]] = False
        return mask

    def changed(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, FLOWs) of up to `limit` rows that changed since they were last taken here."""
        with self._lock:
            rows = np.flatnonzero(self._columns["dirty"][: self._size])[:limit]
            self._columns["dirty"][rows] = False
            return self._columns["id"][rows], self._table.take(rows, FLOW)

    def mark_changed(self, ids: np.ndarray) -> None:
        """The rows taken by changed() could not be stored."""
        with self._lock:
            mine = self._columns["id"][: self._size]
            places = np.searchsorted(mine, ids)
            inside = places < self._size
            inside[inside] = mine[places[inside]] == ids[inside]
            self._columns["dirty"][places[inside]] = True
            self.unstored += int(np.count_nonzero(~inside))  # evicted meanwhile

    def has(self, ids: np.ndarray) -> np.ndarray:
        """For each of `ids` whether that flow is in memory."""
        with self._lock:
            mine = self._columns["id"][: self._size]  # rises: rows are added and removed in order
            places = np.searchsorted(mine, ids)
            inside = places < self._size
            inside[inside] = mine[places[inside]] == ids[inside]
            return inside


def network_words(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> tuple[int, np.ndarray, np.ndarray]:
    """(family, base, mask) of a network, the latter as FLOW's addresses."""
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    base = np.frombuffer(network.network_address.packed.ljust(16, b"\0"), np.uint64)
    bits = np.frombuffer(network.netmask.packed.ljust(16, b"\0"), np.uint64)
    return family, base, bits


_FLAGS = {
    lib.SNIFFER_F_SHARED: "shared",
    lib.SNIFFER_F_INHERITED: "inherited",
    lib.SNIFFER_F_SEEDED: "seeded",
    lib.SNIFFER_F_DEAD: "dead",
    lib.SNIFFER_F_KERNEL: "kernel",
    lib.SNIFFER_F_AMBIGUOUS: "ambiguous",
    lib.SNIFFER_F_COPY: "copy",
}


def flow_fields(flow: np.void) -> dict[str, Any]:
    """One FLOW of the history as it goes to a client."""
    family, named = int(flow["family"]), bool(flow["tgid"])
    flags = int(flow["flags"])
    return {
        "proto": PROTO_NAMES.get(int(flow["proto"]), str(int(flow["proto"]))),
        "local": address_text(family, address_bytes(flow["laddr"])),
        "lport": int(flow["lport"]),
        "remote": address_text(family, address_bytes(flow["raddr"])),
        "rport": int(flow["rport"]),
        "forwarded": bool(flow["forwarded"]),
        "pid": int(flow["tgid"]) if named else None,
        "start_ns": int(flow["start_ns"]) if named else None,
        "comm": text(bytes(flow["comm"])) if named else "",
        "uid": int(flow["uid"]) if named else None,
        "netns": int(flow["netns"]),
        "cookie": int(flow["cookie"]),
        "how": how_name(int(flow["how"])),
        "flags": [name for bit, name in _FLAGS.items() if flags & bit],
        "first": int(flow["first_ns"]) / 1e9,
        "last": int(flow["last_ns"]) / 1e9,
        "packets_in": int(flow["packets_in"]),
        "bytes_in": int(flow["bytes_in"]),
        "packets_out": int(flow["packets_out"]),
        "bytes_out": int(flow["bytes_out"]),
    }
