# SPDX-License-Identifier: MIT
"""The port map: (netns, proto, address, port) -> the processes that own it now."""

from __future__ import annotations

import secrets
import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from nlproto.host.kernel_sockets import BoundSocket, Endpoint
from nlproto.records.wire import RECORD, address_text, lib, text
from nlproto.tables.column_table import ColumnTable, mix
from nlproto.tables.processes import ProcessKey
from nlproto.tables.shares import Payers, surplus

__all__ = ["PortOwner", "PortMap"]

_ROW = np.dtype(
    [
        ("hash", "u8"),
        ("address", "u8", (2,)),
        ("start_ns", "u8"),
        ("cookie", "u8"),
        ("seen_ns", "u8"),
        ("netns", "u4"),
        ("tgid", "u4"),
        ("uid", "u4"),
        ("port", "u2"),
        ("proto", "u1"),
        ("family", "u1"),
        ("listening", "?"),
        ("live", "?"),
        ("comm", RECORD["comm"]),
    ]
)
_KEY = ("address", "start_ns", "netns", "tgid", "port", "proto", "family")
_FIRST_ROWS = 256
_FEW = 16
"""Owners that are found faster one by one than with NumPy."""
_PART = 2048
"""Flows that are learnt at once: no question waits longer than that for the lock."""


class PortOwner(NamedTuple):
    """One process at one local end."""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int
    listening: bool
    """Found in the kernel's tables as a listener or an unconnected UDP socket."""
    seen_ns: int
    """CLOCK_MONOTONIC when a packet or the kernel's tables last showed it."""

    @property
    def key(self) -> ProcessKey:
        return self.tgid, self.start_ns

    @property
    def netns(self) -> int:
        return self.endpoint[0]

    @property
    def proto(self) -> int:
        return self.endpoint[1]

    @property
    def address(self) -> str:
        return address_text(self.endpoint[2], self.endpoint[3])

    @property
    def port(self) -> int:
        return self.endpoint[4]


