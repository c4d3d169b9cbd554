# SPDX-License-Identifier: MIT
"""What earlier looks showed of sockets' holders, for engine `packet`.

A look comes after the packet. Who held the socket in between may have left it.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PastHolders"]

_CLOSING_NS = 200_000_000  # from a descriptor's end to its socket's, if busy


class PastHolders:
    """Remembers the holders of some `limit` sockets. One thread at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: dict[int, tuple[frozenset[int], int]] = {}
        """The holders at the last look, and when a look found that one had left."""
        self._unheld: dict[int, int] = {}

    def has_been_left(self, inode: int, holders: Iterable[int], now_ns: int, sent_ns: int) -> bool:
        """Learn who holds it now. Return whether a packet may be of one that has left it since."""
        present = frozenset(holders)
        before = self._seen.get(inode)
        if before is None:
            if len(self._seen) > self._limit:
                self._seen.clear()
            before = present, 0
        left_ns = before[1] if before[0] <= present else now_ns
        self._seen[inode] = present, left_ns
        return sent_ns < left_ns

    def only(self, inode: int, pid: int) -> bool:
        """Return whether the last look showed that `pid` alone held it."""
        return self._seen.get(inode, (frozenset(), 0))[0] == {pid}

    def nobody_stays(self, inode: int, now_ns: int) -> bool:
        """Return whether nobody held the socket for a while: a closing one goes soon."""
        if len(self._unheld) > self._limit:
            self._unheld.clear()
        return now_ns - self._unheld.setdefault(inode, now_ns) > _CLOSING_NS
