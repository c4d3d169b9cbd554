# SPDX-License-Identifier: MIT
"""Looks up sockets of one network namespace: by sock_diag, or from /proc/net as the fallback."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nlproto.errors import NoPrivilege
from nlproto.host import procfs
from nlproto.host.sockdiag import ALL_STATES, ANY, HOST_SOCKET, SockDiag, TcpState
from nlproto.records.ends import MAPPED
from nlproto.running.budget import Budget

__all__ = ["ANY", "Rivals", "SocketLookup", "Tuple", "mapped", "tuple_of_socket"]

_TABLE_SHARE, _TABLE_SAVED_NS = 4, 500_000_000  # of the time, for reading /proc/net
_BOUND_NS = 200_000_000  # how long the sockets of a port stay valid
_RIVALS_NS = 10_000_000  # the same where a new one would matter
_BOUND_LIMIT = 1024  # ports
_TOGETHER = 256
"""So many answers are not yet old when the last of them is used."""


class Tuple(NamedTuple):
    """One flow as this host sees it. Addresses are the 16 bytes of a record."""

    proto: int
    family: int
    local: bytes
    lport: int
    remote: bytes
    rport: int


class Rivals(NamedTuple):
    """Other UDP sockets at a socket's port."""

    present: set[tuple[int, int]]
    """Their inodes and users."""
    gone: list[int]
    """Inodes of those that may have been there when the packet was sent."""


def mapped(address: bytes) -> bytes:
    """Return ::ffff:a.b.c.d, which is an IPv4 address in a dual-stack socket."""
    return MAPPED + address[:4]


def tuple_of_socket(row: np.void) -> Tuple:
    """Return the ends of a HOST_SOCKET."""
    return Tuple(
        int(row["proto"]),
        int(row["family"]),
        row["saddr"].tobytes(),
        int(row["sport"]),
        row["daddr"].tobytes(),
        int(row["dport"]),
    )


def _bound_alike(sockets: np.ndarray, row: np.void) -> np.ndarray:
    same = (sockets["dport"] == 0) & (sockets["family"] == row["family"])
    same &= (sockets["saddr"] == row["saddr"]).all(axis=1)
    found: np.ndarray = sockets[same]
    return found