class PortMap:
    """Bounded, thread-safe. Traffic alone keeps an owner for `ttl_ns` after its last packet.

    When `limit` owners are reached a quarter goes, of whoever has most, the longest silent
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
        self._seed = secrets.randbits(64)
        self._table = ColumnTable(_ROW, _KEY)
        self._free: list[int] = []
        self._ports: defaultdict[int, set[int]] = defaultdict(set)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return self._table.columns

    def update(self, flows: np.ndarray) -> None:
        """Learn from FLOWs; forwarded, unnamed and those of closed sockets tell nothing."""
        dead = flows["flags"] & lib.SNIFFER_F_DEAD != 0
        useful = flows[(flows["tgid"] != 0) & (flows["forwarded"] == 0) & ~dead]
        rows = np.zeros(len(useful), _ROW)
        for name in ("start_ns", "cookie", "netns", "tgid", "uid", "proto", "family", "comm"):
            rows[name] = useful[name]
        rows["address"], rows["port"] = useful["laddr"], useful["lport"]
        rows["seen_ns"] = useful["last_ns"]
        for at in range(0, len(rows), _PART):
            with self._lock:
                self._put(rows[at : at + _PART])

    def replace_bound(self, sockets: Sequence[BoundSocket], now_ns: int) -> None:
        """Take the kernel's present listeners and bound sockets: those not among them are gone."""
        rows = _rows_of(sockets, now_ns)
        rows["listening"] = True
        with self._lock:
            present = self._put(rows)
            gone = self._columns["live"] & self._columns["listening"]
            gone[present] = False
            self._drop(gone)

    def add_connected(self, sockets: Sequence[BoundSocket], now_ns: int) -> None:
        """Learn of connected sockets from the kernel's tables, as from a packet at `now_ns`."""
        with self._lock:
            self._put(_rows_of(sockets, now_ns))

    def keep_cookies(self, cookies: set[int], before_ns: int) -> None:
        """Drop owners whose socket is not among all the kernel's `cookies`, read after `before_ns`.

        Owners seen since then, or known without a cookie, stay until their time is over.
        """
        there = np.fromiter(cookies, np.uint64, len(cookies))
        with self._lock:
            known = self._columns["cookie"].copy()
        gone = (known != 0) & ~np.isin(known, there)
        with self._lock:
            columns = self._columns
            same = columns["cookie"][: len(known)] == known
            gone &= same & (columns["seen_ns"][: len(known)] < max(0, before_ns))
            self._drop(gone & columns["live"][: len(known)])

    def forget_process(self, key: ProcessKey) -> None:
        """The process has exited."""
        with self._lock:
            self._drop(self._of(key))

    def expire(self, now_ns: int) -> None:
        """Drop owners that only traffic showed, and not for `ttl_ns`."""
        with self._lock:
            columns = self._columns
            old = columns["seen_ns"] < max(0, now_ns - self.ttl_ns)
            self._drop(old & columns["live"] & ~columns["listening"])

    def count(self, port: int) -> int:
        """How many owners `port` has."""
        return len(self._ports.get(port, ()))

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
            at = self._ports.get(port, ())
            if len(at) <= _FEW:
                owners = [self._owner(row) for row in at]
                return _fitting(owners, proto, address, uid)[:limit]
            rows = self._table.take(self._at_port(port), _ROW)
        fits = np.ones(len(rows), bool)
        if proto is not None:
            fits &= rows["proto"] == proto
        if uid is not None:
            fits &= rows["uid"] == uid
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
                at = at[np.isin(columns["start_ns"][at], starts)]
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
            fits = columns["live"] & np.isin(columns["cookie"], wanted)
            if uid is not None:
                fits &= columns["uid"] == uid
            rows = self._table.take(np.flatnonzero(fits), _ROW)
        found: defaultdict[int, list[PortOwner]] = defaultdict(list)
        for owner in _owners(rows, limit):
            found[owner.cookie].append(owner)
        return found

    def owned_by(self, key: ProcessKey) -> list[PortOwner]:
        """Every local end of one process, last seen first."""
        return self.select(keys=(key,))

    def everything(self) -> list[PortOwner]:
        """All owners, last seen first."""
        return self.select()

    # All of these with the lock held; a mask has an element for each row

    def _at_port(self, port: int) -> np.ndarray:
        return np.array(list(self._ports.get(port, ())), np.int64)

    def _of(self, key: ProcessKey) -> np.ndarray:
        columns = self._columns
        mask = columns["live"] & (columns["tgid"] == key[0])
        mask &= columns["start_ns"] == key[1]
        return np.asarray(mask)

    def _owner(self, row: int) -> PortOwner:
        columns = self._columns
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

    def _put(self, new: np.ndarray) -> np.ndarray:
        """Add owners or renew them; the rows where they are. Writes to `new`."""
        new["hash"] = mix(
            (
                new["address"][:, 0],
                new["address"][:, 1],
                new["start_ns"],
                new["netns"].astype(np.uint64) << np.uint64(32) | new["tgid"],
                new["port"].astype(np.uint64) << np.uint64(16)
                | new["proto"].astype(np.uint64) << np.uint64(8)
                | new["family"],
            ),
            self._seed,
        )
        new = _newest_of_each(new)
        rows = self._table.find(new)
        known = rows >= 0
        if known.any():
            self._renew(rows[known], new[known])
        missing = np.flatnonzero(~known)
        if len(missing):
            new["live"][missing] = True
            rows[missing] = self._take_rows(len(missing))
            self._table.put(rows[missing], new[missing])
            for port, row in zip(
                new["port"][missing].tolist(), rows[missing].tolist(), strict=True
            ):
                self._ports[port].add(row)
            self._shrink()
        return rows

    def _renew(self, rows: np.ndarray, new: np.ndarray) -> None:
        columns = self._columns
        cookie, comm = columns["cookie"][rows], columns["comm"][rows]
        # a connection accepted on the listener's own address does not take its place
        stays = columns["listening"][rows] & ~new["listening"] & (cookie != 0)
        columns["cookie"][rows] = np.where(stays | (new["cookie"] == 0), cookie, new["cookie"])
        columns["comm"][rows] = np.where(new["comm"] == b"", comm, new["comm"])
        columns["uid"][rows] = new["uid"]
        columns["listening"][rows] |= new["listening"]
        columns["seen_ns"][rows] = np.maximum(columns["seen_ns"][rows], new["seen_ns"])

    def _take_rows(self, count: int) -> np.ndarray:
        if count > len(self._free):
            before = self._table.capacity
            wanted = min(max(2 * before, _FIRST_ROWS), self.limit + _PART)
            self._table.grow(max(wanted, before + count))
            self._free += range(self._table.capacity - 1, before - 1, -1)
        rows = np.array(self._free[-count:], np.int64)
        del self._free[-count:]
        self._count += count
        return rows

    def _drop(self, mask: np.ndarray) -> int:
        rows = np.flatnonzero(mask)
        columns = self._columns
        for port, row in zip(columns["port"][rows].tolist(), rows.tolist(), strict=True):
            at_port = self._ports[port]
            at_port.discard(row)
            if not at_port:
                del self._ports[port]
        self._table.remove(rows)
        columns["live"][rows] = False
        self._free += rows.tolist()
        self._count -= len(rows)
        return len(rows)

    def _shrink(self) -> None:
        excess = self._count - self.limit
        if excess <= 0:
            return
        rows = np.flatnonzero(self._columns["live"])
        uids, seen = self._columns["uid"][rows], self._columns["seen_ns"][rows]
        payers = uids if self._payers is None else self._payers.of(uids)
        names = self._columns["comm"][rows].view(np.uint64).reshape(len(rows), 2)
        programs = mix((payers.astype(np.uint64), names[:, 0], names[:, 1]), 0)
        age = (seen.max() - seen).view(np.int64)
        mask = np.zeros(self._table.capacity, bool)
        mask[rows[surplus(age, (payers, programs), self.limit - self.limit // 4)]] = True
        self.evicted += self._drop(mask)


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


def _rows_of(sockets: Sequence[BoundSocket], now_ns: int) -> np.ndarray:
    rows = np.zeros(len(sockets), _ROW)
    for number, one in enumerate(sockets):
        row = rows[number]
        row["netns"], row["proto"], row["family"], address, row["port"] = one.endpoint
        row["address"] = np.frombuffer(address, np.uint64)
        row["tgid"], row["start_ns"], row["uid"] = one.tgid, one.start_ns, one.uid
        row["comm"], row["cookie"] = one.comm.encode(), one.cookie
    rows["seen_ns"] = now_ns
    return rows


def _newest_of_each(new: np.ndarray) -> np.ndarray:
    """One row of each hash: the last seen."""
    order = np.lexsort((new["seen_ns"], new["hash"]))
    hashes = new["hash"][order]
    last = np.ones(len(order), bool)
    last[:-1] = hashes[1:] != hashes[:-1]
    return new[order[last]]


def _fitting(
    owners: list[PortOwner], proto: int | None, address: tuple[int, bytes] | None, uid: int | None
) -> list[PortOwner]:
    """As who() has them: those that fit, last seen first."""
    owners.sort(key=_seen, reverse=True)
    return [
        owner
        for owner in owners
        if (proto is None or owner.proto == proto)
        and (uid is None or owner.uid == uid)
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
