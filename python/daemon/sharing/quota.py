# SPDX-License-Identifier: MIT
"""How many places a user may take, so that nobody shuts others out."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Quota"]

T = TypeVar("T", bound=Hashable)

_RESERVED = 4
"""One in so many places is only for users who see everything."""
_SHARE = 8
"""A user with limited rights may have one in so many of the places."""


class Quota(Generic[T]):
    """Keeps who has which of `total` places. A quarter is kept for users who see everything.

    All others share the rest. Each user (a uid with its subordinate uids) may take an eighth of
    all. A taker has a weight: one place, or as many as it needs. For one thread.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: dict[T, tuple[int | None, int]] = {}
        self._by_user: dict[int | None, int] = {}
        self._sum = 0

    @property
    def taken(self) -> int:
        return self._sum

    @property
    def for_others(self) -> int:
        """Return what all users with limited rights may take together."""
        return self.total - max(1, self.total // _RESERVED)

    @property
    def for_one(self) -> int:
        return max(1, self.total // _SHARE)

    def has_room(self, user: int | None, weight: int = 1) -> bool:
        """`user`: None for one who sees everything."""
        if user is None:
            return self._sum + weight <= self.total
        mine = self._by_user.get(user, 0) + weight
        others = self._sum - self._by_user.get(None, 0) + weight
        fits = mine <= self.for_one and others <= self.for_others
        return fits and self._sum + weight <= self.total

    def take(self, taker: T, user: int | None, weight: int = 1) -> None:
        self._taken[taker] = user, weight
        self._by_user[user] = self._by_user.get(user, 0) + weight
        self._sum += weight

    def give_back(self, taker: T) -> None:
        """Give its places back. Does nothing if it has none."""
        found = self._taken.pop(taker, None)
        if found is None:
            return
        user, weight = found
        self._sum -= weight
        # a taker without weight (a filter without tests) may be the last one
        left = self._by_user.get(user, 0) - weight
        if left:
            self._by_user[user] = left
        else:
            self._by_user.pop(user, None)
