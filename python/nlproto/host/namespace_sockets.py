# SPDX-License-Identifier: MIT
"""One socket for each network namespace that can be entered, within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from nlproto.errors import Error, NoPrivilege
from nlproto.host import netns, procfs
from nlproto.host.sockdiag import SockDiag
from nlproto.running.closing import Closing
from nlproto.running.supervise import Failures

__all__ = ["NamespaceSockets", "PerNamespace"]

_LOOK_NS = 2_000_000_000


class _Closable(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=_Closable)


class PerNamespace(Closing, Generic[S]):
    """Looks for new and ended namespaces at most every 2 s. A context manager, for one thread.

    There are at most netns.room() namespaces, chosen as engine packet chooses. `make` makes the
    socket, inside the namespace; it raises NoPrivilege if that is refused. Looks take at most one
    `share`th of the time (0: no limit), so with many processes they are rarer.

    A socket keeps its namespace alive. So a look closes the socket of a namespace that no process
    and no name holds any more.
    """

    def __init__(
        self,
        make: Callable[[], S],
        now_ns: Callable[[], int] = time.monotonic_ns,
        share: int = 0,
    ) -> None:
        self._share = share
        self._make = make
        self._now_ns = now_ns
        self._look_ns = now_ns()
        """When the next look is due."""
        self.own = netns.own()
        self._failures = Failures("sock_diag")
        self._namespaces: dict[int, S | None] = {}

    def close(self) -> None:
        """Close all sockets."""
        for diag in self._namespaces.values():
            if diag is not None:
                diag.close()
        self._namespaces.clear()

    def get(self, number: int) -> S | None:
        """Return the socket of namespace `number`; None if it cannot be had."""
        if number not in self._namespaces:
            self.look()
        return self._namespaces.get(number)

    def look(self) -> None:
        """Find new namespaces and those that have ended."""
        now = self._now_ns()
        if now < self._look_ns:
            return
        try:
            there = netns.paths()
        except OSError:  # no descriptor is left for it
            there = None
        took = self._now_ns() - now
        self._look_ns = now + max(_LOOK_NS, self._share * took)
        if there is None:
            return
        there.pop(self.own, None)
        if len(there) > netns.room():
            owners = {number: netns.owner_or_unknown(path) for number, path in there.items()}
            chosen = netns.choose(owners, self._namespaces, netns.room())
            self._failures.add(
                Error(f"only {len(chosen)} of {len(there)} network namespaces are read")
            )
            there = {number: path for number, path in there.items() if number in chosen}
        for number in set(self._namespaces) - set(there) - {self.own}:
            diag = self._namespaces.pop(number)
            if diag is not None:
                diag.close()
        if self.own not in self._namespaces:
            try:
                self._namespaces[self.own] = self._make()
            except NoPrivilege:
                self._namespaces[self.own] = None
        for number, path in there.items():
            if number in self._namespaces:
                continue
            try:
                self._namespaces[number] = netns.run_inside(path, self._make)
            except (Error, OSError):
                self._namespaces[number] = None

    def there(self) -> dict[int, S]:
        """Return the sockets of all namespaces."""
        self.look()
        return {number: one for number, one in self._namespaces.items() if one is not None}


class NamespaceSockets(PerNamespace[SockDiag]):
    """The sock_diag sockets of all namespaces."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns, share: int = 0) -> None:
        super().__init__(SockDiag, now_ns, share)

    def tables(self) -> dict[int, np.ndarray]:
        """Return all sockets of each namespace (HOST_SOCKET); ours from /proc/net if need be."""
        self.look()
        found: dict[int, np.ndarray] = {}
        for number, diag in list(self._namespaces.items()):
            if diag is not None:
                try:
                    found[number] = diag.dump()
                    continue
                except NoPrivilege:
                    diag.close()
                    self._namespaces[number] = None
            if number == self.own:
                found[number] = procfs.tables()
        return found
