# SPDX-License-Identifier: MIT
"""The clock by which the history ages. Nobody can set it.

The time of day may jump by years and back, even while no daemon runs. So age is time that this
machine has run: the time that CLOCK_BOOTTIME, /proc/uptime and the time of day agree has passed
since the last look. Time with the machine off does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Elapsed", "Moment", "read_moment"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The clocks at one moment, in seconds."""

    boot_id: str
    boot: float
    """CLOCK_BOOTTIME."""
    uptime: float
    """The same from /proc/uptime; in a container perhaps the container's."""
    real: float
    """Since 1970."""

    def passed_since(self, earlier: Moment) -> float:
        """Return seconds that have surely passed; `earlier` may be from another boot."""
        steps = [self.boot, self.uptime, self.real - earlier.real]
        if self.boot_id == earlier.boot_id:
            steps[:2] = self.boot - earlier.boot, self.uptime - earlier.uptime
        return max(0.0, min(steps))

    def gap_since(self, earlier: Moment) -> float:
        """Return seconds from `earlier` to this moment, right wherever the clock was set.

        After a boot only the time of day tells how long the machine was off.
        """
        if self.boot_id == earlier.boot_id:
            return max(0.0, self.boot - earlier.boot)
        return max(self.boot, self.real - earlier.real)


def read_moment() -> Moment:
    """Return the clocks now."""
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    uptime = _first_word("/proc/uptime")
    boot_id = _first_word("/proc/sys/kernel/random/boot_id")
    return Moment(boot_id, boot, float(uptime) if uptime else boot, time.time())


def _first_word(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(100).split()[0]
    except (OSError, IndexError):
        return ""


class Elapsed:
    """Return seconds lived: `before`, and the time from `moment` to `until` (None: now)."""

    def __init__(
        self,
        before: float = 0.0,
        moment: Moment | None = None,
        read: Callable[[], Moment] = read_moment,
    ) -> None:
        self._read = read
        self.seconds = before
        self.moment = read() if moment is None else moment

    def look(self) -> float:
        """Return seconds lived until now."""
        now = self._read()
        self.seconds += now.passed_since(self.moment)
        self.moment = now
        return self.seconds
