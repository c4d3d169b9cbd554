# SPDX-License-Identifier: MIT
"""-i: interfaces by name, followed when they come back with another index (USB, VPN)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from hunter.cli.interfaces import indexes
from hunter.show.columns import Holder
from hunter.sources.source import Source
from nlproto.filters.filter import Filter
from nlproto.records.batch import NamedBatch
from nlproto.tables.processes import Process

__all__ = ["FollowingSource"]


class FollowingSource:
    """A source whose filter follows the interfaces `names`. `again` makes the present filter."""

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
        self.first_bytes = source.first_bytes
        self.ends = source.ends

    def __enter__(self) -> Self:
        self._source.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._source.__exit__(*exc)

    def read(self, timeout: float) -> list[NamedBatch] | None:
        return self._look() or self._source.read(timeout)

    def _look(self) -> list[NamedBatch]:
        """Follow changes. Returns what the source still had."""
        now = indexes(self._names)
        if now == self._there:
            return []
        before, self._there = self._there, now
        rest: list[NamedBatch] = []
        if any(self._followed.get(name) != index for name, index in now.items()):
            # wait for those that have gone: their last packets are still under way
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
