# SPDX-License-Identifier: MIT
"""Flows of the past in memory: bounded NumPy columns, which a question searches whole.

To search the columns of a million flows takes a few milliseconds. To keep an index for every
possible question would take more.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlproto._host import ffi, lib
from nlproto.records.clock import Clock
from nlproto.records.ends import Translated
from nlproto.records.wire import PROTO_NAMES, address_text, among, dtype_of, how_name, taken, text
from nlproto.records.wire import lib as wire
from nlproto.tables.column_table import ColumnTable, mix, numbers, part_of, with_fields
from nlproto.tables.flows import FLOW, KEY_FIELDS, LOOKED
from nlproto.tables.outcome import outcome
from nlproto.tables.shares import NOBODY, Payers, surplus

__all__ = [
    "ROW_BYTES",
    "USED",
    "FlowEnd",
    "FlowMemory",
    "Question",
    "flow_fields",
    "matching",
    "network_words",
    "payers_of",
    "translated_fields",
]

_LAST, _NAT, _SUMS, _TIMES, _TCP = 3, 4, 5, 6, 7
_GROUPS = (
    part_of(FLOW, "cookie", "start_ns", "tgid", "netns"),
    part_of(FLOW, "laddr", "raddr"),
    part_of(FLOW, "lport", "rport", "proto", "family", "forwarded"),
    with_fields(
        part_of(FLOW, "inode", "uid", "flags", "how", "comm", "domain"),
        ("dirty", "?", ffi.offsetof("struct history_last", "dirty")),
        ("words", ("u8", (2,)), ffi.offsetof("struct history_last", "comm")),
    ),
    part_of(FLOW, "nat_laddr", "nat_raddr", "nat_lport", "nat_rport"),
    part_of(FLOW, "packets_in", "bytes_in", "packets_out", "bytes_out"),
    dtype_of("history_times", ffi),
    part_of(FLOW, "rtt_us", "retransmits", "tcp_in", "tcp_out"),
    np.dtype([("id", "u8")]),
)
ROW_BYTES = sum(group.itemsize for group in _GROUPS) + 20
"""Size of a flow in memory, with its place in the table."""


USED = (
    *("id", "tgid", "start_ns", "comm", "uid", "how", "domain"),
    *("packets_in", "bytes_in", "packets_out", "bytes_out"),
)
"""Columns for sums of use."""

_MOST_HORIZONS = 4096

FlowEnd = tuple[int, bytes, int]
"""(family, 16 address bytes, port)."""


@dataclass(frozen=True, slots=True)
class Question:
    """Conditions that must all hold; None: any. Times are ns since 1970."""

    port: int | None = None
    proto: int | None = None
    host: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    """Address of the far end, before or after NAT; of a forwarded flow: of either end."""
    pid: int | None = None
    pname: str | None = None
    domains: tuple[int, ...] | None = None
    """Numbers of the far end's name (nlproto.overheard.names)."""
    uid: int | None = None
    """Only named flows of this owner: what a user with limited rights may see."""
    since_ns: int | None = None
    """Last packet at this time or later."""
    until_ns: int | None = None
    """First packet at this time or before."""
    at_ns: int | None = None
    """First packet at or before it, last packet at or after it."""
    seen_until_ns: int | None = None
    """Last packet at this time or before."""
    ends: tuple[FlowEnd, FlowEnd] | None = None
    """Both ends of one flow, in either order."""
    netns: int | None = None
    listening: bool = False
    """Of present sockets: only those that wait for a peer."""
    limit: int = 1000

    @property
    def comm(self) -> bytes | None:
        """`pname`, as the kernel keeps it: 15 bytes."""
        if self.pname is None:
            return None
        return self.pname.encode("utf-8", "replace")[: wire.SNIFFER_COMM_LEN - 1]


def payers_of(tgids: np.ndarray, uids: np.ndarray, payers: Payers | None = None) -> np.ndarray:
    """Return the payer whose share each flow counts against (uint32)."""
    return np.where(tgids != 0, uids if payers is None else payers.of(uids), np.uint32(NOBODY))


