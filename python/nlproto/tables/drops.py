# SPDX-License-Identifier: MIT
"""Packets that the kernel dropped at sockets, from one look at its tables to the next."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["Drops"]


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
        if before is None:
            return {}
        found = {cookie: drops - before.get(cookie, 0) for cookie, drops in now.items()}
        return {cookie: more for cookie, more in found.items() if more > 0}
