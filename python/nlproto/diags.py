# SPDX-License-Identifier: MIT
"""One sock_diag socket for each network namespace that can be entered."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

import numpy as np

from nlproto import descriptors, netns, procfs
from nlproto.errors import Error, NoPrivilege
from nlproto.sockdiag import SockDiag
from nlproto.supervise import Failures

__all__ = ["Diags"]

_LOOK_NS = 2_000_000_000
MAX_NETNS = 4096


class Diags:
    """Looks for new and ended namespaces at most every 2 s; a context manager, for one thread.

    Of MAX_NETNS at most, fewer where descriptors are scarce.
    A sock_diag socket keeps its namespace alive, so one that no process and no name holds any
    more is let go at the next look.
    """

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._looked_ns = -_LOOK_NS
        self.own = netns.own()
        self._failures = Failures("sock_diag")
        self._most = descriptors.namespaces(MAX_NETNS)
        self._diags: dict[int, SockDiag | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for diag in self._diags.values():
            if diag is not None:
                diag.close()
        self._diags.clear()

    def get(self, number: int) -> SockDiag | None:
        """That of namespace `number`, None when it is not to be entered or sock_diag is refused."""
        if number not in self._diags:
            self.look()
        return self._diags.get(number)

    def look(self) -> None:
        """Take note of namespaces that came and went."""
        now = self._now_ns()
        if now - self._looked_ns < _LOOK_NS:
            return
        self._looked_ns = now
        there = netns.paths()
        for number in set(self._diags) - set(there) - {self.own}:
            diag = self._diags.pop(number)
            if diag is not None:
                diag.close()
        if self.own not in self._diags:
            try:
                self._diags[self.own] = SockDiag()
            except NoPrivilege:
                self._diags[self.own] = None
        for number, path in there.items():
            if number in self._diags:
                continue
            if len(self._diags) >= self._most:
                self._failures.add(
                    Error(f"sockets of {self._most} network namespaces are read, not of all there")
                )
                return
            try:
                self._diags[number] = netns.run_inside(path, SockDiag)
            except (Error, OSError):
                self._diags[number] = None

    def tables(self) -> dict[int, np.ndarray]:
        """{namespace: all its sockets (HOST_SOCKET)}; of our own by /proc/net if need be."""
        self.look()
        found: dict[int, np.ndarray] = {}
        for number, diag in list(self._diags.items()):
            if diag is not None:
                try:
                    found[number] = diag.dump()
                    continue
                except NoPrivilege:
                    diag.close()
                    self._diags[number] = None
            if number == self.own:
                found[number] = procfs.tables()
        return found
