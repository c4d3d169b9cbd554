# SPDX-License-Identifier: MIT
"""Whose turn is it: things wait in a queue for each user, and the users take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Rounds"]

T = TypeVar("T", bound=Hashable)


class Rounds(Generic[T]):
    """Not thread-safe. However much one user has waiting, another's first comes next but one."""

    def __init__(self) -> None:
        self._queues: OrderedDict[int, OrderedDict[T, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, user: int, thing: T) -> None:
        """Put it at the end of its user's queue, unless it is there."""
        self._queues.setdefault(user, OrderedDict())[thing] = None

    def discard(self, user: int, thing: T) -> None:
        queue = self._queues.get(user)
        if queue is not None:
            queue.pop(thing, None)
            if not queue:
                del self._queues[user]

    def users(self) -> list[int]:
        """In the order of their turns."""
        return list(self._queues)

    def first(self, user: int) -> T:
        """The oldest thing of one of users(); it stays."""
        return next(iter(self._queues[user]))

    def next(self, user: int | None = None) -> T | None:
        """The oldest thing of the user whose turn it is, or of `user`; None: nothing waits."""
        if not self._queues:
            return None
        if user is None:
            user = next(iter(self._queues))
        queue = self._queues.pop(user)
        thing, _ = queue.popitem(last=False)
        if queue:
            self._queues[user] = queue
        return thing
