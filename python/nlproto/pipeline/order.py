# SPDX-License-Identifier: MIT
"""Puts the records of several CPUs in order of time.

Each CPU sends a batch when it is full or one flush interval after its first record. So once any
head carries the time M, records older than M minus that interval have all been sent.
"""

from __future__ import annotations

import numpy as np

from nlproto.records import wire

__all__ = ["TimeOrder"]


class TimeOrder:
    """Holds records back for `interval_ns`; at most `limit` records, then the oldest go on."""

    def __init__(self, interval_ns: int, limit: int = 1 << 17) -> None:
        self.interval_ns = interval_ns
        self._limit = limit
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._newest = 0

    def __len__(self) -> int:
        return self._count

    def add(self, records: np.ndarray, head_ns: int) -> None:
        """Take the records of one batch whose head was made at `head_ns` (CLOCK_MONOTONIC)."""
        self._newest = max(self._newest, head_ns)
        if len(records):
            self._waiting.append(records)
            self._count += len(records)

    def take(self, now_ns: int | None = None) -> np.ndarray:
        """Records that no older one can follow any more, in order of time; perhaps none.

        `now_ns`: the time until which the source was read empty, when that is known.
        """
        if not self._count:
            return _NONE
        newest = self._newest if now_ns is None else max(self._newest, now_ns)
        if newest <= self.interval_ns:
            return _NONE
        return self._take_until(np.uint64(newest - self.interval_ns))

    def drain(self) -> np.ndarray:
        """Everything, in order of time."""
        return self._take_until(None)

    def _take_until(self, until: np.uint64 | None) -> np.ndarray:
        if not self._waiting:
            return _NONE
        records = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        times = np.ascontiguousarray(records["time_ns"])
        if np.any(times[1:] < times[:-1]):
            order = np.argsort(times, kind="stable")
            records, times = records[order], times[order]
        cut = len(records) if until is None else int(np.searchsorted(times, until, "right"))
        cut = max(cut, len(records) - self._limit)
        rest = records[cut:]
        self._waiting = [rest] if len(rest) else []
        self._count = len(rest)
        return records[:cut]


_NONE = np.empty(0, wire.RECORD)
