# SPDX-License-Identifier: MIT
"""Sockets with all their holders, from the kernel's tables."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import numpy as np

from nlproto.host.holders import Holders
from nlproto.host.namespace_diags import NamespaceDiags
from nlproto.host.procfs import Owner
from nlproto.host.sockdiag import TcpState
from nlproto.host.sockets import held
from nlproto.records.wire import text

__all__ = ["Endpoint", "BoundSocket", "KernelSockets", "HeldSockets"]

_HELD_NS = 3_000_000_000
"""How long the holders of a bound socket are taken as known."""
_ROUND_NS = 60_000_000_000
"""And those of a connected one, which traffic tells sooner."""
_ASKED = 200
"""Connected sockets of a round that are asked about in one look."""
_MAPPED = bytes(10) + b"\xff\xff"


Endpoint = tuple[int, int, int, bytes, int]
"""(netns, protocol number, family, 16 address bytes, port): the local end of a socket."""


class BoundSocket(NamedTuple):
    """A socket of the kernel's tables with one of its holders."""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int

    @property
    def key(self) -> tuple[int, int]:
        return self.tgid, self.start_ns


class HeldSockets(NamedTuple):
    """One entry for each holder of each socket."""

    bound: list[BoundSocket]
    """All listeners and bound UDP sockets."""
    connected: list[BoundSocket]
    """Some of the connected ones; each is among them once in a round of a minute."""
    cookies: set[int]
    """Of all sockets that a process still has; empty where sock_diag is refused."""


class KernelSockets:
    """Of every network namespace that can be entered; a context manager, for one thread."""

    def __init__(
        self, holders: Holders | None = None, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._holders = holders or Holders()
        self._now_ns = now_ns
        self._diags = NamespaceDiags(now_ns)
        self._held: dict[int, tuple[int, tuple[Owner, ...]]] = {}
        self._round_ns = self._began_ns = now_ns()
        self._waiting: list[_Row] = []
        self.tables: dict[int, np.ndarray] = {}
        """{namespace: all its sockets (HOST_SOCKET)} as of the last look."""
        self.looked_ns = 0
        """When it began, CLOCK_MONOTONIC; 0: there was none yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._diags.close()

    def holders_of(self, inode: int) -> Iterator[Owner]:
        """Who holds a socket at this moment, as far as known; from any thread."""
        return self._holders.peek(inode)

    def read(self) -> HeldSockets:
        self._began_ns = self._now_ns()
        tables = self._diags.tables()
        found = self._read(tables)
        self.tables, self.looked_ns = tables, self._began_ns
        return found

    def _read(self, tables: dict[int, np.ndarray]) -> HeldSockets:
        bound = [
            one
            for number, table in tables.items()
            for one in _rows(number, table[_is_bound(table)])
        ]
        owners = self._owners([one.inode for one in bound])
        cookies = {
            cookie for table in tables.values() for cookie in table["cookie"][held(table)].tolist()
        }
        return HeldSockets(
            [entry for one in bound for entry in _entries(one, owners[one.inode])],
            [
                entry
                for one in self._connected(tables)
                for entry in _entries(one, self._holders.known(one.inode))
            ],
            cookies - {0},
        )

    def _connected(self, tables: dict[int, np.ndarray]) -> list[_Row]:
        """Those whose turn it is."""
        now = self._now_ns()
        if not self._waiting and now >= self._round_ns:
            self._round_ns = now + _ROUND_NS
            if self._holders.walked_ns < self._began_ns:
                self._holders.walk()
            self._waiting = [
                one
                for number, table in tables.items()
                for one in _rows(number, table[_is_connected(table)])
            ]
        part, self._waiting = self._waiting[:_ASKED], self._waiting[_ASKED:]
        return part

    def _owners(self, inodes: list[int]) -> dict[int, tuple[Owner, ...]]:
        """The holders of each, as they were at most _HELD_NS ago."""
        now = self._now_ns()
        old, self._held = self._held, {}
        asked = []
        for inode in inodes:
            known = old.get(inode)
            if known is not None and known[1] and now - known[0] < _HELD_NS:
                self._held[inode] = known
            else:
                asked.append(inode)
        for inode, owners in self._holders.find_many(asked):
            self._held[inode] = (now, owners)
        return {inode: owners for inode, (_, owners) in self._held.items()}


class _Row(NamedTuple):
    """A HOST_SOCKET and its network namespace."""

    netns: int
    inode: int
    cookie: int
    proto: int
    family: int
    address: bytes
    port: int


def _rows(netns: int, table: np.ndarray) -> Iterator[_Row]:
    names = ("inode", "cookie", "proto", "family", "sport")
    raw = np.ascontiguousarray(table["saddr"]).tobytes()
    columns = zip(*(table[name].tolist() for name in names), strict=True)
    for at, (inode, cookie, proto, family, port) in zip(
        range(0, len(raw), 16), columns, strict=True
    ):
        yield _Row(netns, inode, cookie, proto, family, raw[at : at + 16], port)


def _entries(row: _Row, owners: tuple[Owner, ...]) -> Iterator[BoundSocket]:
    family, address = row.family, row.address
    if family == socket.AF_INET6 and address.startswith(_MAPPED):
        family, address = socket.AF_INET, address[len(_MAPPED) :].ljust(16, b"\0")
    endpoint = (row.netns, row.proto, family, address, row.port)
    for owner in owners:
        identity = owner.identity
        yield BoundSocket(
            endpoint, identity.tgid, identity.start_ns, owner.uid, _text(owner.comm), row.cookie
        )


_text = functools.lru_cache(4096)(text)


def _is_connected(table: np.ndarray) -> np.ndarray:
    return np.asarray((table["dport"] != 0) & (table["inode"] != 0) & (table["cookie"] != 0))


def _is_bound(table: np.ndarray) -> np.ndarray:
    udp = table["proto"] == socket.IPPROTO_UDP
    listening = ~udp & (table["state"] == TcpState.LISTEN)
    bound = udp & (table["dport"] == 0) & (table["sport"] != 0)
    return np.asarray((listening | bound) & (table["inode"] != 0))
