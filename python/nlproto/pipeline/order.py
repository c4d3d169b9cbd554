# SPDX-License-Identifier: MIT
"""Puts the records of several CPUs in order of time.

Each CPU sends a batch when it is full, or one flush interval after its first record. So when any
head has the time M, all records older than M minus this interval were sent.
"""

from __future__ import annotations

import numpy as np

from nlproto.records.wire import RECORD, joined, taken

__all__ = ["TimeOrder"]


class TimeOrder:
    """Holds records back for `interval_ns`. Beyond `limit` records the oldest go on."""

    def __init__(self, interval_ns: int, limit: int = 1 << 17) -> None:
        self.interval_ns = interval_ns
        self._limit = limit
        self._waiting: list[np.ndarray] = []
        """Arrays that are not empty, each in order of time."""
        self._count = 0
        self._newest = 0

    def __len__(self) -> int:
        return self._count

    def add(self, records: np.ndarray, head_ns: int) -> None:
        """Take the records of one batch whose head was made at `head_ns` (CLOCK_MONOTONIC)."""
        self._newest = max(self._newest, head_ns)
        if len(records):
            self._waiting.append(_ordered(records))
            self._count += len(records)

    def take(self, now_ns: int | None = None) -> np.ndarray:
        """Return the RECORDs before which nothing can come any more, in order of time.

        `now_ns`: the time until which all was read, if it is known.
        """
        newest = self._newest if now_ns is None else max(self._newest, now_ns)
        if not self._count or newest <= self.interval_ns:
            return _NONE
        found = self._take_until(newest - self.interval_ns)
        if self._count <= self._limit:
            return found
        times = np.concatenate([part["time_ns"] for part in self._waiting])
        excess = self._count - self._limit
        return joined([found, self._take_until(int(np.partition(times, excess - 1)[excess - 1]))])

    def drain(self) -> np.ndarray:
        """Return all RECORDs, in order of time."""
        return self._take_until((1 << 64) - 1)

    def _take_until(self, until_ns: int) -> np.ndarray:
        """What stays is rarely copied, however much it is."""
        old, self._waiting = self._waiting, []
        ripe = []
        for part in old:
            cut = int(np.searchsorted(part["time_ns"], np.uint64(until_ns), "right"))
            if cut:
                ripe.append(part[:cut])
                self._count -= cut
            if cut < len(part):
                self._waiting.append(_alone(part[cut:]))
        return ripe[0] if len(ripe) == 1 else _ordered(joined(ripe))


def _ordered(records: np.ndarray) -> np.ndarray:
    times = np.ascontiguousarray(records["time_ns"])
    if np.any(times[1:] < times[:-1]):
        return taken(records, np.argsort(times, kind="stable"))
    return records


def _alone(part: np.ndarray) -> np.ndarray:
    """Return `part` without much unused memory behind it: a record may wait long."""
    whole = part.base
    return joined([part]) if whole is not None and whole.nbytes > 4 * part.nbytes else part


_NONE = np.empty(0, RECORD)
