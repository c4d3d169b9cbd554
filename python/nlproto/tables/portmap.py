# SPDX-License-Identifier: MIT
"""The port map: (netns, proto, address, port) -> the processes that own it now."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from operator import attrgetter

import numpy as np

from nlproto._host import ffi, lib
from nlproto.host.kernel_sockets import BoundSocket, Endpoint
from nlproto.records.wire import among, dtype_of, taken, text
from nlproto.tables.column_table import (
    ColumnTable,
    mix,
    new_slots,
    numbers,
    part_of,
    random_seed,
    with_fields,
    without,
)
from nlproto.tables.port_owner import PortOwner
from nlproto.tables.processes import ProcessKey
from nlproto.tables.shares import Payers, surplus

__all__ = ["PortMap"]

_ROW = with_fields(
    without(dtype_of("port", ffi), "reserved", "reserved2", "reserved3"),
    ("listening", "?", ffi.offsetof("struct port", "listening")),
    ("live", "?", ffi.offsetof("struct port", "live")),
)
_KEYS, _STATES, _RINGS = 0, 1, 3
_GROUPS = (
    part_of(_ROW, "address", "start_ns", "netns", "tgid", "port", "proto", "family"),
    with_fields(
        part_of(_ROW, "cookie", "seen_ns", "uid", "listening", "comm"),
        ("words", ("u8", (2,)), ffi.offsetof("struct portmap_state", "comm")),
    ),
    np.dtype([("live", "?")]),
    dtype_of("portmap_ring", ffi),
)
_KEY = ("address", "start_ns", "netns", "tgid", "port", "proto", "family")
_PORTS = 1 << 16
_FEW = 16
"""Up to so many owners are found faster one by one than with NumPy."""
_COMPACT = 4096
"""Above so many rows it is worth moving owners together, if most are free."""
_PART = 2048
"""How many flows are learnt at once: a question waits no longer for the lock."""


class PortMap:
    """Bounded, thread-safe. Traffic alone keeps an owner for `ttl_ns` after its last packet.

    At `limit` owners a quarter is removed: from the users with most, those that were silent longest
    (nlproto.tables.shares; `evicted` counts them).
    """

    def __init__(
        self,
        limit: int = 262144,
        ttl_ns: int = 120_000_000_000,
        payers: Payers | None = None,
    ) -> None:
        self._payers = payers
        self.limit = limit
        self.ttl_ns = ttl_ns
        self.evicted = 0
        self._lock = threading.Lock()
        self._seed = random_seed()
        self._table = ColumnTable(_GROUPS, _KEY, limit + _PART)
        self._heads, self._counts = np.zeros((2, _PORTS), np.uint32)
        self._pointers = ffi.new("struct portmap *")
        groups = self._table.groups
        self._pointers.keys = ffi.from_buffer("struct portmap_key[]", groups[_KEYS])
        self._pointers.states = ffi.from_buffer("struct portmap_state[]", groups[_STATES])
        self._pointers.rings = ffi.from_buffer("struct portmap_ring[]", groups[_RINGS])
        self._pointers.heads = ffi.from_buffer("uint32_t[]", self._heads)
        self._pointers.counts = ffi.from_buffer("uint32_t[]", self._counts)
        self._top = 0
        """No row from here on is in use."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return {name: column[: self._top] for name, column in self._table.columns.items()}

    def update(self, flows: np.ndarray) -> None:
        """Learn from FLOWs. Forwarded, unnamed and closed flows are left out."""
        flows = np.ascontiguousarray(flows)
        rows = np.empty(len(flows), _ROW)
        slots, bits = new_slots(len(flows))
        count = lib.ports_of_flows(
            ffi.from_buffer("struct flow[]", flows),
            len(flows),
            self._seed,
            ffi.from_buffer("struct port[]", rows),
            ffi.from_buffer("uint32_t[]", slots),
            bits,
        )
        for at in range(0, count, _PART):
            with self._lock:
                self._put(rows[at : min(at + _PART, count)])

    def replace_bound(self, sockets: Sequence[BoundSocket], now_ns: int) -> None:
        """Enter the kernel's present listeners and bound sockets; all others have gone."""
        rows = self._rows_of(sockets, now_ns, listening=True)
        with self._lock:
            present = self._put_all(rows)
            columns = self._columns
            gone = columns["live"] & columns["listening"]
            gone[present] = False
            self._drop(gone)

    def update_bound(
        self,
        sockets: Sequence[BoundSocket],
        changed: np.ndarray,
        present: np.ndarray,
        now_ns: int,
    ) -> None:
        """Do replace_bound() for only those sockets that are new or changed.

        `changed`: their cookies; `present`: those of all sockets (arrays of uint64).
        """
        rows = self._rows_of(sockets, now_ns, listening=True)
        with self._lock:
            put = self._put_all(rows)
            columns = self._columns
            bound = columns["live"] & columns["listening"]
            columns["seen_ns"][bound] = now_ns  # or they would be removed first
            gone = bound & among(columns["cookie"], changed)
            gone[put] = False
            self._drop(gone | (bound & ~among(columns["cookie"], present)))

    def add_connected(self, sockets: Sequence[BoundSocket], now_ns: int) -> None:
        """Learn connected sockets from the kernel's tables, as if a packet had come at `now_ns`."""
        rows = self._rows_of(sockets, now_ns)
        with self._lock:
            self._put_all(rows)

    def keep_cookies(self, cookies: Collection[int] | np.ndarray, before_ns: int) -> None:
        """Drop owners whose socket is not among the kernel's `cookies` (uint64).

        They were read after `before_ns`. Owners seen since then, or known without a cookie, stay
        until their time is over.
        """
        there = cookies
        if not isinstance(there, np.ndarray):
            there = np.fromiter(there, np.uint64, len(there))
        with self._lock:
            known = self._columns["cookie"].copy()
        gone = (known != 0) & ~among(known, there)
        with self._lock:
            columns = self._columns
            known, gone = known[: self._top], gone[: self._top]
            same = columns["cookie"][: len(known)] == known
            gone &= same & (columns["seen_ns"][: len(known)] < max(0, before_ns))
            self._drop(gone & columns["live"][: len(known)])

    def forget_process(self, key: ProcessKey) -> None:
        """The process has exited."""
        with self._lock:
            self._drop_rows(self._of(key))

    def expire(self, now_ns: int) -> None:
        """Drop owners that only traffic showed, but not for the last `ttl_ns`."""
        with self._lock:
            columns = self._columns
            old = columns["seen_ns"] < max(0, now_ns - self.ttl_ns)
            self._drop(old & columns["live"] & ~columns["listening"])
            if self._top >= _COMPACT and self._count < self._top // 4:
                self._compact()

    def count(self, port: int, uid: int | None = None) -> int:
        """How many owners `port` has; with `uid`, of that user."""
        if uid is None:
            return int(self._counts[port]) if 0 <= port < _PORTS else 0
        with self._lock:
            return int(np.count_nonzero(self._columns["uid"][self._at_port(port)] == uid))

    def who(
        self,
        port: int,
        proto: int | None = None,
        address: tuple[int, bytes] | None = None,
        uid: int | None = None,
        limit: int | None = None,
    ) -> list[PortOwner]:
        """Owners of local `port`, last seen first, the `limit` last seen ones of them.

        `proto` is a protocol number; `address` is (family, 16 bytes): sockets bound to exactly it
        or to the wildcard of its family (an IPv6 wildcard takes IPv4 as well).
        """
        with self._lock:
            at = self._at_port(port)
            if uid is not None:  # first: no user waits longer for what others have
                at = at[self._columns["uid"][at] == uid]
            if len(at) <= _FEW:
                owners = [self._owner(row) for row in at.tolist()]
                return _fitting(owners, proto, address)[:limit]
            rows = self._table.take(at, _ROW)
        fits = np.ones(len(rows), bool)
        if proto is not None:
            fits &= rows["proto"] == proto
        if address is not None:
            fits &= _serve(rows, address)
        return _owners(rows[fits], limit)

    def at(
        self, endpoint: Endpoint, uid: int | None = None, limit: int | None = None
    ) -> list[PortOwner]:
        """Owners of exactly this local end, last seen first; else those of the wildcard."""
        netns, proto, family, address, port = endpoint
        owners = self.who(port, proto, (family, address), uid)
        owners = [owner for owner in owners if owner.netns == netns]
        exact = [o for o in owners if o.endpoint[2:4] == (family, address)]
        return (exact or owners)[:limit]

    def select(
        self,
        *,
        port: int | None = None,
        proto: int | None = None,
        tgid: int | None = None,
        comm: bytes | None = None,
        uid: int | None = None,
        keys: Collection[ProcessKey] | None = None,
        network: tuple[int, np.ndarray, np.ndarray] | None = None,
        limit: int | None = None,
    ) -> list[PortOwner]:
        """Owners that fit all that is given, last seen first, the `limit` last seen ones of them.

        `keys`: processes; `network`: (family, base, mask), the latter as two numbers of 64 bits.
        """
        with self._lock:
            columns = self._columns
            at = np.flatnonzero(columns["live"]) if port is None else self._at_port(port)
            if keys is not None:
                starts = np.fromiter((key[1] for key in keys), np.uint64, len(keys))
                at = at[among(columns["start_ns"][at], starts)]
            given = {"proto": proto, "tgid": tgid, "comm": comm, "uid": uid}
            for name, value in given.items():
                if value is not None:
                    at = at[columns[name][at] == value]
            if network is not None:
                family, base, bits = network
                at = at[columns["family"][at] == family]
                at = at[((columns["address"][at] & bits) == base).all(axis=1)]
            rows = self._table.take(at, _ROW)
        if keys is None:
            return _owners(rows, limit)
        wanted = set(keys)
        found = [one for one in _owners(rows) if (one.tgid, one.start_ns) in wanted]
        return found[:limit]

    def with_cookies(
        self, cookies: Collection[int], uid: int | None = None, limit: int | None = None
    ) -> dict[int, list[PortOwner]]:
        """Owners of each socket that has any, last seen first; `limit` bounds all of them."""
        wanted = np.fromiter(cookies, np.uint64, len(cookies))
        with self._lock:
            columns = self._columns
            fits = columns["live"] & among(columns["cookie"], wanted)
            if uid is not None:
                fits &= columns["uid"] == uid
            rows = self._table.take(np.flatnonzero(fits), _ROW)
        found: defaultdict[int, list[PortOwner]] = defaultdict(list)
        for owner in _owners(rows, limit):
            found[owner.cookie].append(owner)
        return found

    def last_users(self, cookies: Collection[int]) -> dict[int, PortOwner]:
        """Return who was last seen with each socket. Costs nothing for its other owners."""
        wanted = np.fromiter(cookies, np.uint64, len(cookies))
        with self._lock:
            columns = self._columns
            fits = np.flatnonzero(columns["live"] & among(columns["cookie"], wanted))
            order = np.argsort(columns["seen_ns"][fits], kind="stable")[::-1]
            _, newest = np.unique(columns["cookie"][fits][order], return_index=True)
            rows = self._table.take(fits[order][newest], _ROW)
        return {owner.cookie: owner for owner in _owners(rows)}

    def owned_by(self, key: ProcessKey) -> list[PortOwner]:
        """Every local end of one process, last seen first."""
        return self.select(keys=(key,))

    def everything(self) -> list[PortOwner]:
        """All owners, last seen first."""
        return self.select()

    # All of these with the lock held; a mask has an element for each row up to the top

    def listeners(self, limit: int) -> list[PortOwner]:
        """Return the owners of listeners and unconnected UDP sockets, at most `limit`.

        If there are more, those of the payer with most of them are left out.
        """
        with self._lock:
            columns = self._columns
            at = np.flatnonzero(columns["live"] & columns["listening"])
            if len(at) > limit:
                at = at[~self._surplus(at, limit)]
            rows = self._table.take(at, _ROW)
        return _owners(rows)

    def _at_port(self, port: int) -> np.ndarray:
        rows = np.empty(self.count(port), np.int64)
        if len(rows):
            lib.portmap_rows(self._pointers, port, numbers(rows))
        return rows

    def _of(self, key: ProcessKey) -> np.ndarray:
        columns = self._columns
        rows = np.flatnonzero(columns["tgid"] == key[0])
        return np.asarray(rows[columns["live"][rows] & (columns["start_ns"][rows] == key[1])])

    def _owner(self, row: int) -> PortOwner:
        columns = self._table.columns
        endpoint = (
            columns["netns"].item(row),
            columns["proto"].item(row),
            columns["family"].item(row),
            columns["address"][row].tobytes(),
            columns["port"].item(row),
        )
        return PortOwner(
            endpoint,
            columns["tgid"].item(row),
            columns["start_ns"].item(row),
            columns["uid"].item(row),
            text(columns["comm"].item(row)),
            columns["cookie"].item(row),
            columns["listening"].item(row),
            columns["seen_ns"].item(row),
        )

    def _put_all(self, new: np.ndarray) -> np.ndarray:
        parts = [self._put(new[at : at + _PART]) for at in range(0, len(new), _PART)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _put(self, new: np.ndarray) -> np.ndarray:
        """Add up to _PART owners, each once, or renew them; the rows where they are."""
        rows = self._table.find(new)
        lib.portmap_renew(
            self._pointers, ffi.from_buffer("struct port[]", new), len(new), numbers(rows)
        )
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            new["live"] = True
            rows[missing] = places = self._take_rows(len(missing))
            self._table.put(places, taken(new, missing))
            lib.portmap_link(self._pointers, numbers(places), len(places))
            self._shrink()
        return rows

    def _take_rows(self, count: int) -> np.ndarray:
        rows = np.empty(0, np.int64)
        if self._count < self._top:
            rows = np.flatnonzero(~self._columns["live"])[:count]
        more = count - len(rows)
        self._count += count
        self._top += more
        return np.concatenate((rows, np.arange(self._top - more, self._top)))

    def _drop(self, mask: np.ndarray) -> int:
        return self._drop_rows(np.flatnonzero(mask))

    def _drop_rows(self, rows: np.ndarray) -> int:
        lib.portmap_unlink(self._pointers, numbers(rows), len(rows))
        self._table.remove(rows)
        self._columns["live"][rows] = False
        self._count -= len(rows)
        return len(rows)

    def _compact(self) -> None:
        """Move owners together and give the memory of free rows back."""
        self._table.keep(self._columns["live"])
        self._top = self._count
        self._heads[:] = self._counts[:] = 0
        rows = np.arange(self._top)
        lib.portmap_link(self._pointers, numbers(rows), len(rows))
        self._table.trim(self._top)

    def _shrink(self) -> None:
        excess = self._count - self.limit
        if excess <= 0:
            return
        rows = np.flatnonzero(self._columns["live"])
        self.evicted += self._drop_rows(rows[self._surplus(rows, self.limit - self.limit // 4)])

    def payers(self, uids: np.ndarray) -> np.ndarray:
        """Return the user who counts for each uid: uint32 (n,), from uint32 (n,)."""
        return uids if self._payers is None else self._payers.of(uids)

    def _surplus(self, rows: np.ndarray, keep: int) -> np.ndarray:
        """Return a mask of those of `rows` that go, so that `keep` stay."""
        columns = self._columns
        uids, seen = columns["uid"][rows], columns["seen_ns"][rows]
        payers = self.payers(uids)
        names = columns["words"][rows]
        programs = mix((payers.astype(np.uint64), names[:, 0], names[:, 1]), 0)
        age = (seen.max() - seen).view(np.int64)
        return surplus(age, (payers, programs), keep)

    def _rows_of(
        self, sockets: Sequence[BoundSocket], now_ns: int, listening: bool = False
    ) -> np.ndarray:
        rows = np.zeros(len(sockets), _ROW)
        if not len(rows):
            return rows
        ends = zip(*(one.endpoint for one in sockets), strict=True)
        rows["netns"], rows["proto"], rows["family"], addresses, rows["port"] = ends
        rows["address"] = np.frombuffer(b"".join(addresses), np.uint64).reshape(-1, 2)
        for name in ("tgid", "start_ns", "uid", "cookie"):
            rows[name] = [getattr(one, name) for one in sockets]
        rows["comm"] = [one.comm.encode() for one in sockets]
        rows["seen_ns"] = now_ns
        rows["listening"] = listening
        slots, bits = new_slots(len(rows))
        count = lib.ports_newest(
            ffi.from_buffer("struct port[]", rows),
            len(rows),
            self._seed,
            ffi.from_buffer("uint32_t[]", slots),
            bits,
        )
        return rows[:count]


def _owners(rows: np.ndarray, limit: int | None = None) -> list[PortOwner]:
    """Of copied rows: the last seen first, at most `limit`."""
    order = np.argsort(rows["seen_ns"], kind="stable")[::-1][:limit]
    rows = rows[order]
    addresses = np.ascontiguousarray(rows["address"]).tobytes()
    columns = (
        rows[name].tolist()
        for name in (
            "netns", "proto", "family", "port", "tgid", "start_ns", "uid", "comm", "cookie",
            "listening", "seen_ns",
        )
    )  # fmt: skip
    return [
        PortOwner(
            (netns, proto, family, addresses[at : at + 16], port),
            tgid,
            start_ns,
            uid,
            text(comm),
            cookie,
            listening,
            seen_ns,
        )
        for at, (netns, proto, family, port, tgid, start_ns, uid, comm, cookie, listening, seen_ns)
        in zip(range(0, len(addresses), 16), zip(*columns, strict=True), strict=True)
    ]  # fmt: skip


def _fitting(
    owners: list[PortOwner], proto: int | None, address: tuple[int, bytes] | None
) -> list[PortOwner]:
    """As who() has them: those that fit, last seen first."""
    owners.sort(key=_seen, reverse=True)
    return [
        owner
        for owner in owners
        if (proto is None or owner.proto == proto)
        and (address is None or _serves(owner.endpoint, address))
    ]


_seen = attrgetter("seen_ns")


def _serves(endpoint: Endpoint, address: tuple[int, bytes]) -> bool:
    family, raw = address
    if endpoint[3] == raw and endpoint[2] == family:
        return True
    return not any(endpoint[3]) and endpoint[2] >= family


def _serve(rows: np.ndarray, address: tuple[int, bytes]) -> np.ndarray:
    """Which of `rows` are bound to the address, or to a wildcard that takes it."""
    family, raw = address
    wanted = np.frombuffer(raw, np.uint64)
    exact = (rows["address"] == wanted).all(axis=1) & (rows["family"] == family)
    wildcard = ~rows["address"].any(axis=1) & (rows["family"] >= family)
    return np.asarray(exact | wildcard)
