# SPDX-License-Identifier: MIT
"""Known batches, by (host, boot, sequence). The sequences of a host are consecutive."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["KnownBatches"]

_Number = Annotated[int, Meta(ge=0)]
_Told = dict[str, dict[str, list[tuple[_Number, _Number]]]]
_decoder = msgspec.json.Decoder(_Told)


class KnownBatches:
    """A set of keys, stored as ranges: its size is the number of gaps."""

    def __init__(self, keys: Iterable[tuple[str, str, int]] = ()) -> None:
        self._ranges: dict[tuple[str, str], list[list[int]]] = {}
        """[first, last] of each run, in order."""
        for host, boot, sequence in keys:
            self.add(host, boot, sequence)

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        host, boot, sequence = key
        runs = self._ranges.get((host, boot), [])
        at = bisect_right(runs, [sequence, 1 << 64])
        return at > 0 and sequence <= runs[at - 1][1]

    def add(self, host: str, boot: str, sequence: int) -> None:
        """Add one."""
        self._add(host, boot, sequence, sequence)

    def update(self, other: KnownBatches) -> None:
        """Add all of `other`."""
        for (host, boot), runs in other._ranges.items():
            for first, last in runs:
                self._add(host, boot, first, last)

    def hosts(self) -> set[str]:
        """Return the hosts of the keys."""
        return {host for host, _ in self._ranges}

    def isdisjoint(self, other: KnownBatches) -> bool:
        """Return whether no key is in both."""
        for name, runs in self._ranges.items():
            others = other._ranges.get(name, [])
            for first, last in runs:
                at = bisect_right(others, [last, 1 << 64])
                if at and others[at - 1][1] >= first:
                    return False
        return True

    def _add(self, host: str, boot: str, first: int, last: int) -> None:
        runs = self._ranges.setdefault((host, boot), [])
        at = bisect_right(runs, [first, 1 << 64])
        if at and runs[at - 1][1] + 1 >= first:
            at -= 1
            runs[at][1] = max(runs[at][1], last)
        else:
            runs.insert(at, [first, last])
        following = at + 1
        while following < len(runs) and runs[following][0] <= runs[at][1] + 1:
            runs[at][1] = max(runs[at][1], runs.pop(following)[1])

    def to_bytes(self) -> bytes:
        """Return bytes for from_bytes()."""
        told: dict[str, dict[str, list[list[int]]]] = {}
        for (host, boot), runs in self._ranges.items():
            told.setdefault(host, {})[boot] = runs
        return msgspec.json.encode(told)

    @classmethod
    def from_bytes(cls, data: bytes) -> KnownBatches:
        """Return the keys that to_bytes() wrote. Raises ValueError."""
        made = cls()
        for host, boots in _decoder.decode(data).items():
            for boot, runs in boots.items():
                for first, last in runs:
                    made._add(host, boot, first, last)
        return made
