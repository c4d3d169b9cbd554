# SPDX-License-Identifier: MIT
"""Budgets of time for expensive work, with some saved up for bursts, and when it must end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Budget", "Patience", "UserBudgets"]

_USERS = 4096
"""The most users that are remembered. With more of them only the common budget counts."""


class Budget:
    """Work may take one `share`th of the time. While idle, up to `saved_ns` of it is saved.

    `used_ns`: a clock for what work takes, if not `now_ns` too, as time.thread_time_ns.
    """

    def __init__(
        self,
        share: int,
        saved_ns: int,
        now_ns: Callable[[], int],
        used_ns: Callable[[], int] | None = None,
    ) -> None:
        self._share = share
        self._saved_ns = saved_ns
        self._now_ns = now_ns
        self._used_ns = now_ns if used_ns is None else used_ns
        self._left_ns = saved_ns
        self._at_ns = now_ns()

    def allows(self) -> bool:
        """Return whether work may begin now."""
        now = self._now_ns()
        self._left_ns = min(self._saved_ns, self._left_ns + (now - self._at_ns) // self._share)
        self._at_ns = now
        return self._left_ns > 0

    def charge(self, ns: int) -> None:
        """Charge what has been spent, allowed or not."""
        self._left_ns -= ns

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Charge the time that the block takes, allowed or not."""
        began = self._used_ns()
        try:
            yield
        finally:
            self._left_ns -= self._used_ns() - began


class UserBudgets:
    """A Budget for each user, within one for all users but root. Root may always work.

    So one user cannot take the share of others, nor can many users take everything: a user with a
    user namespace has 65,536 uids.
    """

    def __init__(
        self, share: int, all_share: int, saved_ns: int, now_ns: Callable[[], int]
    ) -> None:
        self._share, self._saved_ns, self._now_ns = share, saved_ns, now_ns
        self._all = Budget(all_share, saved_ns, now_ns)
        self._users: dict[int, Budget] = {}

    def allows(self, uid: int) -> bool:
        """Return whether work for `uid` may begin now."""
        return uid == 0 or (self._user(uid).allows() and self._all.allows())

    @contextmanager
    def spend(self, uid: int) -> Iterator[None]:
        """Charge the time that the block takes to `uid`."""
        if uid == 0:
            yield
            return
        with self._all.spend(), self._user(uid).spend():
            yield

    def charge(self, uid: int, ns: int) -> None:
        """Charge what has been spent."""
        if uid:
            self._all.charge(ns)
            self._user(uid).charge(ns)

    def _user(self, uid: int) -> Budget:
        if uid not in self._users:
            if len(self._users) >= _USERS:
                self._users.clear()
            self._users[uid] = Budget(self._share, self._saved_ns, self._now_ns)
        return self._users[uid]


class Patience:
    """How long one piece of work may go on: `soon_ns` if others wait by then, else `latest_ns`."""

    def __init__(
        self,
        soon_ns: int,
        latest_ns: int,
        others_wait: Callable[[], bool],
        now_ns: Callable[[], int],
    ) -> None:
        self._now_ns = now_ns
        self._others_wait = others_wait
        began_ns = now_ns()
        self._soon_ns, self._latest_ns = began_ns + soon_ns, began_ns + latest_ns
        self._over = False

    def is_over(self) -> bool:
        """Return whether the work must end. Once it must, it stays so."""
        if not self._over and (now := self._now_ns()) > self._soon_ns:
            self._over = now > self._latest_ns or self._others_wait()
        return self._over
