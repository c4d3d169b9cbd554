# SPDX-License-Identifier: MIT
"""Sockets with all their holders, from the kernel's tables."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class BoundSocket:
    """A socket of the kernel's tables with one of its holders."""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int


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
        self._round_ns = now_ns()
        self._waiting: list[tuple[int, np.void]] = []
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
        began = self._now_ns()
        tables = self._diags.tables()
        found = self._read(tables)
        self.tables, self.looked_ns = tables, began
        return found

    def _read(self, tables: dict[int, np.ndarray]) -> HeldSockets:
        bound = {number: table[_is_bound(table)] for number, table in tables.items()}
        inodes = {inode for table in bound.values() for inode in table["inode"].tolist()}
        self._held = {inode: held for inode, held in self._held.items() if inode in inodes}
        cookies = {
            cookie for table in tables.values() for cookie in table["cookie"][held(table)].tolist()
        }
        return HeldSockets(
            [
                entry
                for number, table in bound.items()
                for row in table
                for entry in _entries(number, row, self._owners(int(row["inode"])))
            ],
            [
                entry
                for number, row in self._connected(tables)
                for entry in _entries(number, row, self._holders.known(int(row["inode"])))
            ],
            cookies - {0},
        )

    def _connected(self, tables: dict[int, np.ndarray]) -> list[tuple[int, np.void]]:
        """(namespace, HOST_SOCKET) of those whose turn it is."""
        now = self._now_ns()
        if not self._waiting and now >= self._round_ns:
            self._round_ns = now + _ROUND_NS
            self._holders.walk()
            self._waiting = [
                (number, row)
                for number, table in tables.items()
                for row in table[_is_connected(table)]
            ]
        part, self._waiting = self._waiting[:_ASKED], self._waiting[_ASKED:]
        return part

    def _owners(self, inode: int) -> tuple[Owner, ...]:
        now = self._now_ns()
        known = self._held.get(inode)
        if known is not None and known[1] and now - known[0] < _HELD_NS:
            return known[1]
        owners = self._holders.find(inode)
        self._held[inode] = (now, owners)
        return owners


def _entries(netns: int, row: np.void, owners: tuple[Owner, ...]) -> Iterator[BoundSocket]:
    family, address = int(row["family"]), row["saddr"].tobytes()
    if family == socket.AF_INET6 and address.startswith(_MAPPED):
        family, address = socket.AF_INET, address[len(_MAPPED) :].ljust(16, b"\0")
    endpoint = (netns, int(row["proto"]), family, address, int(row["sport"]))
    for owner in owners:
        identity = owner.identity
        yield BoundSocket(
            endpoint,
            identity.tgid,
            identity.start_ns,
            owner.uid,
            text(owner.comm),
            int(row["cookie"]),
        )


def _is_connected(table: np.ndarray) -> np.ndarray:
    return np.asarray((table["dport"] != 0) & (table["inode"] != 0) & (table["cookie"] != 0))


def _is_bound(table: np.ndarray) -> np.ndarray:
    udp = table["proto"] == socket.IPPROTO_UDP
    listening = ~udp & (table["state"] == TcpState.LISTEN)
    bound = udp & (table["dport"] == 0) & (table["sport"] != 0)
    return np.asarray((listening | bound) & (table["inode"] != 0))
