# SPDX-License-Identifier: MIT
"""TCP listeners of one network namespace: which process can have accepted a connection.

A closed connection has no socket whose owner could be found. If its listener was there when it
began, the listener's owner accepted it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nlproto.host.holders import Holders
from nlproto.host.procfs import TICK_NS, Owner
from nlproto.host.sockdiag import TcpState
from nlproto.host.socket_lookup import SocketLookup, Tuple, tuple_of_socket
from nlproto.records.clock import Clock

__all__ = ["PastListener", "Listeners"]

_MOMENT_NS = 20_000_000  # within this time hardly any listener takes another's place
_FRESH_NS = 20_000_000  # how long the holders of a listener stay valid
_LIMIT = 1024  # the most ends, local addresses, and listeners

_Local = tuple[int, bytes, int]


@dataclass(frozen=True, slots=True)
class PastListener:
    """Which processes listened at an end."""

    inode: int
    owner: Owner
    shared: bool
    """Whether several processes can accept: they hold it, or listen on the same port."""
    sure: bool
    """Whether it was seen before the connection began, or a moment after."""


@dataclass(slots=True)
class _End:
    """The sockets that listen at one end (several: SO_REUSEPORT)."""

    inodes: frozenset[int]
    since_ns: int
    """When they replaced others; 0: no others are known."""
    first_ns: int
    asked_ns: int
    owners: tuple[Owner, ...] = ()
    """All processes that hold one of them, the youngest first."""


class Listeners:
    """Remembers which listeners were seen where and when. One thread at a time."""

    def __init__(self, sockets: SocketLookup, holders: Holders, now_ns: Callable[[], int]) -> None:
        self._sockets = sockets
        self._holders = holders
        self._now_ns = now_ns
        self._ends: dict[_Local, _End] = {}
        self._by_local: dict[_Local, _End] = {}
        self._acceptors: dict[int, int] = {}

    def of(self, one: Tuple, began_ns: int, row: np.void | None = None) -> PastListener | None:
        """Return who can have accepted `one`, which began at `began_ns` (0: not known).

        None if nobody listens, or if all listeners came later. `row`: the listening socket
        (HOST_SOCKET), if the caller has found it.
        """
        if row is None:
            row = self._sockets.listener(one)
        if row is None or not row["inode"] or int(row["state"]) != TcpState.LISTEN:
            return None
        end = self._end(row)
        if len(self._by_local) >= _LIMIT:  # 127.0.0.0/8 alone has 16 million
            self._by_local.clear()
        self._by_local[one.family, one.local, one.lport] = end
        if began_ns < end.since_ns:
            return None
        there = [owner for owner in end.owners if _was_there(owner, began_ns)]
        if not there:
            return None
        inode = int(row["inode"])
        acceptor = self._acceptors.get(inode)
        chosen = next((o for o in there if o.identity.tgid == acceptor), there[0])
        sure = not began_ns or end.first_ns - began_ns < _MOMENT_NS
        return PastListener(inode, chosen, len(end.owners) > 1, sure)

    def likely(self, one: Tuple) -> tuple[int, ...]:
        """Return the processes that listened at this end at the last look."""
        end = self._by_local.get((one.family, one.local, one.lport))
        return tuple(owner.identity.tgid for owner in end.owners) if end is not None else ()

    def accepted(self, listener: PastListener, owner: Owner) -> None:
        """Learn who has a connection of `listener`: the likely one of several acceptors."""
        if listener.shared:
            if len(self._acceptors) >= _LIMIT:
                self._acceptors.clear()
            self._acceptors[listener.inode] = owner.identity.tgid

    def _end(self, row: np.void) -> _End:
        now = self._now_ns()
        where = tuple_of_socket(row)
        key = (where.family, where.local, where.lport)
        end = self._ends.get(key)
        known = end is not None and int(row["inode"]) in end.inodes
        if end is not None and known and now - end.asked_ns < _FRESH_NS:
            return end
        rivals = self._sockets.rivals(row, fresh=not known)
        inodes = frozenset([int(row["inode"]), *rivals["inode"].tolist()]) - {0}
        since, first = 0, now
        if end is not None and inodes & end.inodes:
            since, first = end.since_ns, end.first_ns
        elif end is not None:
            since = now
        if len(self._ends) >= _LIMIT:
            self._ends.clear()
        uid = int(row["uid"])  # rivals have the same user, or the kernel would refuse SO_REUSEPORT
        found = {owner for inode in inodes for owner in self._holders.find(inode, uid)}
        owners = sorted(found, key=lambda o: (o.identity.start_ticks, o.identity.tgid))
        self._ends[key] = end = _End(inodes, since, first, now, tuple(reversed(owners)))
        return end


def _was_there(owner: Owner, began_ns: int) -> bool:
    """Return whether the process surely ran then. Its start is in ticks, rounded down."""
    return not began_ns or owner.identity.start_ns + TICK_NS <= Clock.now().boot_ns(began_ns)
