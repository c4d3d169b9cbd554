# SPDX-License-Identifier: MIT
"""Packets that the kernel dropped at sockets, from one look at its tables to the next."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np

__all__ = ["Drops", "added"]


_Key = TypeVar("_Key", bound=Hashable)


def added(before: Mapping[_Key, int], now: Mapping[_Key, int]) -> dict[_Key, int]:
    """Return what has grown from `before` to `now`, and by how much."""
    found = {key: count - before.get(key, 0) for key, count in now.items()}
    return {key: more for key, more in found.items() if more > 0}


class Drops:
    """What was dropped before the first look counts for nobody. Not thread-safe."""

    def __init__(self) -> None:
        self._before: dict[int, int] | None = None

    def take(self, tables: Iterable[np.ndarray]) -> dict[int, int]:
        """Return by cookie what was dropped since the last call; HOST_SOCKETs of namespaces."""
        now: dict[int, int] = {}
        for table in tables:
            some = table[(table["drops"] != 0) & (table["cookie"] != 0)]
            now |= zip(some["cookie"].tolist(), some["drops"].tolist(), strict=True)
        before, self._before = self._before, now
        return {} if before is None else added(before, now)
