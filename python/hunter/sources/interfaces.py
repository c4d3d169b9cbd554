# SPDX-License-Identifier: MIT
"""-i: interfaces by name, followed when they go and come back under another index (USB, VPN)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from hunter.show.columns import Holder
from nlproto import UsageError
from nlproto.filters.filter import Filter
from nlproto.pipeline.pipeline import NamedBatch
from nlproto.tables.processes import Process

if TYPE_CHECKING:
    from hunter.sources.source import Source

__all__ = ["FollowingSource", "filter_text"]


def indexes(names: Sequence[str]) -> dict[str, int]:
    """Return the indexes of those of `names` that are there."""
    there = {name: index for index, name in socket.if_nameindex()}
    return {name: there[name] for name in names if name in there}


def filter_text(names: Sequence[str] | None, all_there: bool = True) -> str:
    """Return the filter that -i NAME ... amounts to now.

    Raises UsageError for a name that is not there, unless that is not asked for.
    """
    if not names or "any" in names:
        return ""
    found = indexes(names)
    missing = [name for name in names if name not in found]
    if missing and all_there:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise UsageError(f"no interface {missing[0]!r} here; there are: {known}")
    # an index means something in its own network namespace only
    here = os.stat("/proc/self/ns/net").st_ino
    some = " or ".join(f"ifindex {index}" for index in found.values()) or "ifindex 4294967295"
    return f"netns {here} and ({some})"


class FollowingSource:
    """A source whose filter follows the interfaces `names`; `again` makes the filter of now."""

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        again: Callable[[], Filter],
        notify: Callable[[str], None],
    ) -> None:
        self._source = source
        self._names = names
        self._again = again
        self._notify = notify
        self._there = self._followed = indexes(names)
        self.description = source.description
        self.snaps = source.snaps

    def __enter__(self) -> Self:
        self._source.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._source.__exit__(*exc)

    def read(self, timeout: float) -> list[NamedBatch] | None:
        return self._look() or self._source.read(timeout)

    def _look(self) -> list[NamedBatch]:
        """Follow what changed; return what the source had still to give."""
        now = indexes(self._names)
        if now == self._there:
            return []
        before, self._there = self._there, now
        rest: list[NamedBatch] = []
        if any(self._followed.get(name) != index for name, index in now.items()):
            # not of one that is gone: its last packets are still on their way
            self._followed = {**self._followed, **now}
            rest = self._source.refilter(self._again())
        for name in self._names:
            if name in before and name not in now:
                self._notify(f"interface {name} is gone; waiting for it to come back")
            elif now.get(name) != before.get(name):
                self._notify(f"interface {name} is back")
        return rest

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        return self._source.refilter(filter)

    def finish(self) -> list[NamedBatch]:
        return self._source.finish()

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        return self._source.get(tgid, start_ns)

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return self._source.holders(cookies)

    def account(self) -> Mapping[str, Any] | None:
        return self._source.account()

    def lost(self) -> int:
        return self._source.lost()