class SocketLookup:
    """Sockets of one network namespace. For one thread at a time.

    If sock_diag is refused, `diag` is None. Then /proc/net in `net` is read, for a quarter of the
    time at most. `net` may be of a process whose pid is used again: what it shows counts only while
    it is of the namespace `inode` (0: of any).
    """

    def __init__(
        self,
        diag: SockDiag | None,
        now_ns: Callable[[], int],
        net: Path = procfs.PROC / "self" / "net",
        inode: int = 0,
    ) -> None:
        self._diag = diag
        self._now_ns = now_ns
        self._net = net
        self._inode = inode
        self._table: dict[Tuple, np.void] = {}
        self._table_budget = Budget(_TABLE_SHARE, _TABLE_SAVED_NS, now_ns)
        self._bound: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self._gone: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        """The last sockets that left a port, and since when it is known."""
        self._answers: dict[Tuple, np.void | None] = {}
        """Those of ask_together()."""

    @property
    def by_diag(self) -> bool:
        """Whether sock_diag answers."""
        return self._diag is not None

    def ask_together(self, several: Sequence[Tuple]) -> None:
        """Ask sock_diag about `several`. The next find() of each returns its answer."""
        answers = [] if self._diag is None else self._diag.find_many(several[:_TOGETHER])
        self._answers = dict(zip(several, answers, strict=False))

    def find(self, one: Tuple) -> np.void | None:
        """Return the socket (HOST_SOCKET) of a packet of `one`; None if there is none.

        Raises Error, as all of these, if the kernel has no answer now.
        """
        if one in self._answers:
            return self._answers.pop(one)
        if self._diag is not None:
            try:
                return self._diag.find(
                    one.proto, one.family, one.local, one.lport, one.remote, one.rport
                )
            except NoPrivilege:
                self._diag = None
        found = self._look_up(one)
        if found is None and self._table_budget.allows():
            self._read_tables()
            found = self._look_up(one)
        return found

    def listener(self, one: Tuple) -> np.void | None:
        """Return the TCP listener (HOST_SOCKET) at the local end of `one`."""
        return self.find(Tuple(one.proto, one.family, one.local, one.lport, ANY, 0))

    def bound(self, proto: int, port: int, older_ns: int = _BOUND_NS) -> np.ndarray:
        """Return UDP sockets or TCP listeners on `port`: HOST_SOCKETs at most `older_ns` old."""
        now = self._now_ns()
        asked, sockets = self._bound.get((proto, port), (None, np.zeros(0, HOST_SOCKET)))
        if asked is None or now - asked >= older_ns:
            if len(self._bound) > _BOUND_LIMIT:
                self._bound.clear()
                self._gone.clear()
            before, sockets = sockets, self._bound_to(proto, port)
            self._bound[proto, port] = (now, sockets)
            if gone := set(before["inode"].tolist()) - set(sockets["inode"].tolist()):
                self._gone[proto, port] = (
                    self._now_ns(),
                    before[np.isin(before["inode"], [*gone])],
                )
        return sockets

    def rivals(self, row: np.void, fresh: bool = False) -> np.ndarray:
        """Return the sockets bound exactly as `row` (HOST_SOCKET), itself included.

        If there are several, they share the port (SO_REUSEPORT), and a program may choose among
        them.
        """
        bound = self.bound(int(row["proto"]), int(row["sport"]), 0 if fresh else _RIVALS_NS)
        return _bound_alike(bound, row)

    def rivals_then(self, row: np.void, sent_ns: int) -> Rivals | None:
        """Return the rivals of a UDP socket when a packet was sent; None if it is connected."""
        if row["proto"] != socket.IPPROTO_UDP or row["dport"]:
            return None
        port = int(row["sport"])
        # the first look after the packet knows best
        bound = self.bound(socket.IPPROTO_UDP, port, max(_RIVALS_NS, self._now_ns() - sent_ns))
        present = set()
        if bound["inode"].tolist() != [int(row["inode"])]:
            there = _bound_alike(bound, row)[["inode", "uid"]].tolist()
            present = {one for one in there if one[0] not in (0, int(row["inode"]))}
        gone_ns, gone = self._gone.get((socket.IPPROTO_UDP, port), (0, None))
        if gone is None or sent_ns >= gone_ns:
            return Rivals(present, [])
        return Rivals(present, _bound_alike(gone, row)["inode"].tolist())

    def receivers(self, one: Tuple) -> list[np.void]:
        """Return the UDP sockets that receive a multicast or broadcast.

        By default each socket on the port receives every group that anybody here joined
        (IP_MULTICAST_ALL). From outside nobody sees who joined which group.
        """
        found = []
        for row in self.bound(one.proto, one.lport):
            tuple_ = tuple_of_socket(row)
            local = tuple_.local == ANY or tuple_.local in (one.local, mapped(one.local))
            remote = not tuple_.rport or (
                tuple_.rport == one.rport and tuple_.remote in (one.remote, mapped(one.remote))
            )
            family = tuple_.family == one.family or tuple_.family == socket.AF_INET6
            if local and remote and family:
                found.append(row)
        return found

    def _read_tables(self) -> None:
        with self._table_budget.spend():
            self._table = {tuple_of_socket(row): row for row in self._read_net()}

    def _read_net(self) -> np.ndarray:
        table = procfs.tables(self._net)
        try:
            same = not self._inode or os.stat(self._net.parent / "ns/net").st_ino == self._inode
        except OSError:
            same = False
        return table if same else table[:0]

    def _look_up(self, one: Tuple) -> np.void | None:
        """Return the socket of /proc/net's tables that the kernel would choose: the most exact."""
        forms = [(one.family, one.local, one.remote)]
        if one.family == socket.AF_INET:
            remote = mapped(one.remote) if one.rport else ANY
            forms.append((socket.AF_INET6, mapped(one.local), remote))
        for connected in (True, False):
            for family, local, remote in forms:
                for address in (local, ANY):
                    peer = (remote, one.rport) if connected else (ANY, 0)
                    found = self._table.get(Tuple(one.proto, family, address, one.lport, *peer))
                    if found is not None:
                        return found
        return None

    def _bound_to(self, proto: int, port: int) -> np.ndarray:
        states = 1 << TcpState.LISTEN if proto == socket.IPPROTO_TCP else ALL_STATES
        if self._diag is not None:
            try:
                return self._diag.dump((proto,), lport=port, states=states)
            except NoPrivilege:
                self._diag = None
        table = self._read_net()
        there = (table["proto"] == proto) & (table["sport"] == port)
        if proto == socket.IPPROTO_TCP:
            there &= table["state"] == TcpState.LISTEN
        found: np.ndarray = table[there]
        return found
