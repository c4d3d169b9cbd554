# SPDX-License-Identifier: MIT
"""The clock by which hours are too old. A jump of the time of day by years deletes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from nlproto.records.elapsed import Moment, read_moment

__all__ = ["RetentionClock"]

_CATCHING_UP = 2
"""It follows the time of day at most so many times as fast as this machine runs."""


class _State(msgspec.Struct):
    moment: Moment
    at_ns: int


class RetentionClock:
    """Kept in the file `path`, for who holds the folder's lock."""

    def __init__(self, path: Path, read: Callable[[], Moment] = read_moment) -> None:
        self._path = path
        self._read = read

    def look(self, empty: bool) -> int:
        """Return its time in ns since 1970, at most the time of day. `empty`: it begins anew."""
        now, before = self._read(), self._before()
        real_ns = at_ns = int(now.real * 1e9)
        if before is not None and not empty:
            passed_ns = int(now.passed_since(before.moment) * 1e9)
            step_ns = real_ns - before.at_ns
            at_ns = before.at_ns + max(-passed_ns, min(step_ns, _CATCHING_UP * passed_ns))
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.write_bytes(msgspec.json.encode(_State(now, at_ns)))
        os.replace(fresh, self._path)
        return min(real_ns, at_ns)

    def _before(self) -> _State | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_State)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
