# SPDX-License-Identifier: MIT
"""Listeners and bound UDP sockets with all their holders, from the kernel's tables."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from nlproto.diags import Diags
from nlproto.holders import Holders
from nlproto.portmap import BoundSocket
from nlproto.procfs import Owner
from nlproto.sockdiag import TcpState
from nlproto.wire import text

__all__ = ["KernelSockets"]

_HELD_NS = 3_000_000_000
"""How long the holders of one socket are taken as known."""


class KernelSockets:
    """Of every network namespace that can be entered; a context manager, for one thread."""

    def __init__(
        self, holders: Holders | None = None, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._holders = holders or Holders()
        self._now_ns = now_ns
        self._diags = Diags(now_ns)
        self._held: dict[int, tuple[int, tuple[Owner, ...]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._diags.close()

    def read(self) -> tuple[list[BoundSocket], set[int]]:
        """(one entry for each holder of each listener and bound UDP socket, all cookies).

        There are no cookies where sock_diag is refused.
        """
        tables = self._diags.tables()
        bound = {number: table[_is_bound(table)] for number, table in tables.items()}
        inodes = {inode for table in bound.values() for inode in table["inode"].tolist()}
        self._held = {inode: held for inode, held in self._held.items() if inode in inodes}
        cookies = {cookie for table in tables.values() for cookie in table["cookie"].tolist()}
        entries = [one for number, table in bound.items() for one in self._entries(number, table)]
        return entries, cookies - {0}

    def _entries(self, netns: int, table: np.ndarray) -> Iterator[BoundSocket]:
        for row in table:
            endpoint = (
                netns,
                int(row["proto"]),
                int(row["family"]),
                row["saddr"].tobytes(),
                int(row["sport"]),
            )
            for owner in self._owners(int(row["inode"])):
                yield BoundSocket(
                    endpoint,
                    owner.identity.tgid,
                    owner.identity.start_ns,
                    owner.uid,
                    text(owner.comm),
                    int(row["cookie"]),
                )

    def _owners(self, inode: int) -> tuple[Owner, ...]:
        now = self._now_ns()
        known = self._held.get(inode)
        if known is not None and known[1] and now - known[0] < _HELD_NS:
            return known[1]
        owners = self._holders.find(inode)
        self._held[inode] = (now, owners)
        return owners


def _is_bound(table: np.ndarray) -> np.ndarray:
    udp = table["proto"] == socket.IPPROTO_UDP
    listening = ~udp & (table["state"] == TcpState.LISTEN)
    bound = udp & (table["dport"] == 0) & (table["sport"] != 0)
    return np.asarray((listening | bound) & (table["inode"] != 0))
