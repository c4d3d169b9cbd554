# SPDX-License-Identifier: MIT
"""One socket for each network namespace that can be entered, within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from nlproto.errors import Error, NoPrivilege
from nlproto.host import netns, procfs
from nlproto.host.sockdiag import SockDiag
from nlproto.running.budget import Patience
from nlproto.running.closing import Closing
from nlproto.running.left_behind import Beside
from nlproto.running.supervise import Failures

__all__ = ["NamespaceSockets", "PerNamespace"]

_LOOK_NS = 2_000_000_000
_REST_NS = 250_000_000  # the same if the last look had no time for all
_BEHIND_NS = 5_000_000_000
_LEAVING_S = 1.0  # the longest wait for a look at the end
_COLD_S = 0.3  # the longest wait for a look after so long without one


class _Closable(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=_Closable)


@dataclass(slots=True)
class _Change(Generic[S]):
    """What a look found that began at `began_ns`."""

    began_ns: int
    opened: dict[int, S | None] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


class PerNamespace(Closing, Generic[S]):
    """Looks for new and ended namespaces at most every 2 s. A context manager, for one thread.

    There are at most netns.room() namespaces, chosen as engine packet chooses. `make` makes the
    socket, inside the namespace; it raises NoPrivilege if that is refused. Looks take at most one
    `share`th of the time (0: no limit), so with many processes they are rarer. A look enters all
    new namespaces of root, and users' as far as there is time. The next one enters others.

    A socket keeps its namespace alive. So a look closes the socket of a namespace that no process
    and no name holds any more.

    `wait_s`: a look runs in another thread, and the caller waits for it so long at most. None: the
    caller looks itself.
    """

    def __init__(
        self,
        make: Callable[[], S],
        now_ns: Callable[[], int] = time.monotonic_ns,
        share: int = 0,
        others_ns: int | None = None,
        finder: netns.Finder | None = None,
        wait_s: float | None = None,
    ) -> None:
        self._finder = netns.Finder() if finder is None else finder
        self._owns_finder = finder is None
        self._share = share
        self._others_ns = others_ns
        self._make = make
        self._now_ns = now_ns
        self._look_ns = now_ns()
        """When the next look is due."""
        self._looked_ns = -(1 << 62)
        """When the last one began that is over."""
        self.own = netns.own()
        self._failures = Failures("sock_diag")
        self._namespaces: dict[int, S | None] = {}
        self._owners: dict[int, int] = {}
        """Who owns each namespace: a uid, or UNKNOWN_OWNER. 0: root, or it is ours."""
        self._wait_s = wait_s
        self._beside = Beside("namespace look", self._look_beside)
        self._found: _Change[S] | None = None
        """What a look in the other thread found, until the caller has taken it."""

    def close(self) -> None:
        """Close all sockets."""
        self._beside.join(_LEAVING_S)
        self._take_found()
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

    def look(self, patient: bool = False) -> None:
        """Find new namespaces and those that have ended.

        `patient`: if the last look was more than 5 s ago, wait longer for the other thread.
        """
        if self._wait_s is None:
            if self._now_ns() >= self._look_ns:
                self._take(self._find())
            return
        if self.own not in self._namespaces:
            self._namespaces[self.own] = self._made()
        if not self._beside.runs:
            self._take_found()
            cold = patient and self._looked_ns < self._now_ns() - _BEHIND_NS
            wait_s = max(_COLD_S, self._wait_s) if cold else self._wait_s
            if self._now_ns() >= self._look_ns and self._beside.run(wait_s):
                self._take_found()

    def _look_beside(self) -> None:
        try:
            self._found = self._find()
        except Exception as error:  # the next look tries again
            self._failures.add(error)

    def _take_found(self) -> None:
        found, self._found = self._found, None
        if found is not None:
            self._take(found)

    def _take(self, change: _Change[S]) -> None:
        self._looked_ns = change.began_ns
        for number in change.gone:
            diag = self._namespaces.pop(number, None)
            if diag is not None:
                diag.close()
        self._namespaces |= change.opened

    def _made(self) -> S | None:
        try:
            return self._make()
        except NoPrivilege:
            return None

    def _find(self) -> _Change[S]:
        """Open sockets of new namespaces. It leaves those that are open alone."""
        now = self._now_ns()
        change = _Change[S](now)
        try:
            there = self._finder.paths()
        except OSError:  # no descriptor is left for it
            there = None
        took = self._now_ns() - now
        self._look_ns = now + max(_LOOK_NS, self._share * took)
        if there is None:
            return change
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
        change.gone = set(self._namespaces) - set(there) - {self.own}
        if self.own not in self._namespaces:
            change.opened[self.own] = self._made()
        patience = None
        for number in sorted(there.keys() & new.keys(), key=lambda one: self._owners[one] != 0):
            if self._owners[number] and (patience := patience or self._patience()).is_over():
                self._look_ns = min(self._look_ns, now + max(_REST_NS, self._share * took))
                break
            try:
                change.opened[number] = netns.run_inside(new[number], number, self._make)
            except NoPrivilege:
                change.opened[number] = None
            except (Error, OSError):  # the next look tries again, if it is still there
                continue
        return change

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
        wait_s: float | None = None,
    ) -> None:
        super().__init__(SockDiag, now_ns, share, others_ns, finder, wait_s)
        self._tables: dict[int, np.ndarray] = {}
        self._read_ns: dict[int, int] = {}

    def tables(self) -> dict[int, np.ndarray]:
        """Return all sockets of each namespace (HOST_SOCKET); ours from /proc/net if need be.

        Ours and root's are read now. Users take turns as long as there is time. What was read of
        the others before stays.
        """
        self.look(patient=True)
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

    def behind(self) -> set[int] | None:
        """Return whose namespaces had older contents in the last tables(), or none (0: root).

        None: it is not known which namespaces there are now.
        """
        limit = self._now_ns() - _BEHIND_NS
        if self._looked_ns < limit:
            return None
        readable = [number for number, one in self._namespaces.items() if one is not None]
        late = [number for number in readable if self._read_ns.get(number, 0) < limit]
        return {self._owners.get(number, 0) for number in late}

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
