# SPDX-License-Identifier: MIT
"""Turns: things wait in a queue for each user, and the users take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Rounds"]

T = TypeVar("T", bound=Hashable)


class Rounds(Generic[T]):
    """One user's queue never delays another user's first thing by more than a turn.

    Not thread-safe."""

    def __init__(self) -> None:
        self._queues: OrderedDict[int, OrderedDict[T, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __contains__(self, user: int) -> bool:
        return user in self._queues

    def add(self, user: int, thing: T) -> None:
        """Put a thing at the end of its user's queue, unless it is there."""
        self._queues.setdefault(user, OrderedDict())[thing] = None

    def discard(self, user: int, thing: T) -> None:
        queue = self._queues.get(user)
        if queue is not None:
            queue.pop(thing, None)
            if not queue:
                del self._queues[user]

    def users(self) -> list[int]:
        """Return the users in the order of their turns."""
        return list(self._queues)

    def first(self, user: int) -> T:
        """Return the oldest thing of one of users(). It stays."""
        return next(iter(self._queues[user]))

    def next(self, user: int | None = None) -> T | None:
        """Take the oldest thing of `user`, or of the user whose turn it is; None: nothing waits."""
        if not self._queues:
            return None
        if user is None:
            user = next(iter(self._queues))
        queue = self._queues.pop(user)
        thing, _ = queue.popitem(last=False)
        if queue:
            self._queues[user] = queue
        return thing