class FlowMemory:
    """At most `limit` flows. If it is full, an eighth is removed, from the payer with most.

    Within a payer the program with most flows loses first. Of it the process with most, of that the
    longest silent flows (nlproto.tables.shares). So a flood to a service costs only this service's
    flows. Rows are FLOWs with times in ns since 1970. Thread-safe.
    """

    def __init__(self, limit: int, next_id: int = 1, payers: Payers | None = None) -> None:
        self.limit = limit
        self._payers = payers
        self.evicted = 0
        self.unstored = 0
        """Flows removed before a store had their last state."""
        self.horizon_ns = 0
        """Last packet of the newest flow that is only in a file. All later flows are in memory."""
        self._horizons: dict[int, int] = {}
        self._least_horizon = 0
        self._lock = threading.Lock()
        self._size = 0
        self._next_id = next_id
        self._table = ColumnTable(_GROUPS, KEY_FIELDS, limit)
        self._pointers = ffi.new("struct history *")
        groups = self._table.groups
        self._pointers.last = ffi.from_buffer("struct history_last[]", groups[_LAST])
        self._pointers.nat = ffi.from_buffer("struct history_nat[]", groups[_NAT])
        self._pointers.sums = ffi.from_buffer("struct history_sums[]", groups[_SUMS])
        self._pointers.times = ffi.from_buffer("struct history_times[]", groups[_TIMES])
        self._pointers.tcp = ffi.from_buffer("struct history_tcp[]", groups[_TCP])

    def __len__(self) -> int:
        return self._size

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return self._table.columns

    def update(self, flows: np.ndarray, clock: Clock) -> None:
        """Add FLOWs with CLOCK_MONOTONIC times, from summarize() with one seed."""
        flows = np.ascontiguousarray(flows)
        real = clock.real_offset_ns & 0xFFFFFFFFFFFFFFFF
        with self._lock:
            rows = self._table.find(flows)
            lib.history_add(
                self._pointers,
                ffi.from_buffer("struct flow[]", flows),
                len(flows),
                numbers(rows),
                real,
            )
            new = taken(flows, rows < 0)
            # add no more at once than are removed at once, or a flood would take everybody's place
            piece = max(1, self.limit // 8)
            for at in range(0, len(new), piece):
                self._insert(new[at : at + piece], real)

    def learn(self, found: np.ndarray) -> np.ndarray:
        """Store figures of connections (HOST_TCP, each cookie once); return the FLOWs found here.

        A connection counts for its last owner alone. In the FLOWs returned, `retransmits` are only
        the new ones.
        """
        order = np.argsort(found["cookie"])
        found = found[order[found["cookie"][order] != 0]]
        with self._lock:
            columns = {name: column[: self._size] for name, column in self._columns.items()}
            rows = np.flatnonzero(among(columns["cookie"], found["cookie"]))
            rows = rows[columns["proto"][rows] == socket.IPPROTO_TCP]
            which = np.searchsorted(found["cookie"], columns["cookie"][rows])
            same = found["netns"][which] == columns["netns"][rows]
            rows, which = rows[same], which[same]
            known = np.bincount(which, columns["retransmits"][rows], minlength=len(found))
            latest = np.lexsort((columns["heard_ns"][rows], which))
            latest = latest[np.append(which[latest][1:] != which[latest][:-1], True)[: len(rows)]]
            rows, which = rows[latest], which[latest]
            news = found[which]
            more = news["retransmits"] - np.minimum(
                known[which].astype(np.uint32), news["retransmits"]
            )
            rtt = np.where(news["rtt_us"], news["rtt_us"], columns["rtt_us"][rows])
            before = columns["flags"][rows]
            changed = (more != 0) | (rtt != columns["rtt_us"][rows]) | (before & LOOKED == 0)
            columns["retransmits"][rows] += more
            columns["rtt_us"][rows] = rtt
            columns["flags"][rows] = before | LOOKED
            columns["dirty"][rows[changed]] = True
            flows = self._table.take(rows, FLOW)
        flows["retransmits"] = more
        return flows

    def note(self, flows: np.ndarray) -> None:
        """Does nothing: update() does it (nlproto.overheard.domains.Beginnings)."""

    def first_seen(self, flows: np.ndarray) -> np.ndarray:
        """Return CLOCK_MONOTONIC ns of each FLOW's first packet; 0 if it is not here."""
        offset = np.uint64(Clock.now().real_offset_ns & 0xFFFFFFFFFFFFFFFF)
        with self._lock:
            rows = self._table.find(np.ascontiguousarray(flows))
            first = self._columns["first_ns"][np.maximum(rows, 0)] - offset
        return np.where(rows < 0, np.uint64(0), first)

    def _insert(self, flows: np.ndarray, real: int) -> None:
        end = self._size + len(flows)
        if end > self.limit:
            self._evict(max(self.limit // 8, end - self.limit))
            end = self._size + len(flows)
        place, columns = slice(self._size, end), self._columns
        self._table.put(np.arange(self._size, end), flows)
        columns["heard_ns"][place] = columns["last_ns"][place]
        for name in ("first_ns", "last_ns"):
            columns[name][place] += np.uint64(real)
        columns["id"][place] = np.arange(self._next_id, self._next_id + len(flows))
        columns["dirty"][place] = True
        self._next_id += len(flows)
        self._size = end

    def _evict(self, count: int) -> None:
        columns = {name: column[: self._size] for name, column in self._columns.items()}
        payers = payers_of(columns["tgid"], columns["uid"], self._payers)
        names = columns["words"]
        programs = mix((payers.astype(np.uint64), names[:, 0], names[:, 1]), 0)
        heard = columns["heard_ns"]
        age = heard.max(initial=0) - heard
        processes = mix((programs, columns["tgid"].astype(np.uint64), columns["start_ns"]), 0)
        groups = payers, programs, processes
        goes = surplus(age.view(np.int64), groups, max(0, self._size - count))
        self.horizon_ns = max(self.horizon_ns, int(columns["last_ns"][goes].max()))
        named = goes & (columns["tgid"] != 0)
        self._note_horizons(columns["uid"][named], columns["last_ns"][named])
        self.evicted += int(np.count_nonzero(goes))
        self.unstored += int(np.count_nonzero(columns["dirty"] & goes))
        self._table.keep(~goes)
        self._size = len(self._table)

    def _note_horizons(self, uids: np.ndarray, last: np.ndarray) -> None:
        order = np.lexsort((last, uids))
        newest = order[np.append(uids[order][1:] != uids[order][:-1], True)[: len(order)]]
        gone = zip(uids[newest].tolist(), last[newest].tolist(), strict=True)
        self._horizons |= {uid: max(at, self.horizon_of(uid)) for uid, at in gone}
        if len(self._horizons) > _MOST_HORIZONS:
            by_age = sorted(self._horizons.items(), key=lambda one: one[1])
            self._least_horizon = by_age[len(by_age) // 2][1]
            self._horizons = dict(by_age[len(by_age) // 2 + 1 :])

    def horizon_of(self, uid: int) -> int:
        """Return horizon_ns of this user's flows only: it must not show when others sent."""
        return self._horizons.get(uid, self._least_horizon)

    def renumber(self, offset: int) -> None:
        """Add `offset` to all ids, because the file already has lower ones."""
        with self._lock:
            self._columns["id"][: self._size] += np.uint64(offset)
            self._next_id += offset

    def waiting(self) -> int:
        """How many flows have changed since a store took them."""
        with self._lock:
            return int(np.count_nonzero(self._columns["dirty"][: self._size]))

    def mark_all_changed(self) -> None:
        """The file is new: no flow is in it."""
        with self._lock:
            self._columns["dirty"][: self._size] = True

    def ask(self, question: Question) -> tuple[int, list[tuple[int, np.void]]]:
        """Return how many flows fit, and (id, FLOW) of the `limit` last seen, newest first."""
        with self._lock:
            rows = matching(self._columns, self._size, question)
            total = len(rows)
            last = self._columns["last_ns"][rows]
            if total > question.limit:
                keep = np.argpartition(last, total - question.limit)[-question.limit :]
                rows, last = rows[keep], last[keep]
            rows = rows[np.argsort(last, kind="stable")[::-1]]
            found = self._table.take(rows, FLOW)
            return total, list(zip(self._columns["id"][rows].tolist(), found, strict=True))

    def seen_since(self, since_ns: int) -> dict[str, np.ndarray]:
        """Return columns of the flows with a last packet at that time or later."""
        with self._lock:
            rows = np.flatnonzero(self._columns["last_ns"][: self._size] >= np.uint64(since_ns))
            return {name: self._columns[name][rows] for name in USED}

    def changed(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, FLOWs) of up to `limit` rows that changed since this last returned them."""
        with self._lock:
            rows = np.flatnonzero(self._columns["dirty"][: self._size])[:limit]
            self._columns["dirty"][rows] = False
            return self._columns["id"][rows], self._table.take(rows, FLOW)

    def mark_changed(self, ids: np.ndarray) -> None:
        """Mark rows of changed() as changed again: they could not be stored."""
        with self._lock:
            mine = self._columns["id"][: self._size]
            places = np.searchsorted(mine, ids)
            inside = places < self._size
            inside[inside] = mine[places[inside]] == ids[inside]
            self._columns["dirty"][places[inside]] = True
            self.unstored += int(np.count_nonzero(~inside))  # removed meanwhile

    def has(self, ids: np.ndarray) -> np.ndarray:
        """Return for each of `ids` whether its flow is in memory."""
        with self._lock:
            mine = self._columns["id"][: self._size]  # rows are added and removed in order
            places = np.searchsorted(mine, ids)
            inside = places < self._size
            inside[inside] = mine[places[inside]] == ids[inside]
            return inside


def matching(columns: Mapping[str, np.ndarray], size: int, question: Question) -> np.ndarray:
    """Return which of the first `size` rows fit; `words` is comm as two numbers."""
    mask = np.ones(size, bool)
    if question.port is not None:
        ports = (columns[name][:size] for name in ("lport", "rport", "nat_lport", "nat_rport"))
        mask &= np.logical_or.reduce([one == question.port for one in ports])
    if question.since_ns is not None:
        mask &= columns["last_ns"][:size] >= max(0, question.since_ns)
    if question.until_ns is not None:
        mask &= columns["first_ns"][:size] <= max(0, question.until_ns)
    if question.at_ns is not None:
        moment = max(0, question.at_ns)
        mask &= columns["first_ns"][:size] <= moment
        mask &= columns["last_ns"][:size] >= moment
    if question.seen_until_ns is not None:
        mask &= columns["last_ns"][:size] <= max(0, question.seen_until_ns)
    for name, value in (
        ("proto", question.proto),
        ("tgid", question.pid),
        ("netns", question.netns),
    ):
        if value is not None:
            mask &= columns[name][:size] == value
    if question.domains is not None:
        mask &= among(columns["domain"][:size], np.array(question.domains, np.uint64))
    if question.ends is not None:
        one, other = question.ends
        between = [
            _between(columns, size, *way, nat)
            for way in ((one, other), (other, one))
            for nat in ("", "nat_")
        ]
        mask &= np.logical_or.reduce(between)
    if question.uid is not None:
        mask &= (columns["tgid"][:size] != 0) & (columns["uid"][:size] == question.uid)
    if question.comm is not None:
        # as two numbers: comparing strings takes ten times as long
        names = columns["words"][:size]
        wanted = np.frombuffer(question.comm.ljust(16, b"\0"), np.uint64)
        mask &= names[:, 0] == wanted[0]
        mask &= names[:, 1] == wanted[1]
    rows = np.flatnonzero(mask)
    if question.host is not None and len(rows):
        family, base, bits = network_words(question.host)
        rows = rows[columns["family"][rows] == family]
        translated = columns["nat_lport"][rows] != 0
        far, lower = (
            ((columns[f"{side}addr"][rows] & bits) == base).all(axis=1)
            | translated & ((columns[f"nat_{side}addr"][rows] & bits) == base).all(axis=1)
            for side in "rl"
        )
        rows = rows[far | (lower & (columns["forwarded"][rows] != 0))]
    return rows


def _between(
    columns: Mapping[str, np.ndarray], size: int, local: FlowEnd, remote: FlowEnd, nat: str
) -> np.ndarray:
    """Return a mask of the flows with these ends, as seen ("") or after NAT ("nat_")."""
    mask: np.ndarray = (columns[f"{nat}lport"][:size] == local[2]) & (
        columns[f"{nat}rport"][:size] == remote[2]
    )
    for name, end in ((f"{nat}laddr", local), (f"{nat}raddr", remote)):
        rows = np.flatnonzero(mask)
        same = (columns[name][rows] == np.frombuffer(end[1], np.uint64)).all(axis=1)
        mask[rows[~(same & (columns["family"][rows] == end[0]))]] = False
    return mask


def network_words(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return (family, base, mask) of a network, like FLOW's addresses."""
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    base = np.frombuffer(network.network_address.packed.ljust(16, b"\0"), np.uint64)
    bits = np.frombuffer(network.netmask.packed.ljust(16, b"\0"), np.uint64)
    return family, base, bits


_FLAGS = {
    wire.SNIFFER_F_SHARED: "shared",
    wire.SNIFFER_F_INHERITED: "inherited",
    wire.SNIFFER_F_SEEDED: "seeded",
    wire.SNIFFER_F_DEAD: "dead",
    wire.SNIFFER_F_KERNEL: "kernel",
    wire.SNIFFER_F_AMBIGUOUS: "ambiguous",
    wire.SNIFFER_F_COPY: "copy",
}


def translated_fields(family: int, became: Translated | None) -> dict[str, str | int | None]:
    """Return what NAT made of the ends of a flow or socket, for a client."""
    names = ("nat_local", "nat_lport", "nat_remote", "nat_rport")
    if became is None:
        return dict.fromkeys(names)
    near, lport, far, rport = became
    values = address_text(family, near), lport, address_text(family, far), rport
    return dict(zip(names, values, strict=True))


def _unpacker() -> tuple[tuple[str, ...], struct.Struct]:
    """Return names and layout of FLOW's fields, addresses as bytes."""
    codes = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
    fields = sorted((FLOW.fields or {}).items(), key=lambda one: int(one[1][1]))
    layout, end = "=", 0
    for _, (kind, offset, *_) in fields:
        code = codes.get(kind.str[1:]) or f"{kind.itemsize}s"
        layout += f"{offset - end}x{code}"
        end = offset + kind.itemsize
    return tuple(name for name, _ in fields), struct.Struct(f"{layout}{FLOW.itemsize - end}x")


_FIELDS, _LAYOUT = _unpacker()


def flow_fields(flow: np.void) -> dict[str, Any]:
    """Return one FLOW of the history, for a client."""
    # reading a structure's fields one by one takes several times as long
    one = dict(zip(_FIELDS, _LAYOUT.unpack(flow.tobytes()), strict=True))
    family, flags, named = one["family"], one["flags"], bool(one["tgid"])
    became: Translated | None = None
    if one["nat_lport"]:
        became = one["nat_laddr"], one["nat_lport"], one["nat_raddr"], one["nat_rport"]
    return {
        "proto": PROTO_NAMES.get(one["proto"], str(one["proto"])),
        "local": address_text(family, one["laddr"]),
        "lport": one["lport"],
        "remote": address_text(family, one["raddr"]),
        "rport": one["rport"],
        **translated_fields(family, became),
        "forwarded": bool(one["forwarded"]),
        "pid": one["tgid"] if named else None,
        "start_ns": one["start_ns"] if named else None,
        "comm": text(one["comm"]) if named else "",
        "uid": one["uid"] if named else None,
        "netns": one["netns"],
        "cookie": one["cookie"],
        "how": how_name(one["how"]),
        "flags": [name for bit, name in _FLAGS.items() if flags & bit],
        "first": one["first_ns"] / 1e9,
        "last": one["last_ns"] / 1e9,
        "packets_in": one["packets_in"],
        "bytes_in": one["bytes_in"],
        "packets_out": one["packets_out"],
        "bytes_out": one["bytes_out"],
        "rtt": one["rtt_us"] / 1e6 if one["rtt_us"] else None,
        "retransmits": one["retransmits"] if flags & LOOKED else None,
        "outcome": outcome(one["tcp_in"], one["tcp_out"]),
    }
