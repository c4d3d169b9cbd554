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
from nlproto.running.budget import Patience
from nlproto.running.closing import Closing
from nlproto.running.supervise import Failures

__all__ = ["NamespaceSockets", "PerNamespace"]

_LOOK_NS = 2_000_000_000
_REST_NS = 250_000_000  # the same if the last look had no time for all
_BEHIND_NS = 5_000_000_000


class _Closable(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=_Closable)


class PerNamespace(Closing, Generic[S]):
    """Looks for new and ended namespaces at most every 2 s. A context manager, for one thread.

    There are at most netns.room() namespaces, chosen as engine packet chooses. `make` makes the
    socket, inside the namespace; it raises NoPrivilege if that is refused. Looks take at most one
    `share`th of the time (0: no limit), so with many processes they are rarer. A look enters all
    new namespaces of root, and users' as far as there is time. The next one enters others.

    A socket keeps its namespace alive. So a look closes the socket of a namespace that no process
    and no name holds any more.
    """

    def __init__(
        self,
        make: Callable[[], S],
        now_ns: Callable[[], int] = time.monotonic_ns,
        share: int = 0,
        others_ns: int | None = None,
        finder: netns.Finder | None = None,
    ) -> None:
        self._finder = netns.Finder() if finder is None else finder
        self._owns_finder = finder is None
        self._share = share
        self._others_ns = others_ns
        self._make = make
        self._now_ns = now_ns
        self._look_ns = now_ns()
        """When the next look is due."""
        self.own = netns.own()
        self._failures = Failures("sock_diag")
        self._namespaces: dict[int, S | None] = {}
        self._owners: dict[int, int] = {}
        """Who owns each namespace: a uid, or UNKNOWN_OWNER. 0: root, or it is ours."""

    def close(self) -> None:
        """Close all sockets."""
        for diag in self._namespaces.values():
            if diag is not None:
                diag.close()
        self._namespaces.clear()
        if self._owns_finder:
            self._finder.close()

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
            there = self._finder.paths()
        except OSError:  # no descriptor is left for it
            there = None
        took = self._now_ns() - now
        self._look_ns = now + max(_LOOK_NS, self._share * took)
        if there is None:
            return
        there.pop(self.own, None)
        new = {number: path for number, path in there.items() if number not in self._namespaces}
        self._owners = {
            one: owner
            if (owner := self._owners.get(one, netns.UNKNOWN_OWNER)) != netns.UNKNOWN_OWNER
            else netns.owner_or_unknown(path, one) or 0
            for one, path in there.items()
        }
        if len(there) > netns.room():
            chosen = netns.choose(self._owners, self._namespaces, netns.room())
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
        patience = None
        for number in sorted(there.keys() & new.keys(), key=lambda one: self._owners[one] != 0):
            if self._owners[number] and (patience := patience or self._patience()).is_over():
                self._look_ns = min(self._look_ns, now + max(_REST_NS, self._share * took))
                break
            try:
                self._namespaces[number] = netns.run_inside(new[number], number, self._make)
            except NoPrivilege:
                self._namespaces[number] = None
            except (Error, OSError):  # the next look tries again, if it is still there
                continue

    def _patience(self) -> Patience:
        """Return how long namespaces of users may take now."""
        limit_ns = 1 << 62 if self._others_ns is None else self._others_ns
        return Patience(0, limit_ns, lambda: False, self._now_ns)

    def there(self) -> dict[int, S]:
        """Return the sockets of all namespaces."""
        self.look()
        return {number: one for number, one in self._namespaces.items() if one is not None}


class NamespaceSockets(PerNamespace[SockDiag]):
    """The sock_diag sockets of all namespaces. `others_ns` is also for users' in tables()."""

    def __init__(
        self,
        now_ns: Callable[[], int] = time.monotonic_ns,
        share: int = 0,
        others_ns: int | None = None,
        finder: netns.Finder | None = None,
    ) -> None:
        super().__init__(SockDiag, now_ns, share, others_ns, finder)
        self._tables: dict[int, np.ndarray] = {}
        self._read_ns: dict[int, int] = {}

    def tables(self) -> dict[int, np.ndarray]:
        """Return all sockets of each namespace (HOST_SOCKET); ours from /proc/net if need be.

        Ours and root's are read now. Users take turns as long as there is time. What was read of
        the others before stays.
        """
        self.look()
        patience = None
        for number in self._in_turn():
            users = self._owners.get(number, 0) != 0
            if users and (patience := patience or self._patience()).is_over():
                break
            self._read(number)
        self._tables = {
            one: table for one, table in self._tables.items() if one in self._namespaces
        }
        return self._tables.copy()

    @property
    def is_behind(self) -> bool:
        """Whether the last tables() had older contents of some namespace, or none."""
        limit = self._now_ns() - _BEHIND_NS
        readable = [number for number, one in self._namespaces.items() if one is not None]
        return any(self._read_ns.get(number, 0) < limit for number in readable)

    def _in_turn(self) -> list[int]:
        """Return our namespace, root's, then one of each user in turn, the longest unread first."""
        by_uid: dict[int, list[int]] = {}
        for number in sorted(self._namespaces, key=lambda one: self._read_ns.get(one, 0)):
            by_uid.setdefault(self._owners.get(number, 0), []).append(number)
        first = sorted(by_uid.pop(0, []), key=lambda one: one != self.own)
        turns = [(turn, one) for numbers in by_uid.values() for turn, one in enumerate(numbers)]
        return first + [one for _, one in sorted(turns, key=lambda turn: turn[0])]

    def _read(self, number: int) -> None:
        diag, began_ns = self._namespaces[number], self._now_ns()
        if diag is not None:
            try:
                self._tables[number] = diag.dump()
                self._read_ns[number] = began_ns
                return
            except NoPrivilege:
                diag.close()
                self._namespaces[number] = None
            except Error as error:  # what was read before stays
                self._failures.add(error)
                return
        if number == self.own:
            self._tables[number] = procfs.tables()
        else:
            self._tables.pop(number, None)
