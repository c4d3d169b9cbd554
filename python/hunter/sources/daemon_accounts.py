# SPDX-License-Identifier: MIT
"""The account of one capture over several daemons. Packets while there was none are lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlproto.records.wire import are_named

__all__ = ["DaemonAccounts"]

_Account = Mapping[str, Any]


class DaemonAccounts:
    """Adds up the daemons' accounts. Each is one span, from begin() to end() or cut().

    Users who may not see accounts have None; then total() is None.
    """

    def __init__(self) -> None:
        self._sum: dict[str, Any] = {}
        self._start: _Account | None = None
        self._mark: _Account | None = None
        self._since = self._named_since = 0
        self._left: tuple[Mapping[str, int], int] | None = None
        """Where the last span was cut, and how many packets arrived after that place."""

    def begin(self, account: _Account | None) -> int | None:
        """A daemon counts from `account` on. Count what nobody received before, if known."""
        self._start = self._mark = account
        self._since = self._named_since = 0
        left, self._left = self._left, None
        if account is None or left is None:
            return None
        (there, arrived), here = left, account["position"]
        if here["instance"] != there["instance"]:
            return None
        missed: int = max(0, here["packets"] - there["packets"] - arrived)
        self._add(_grown(missed) | {"lost": {"gap": missed}})
        return missed

    def mark(self, account: _Account) -> None:
        """Everything in `account` came earlier, everything else comes later."""
        self._mark = account
        self._since = self._named_since = 0

    def received(self, hows: np.ndarray) -> None:
        """Count records that came. `hows` is their field `how`."""
        self._since += len(hows)
        self._named_since += int(np.count_nonzero(are_named(hows)))

    def cut(self) -> None:
        """The daemon died: its last mark, and what came after it, are all that is known."""
        if self._start is None or self._mark is None:
            return
        self._add(_difference(self._mark, self._start))
        self._add(_grown(self._since) | {"delivered": self._since, "named": self._named_since})
        self._left = self._mark["position"], self._since
        self._start = None

    def end(self, account: _Account | None) -> None:
        """The daemon's last account."""
        if self._start is not None and account is not None:
            self._add(_difference(account, self._start))
        self._start = None

    def total(self) -> dict[str, Any] | None:
        """Return the sum; a span that goes on counts up to its last mark."""
        if self._start is None or self._mark is None:
            return self._sum or None
        return _sum(self._sum, _difference(self._mark, self._start))

    def _add(self, account: _Account) -> None:
        self._sum = _sum(self._sum, account)


def _grown(packets: int) -> dict[str, Any]:
    return {"packets": packets, "recorded": packets, "records": packets}


def _difference(end: _Account, start: _Account) -> dict[str, Any]:
    """Every count of `end` less what it was at `start`."""
    return _combined(end, start, -1)


def _sum(one: _Account, other: _Account) -> dict[str, Any]:
    return _combined(one, other, 1)


def _combined(one: _Account, other: _Account, sign: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in (*one, *(name for name in other if name not in one)):
        mine, others = one.get(name), other.get(name)
        if name == "position":
            continue
        if isinstance(mine, Mapping) or isinstance(others, Mapping):
            result[name] = _combined(mine or {}, others or {}, sign)
        elif isinstance(mine, bool) or isinstance(others, bool):
            result[name] = mine is not False and others is not False if sign > 0 else mine
        else:
            result[name] = (mine or 0) + sign * (others or 0)
    return result
