# SPDX-License-Identifier: MIT
"""From the kernel's monotonic time to the time of day and to time since boot.

The three clocks in a batch's head were read together when it was sent. So a record's time of day is
right, whenever it is read, even from a saved capture.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

import numpy as np

__all__ = ["Clock"]


@dataclass(frozen=True, slots=True)
class Clock:
    """Offsets in ns of CLOCK_REALTIME and CLOCK_BOOTTIME from CLOCK_MONOTONIC at one moment."""

    real_offset_ns: int
    boot_offset_ns: int

    @classmethod
    def from_head(cls, head: np.void) -> Self:
        """Return the clock of a batch; `head` is one wire.BATCH."""
        mono_ns = int(head["mono_ns"])
        return cls(int(head["real_ns"]) - mono_ns, int(head["boot_ns"]) - mono_ns)

    @classmethod
    def now(cls) -> Self:
        """Return the clock of this moment, for a program that makes batches."""
        mono_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        real_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return cls(real_ns - mono_ns, boot_ns - mono_ns)

    def real_ns(self, mono_ns: int) -> int:
        """Return ns since 1970 for a monotonic time in ns."""
        return int(mono_ns) + self.real_offset_ns

    def boot_ns(self, mono_ns: int) -> int:
        """Return ns since boot, suspend included (/proc/PID/stat counts so), for a monotonic ns."""
        return int(mono_ns) + self.boot_offset_ns

    def real_times(self, mono_ns: np.ndarray) -> np.ndarray:
        """Return datetime64[ns] (UTC) for an array of monotonic times in ns."""
        real = mono_ns.astype(np.int64) + np.int64(self.real_offset_ns)
        return real.view("datetime64[ns]")
