# SPDX-License-Identifier: MIT
"""The part of a CPU that work for users with limited rights may take.

Python runs one thread at a time. Without a limit such work would delay the threads that record.
"""

from __future__ import annotations

import threading
import time

__all__ = ["FILTERS", "QUESTIONS", "REQUESTS", "Allowance", "Meter"]

REQUESTS, FILTERS, QUESTIONS = 0.1, 0.1, 0.2
"""Of one CPU, in the long run: for the event loop, streams, and Questions."""
_SAVED = 0.3
"""s of CPU time that can be saved up, so that a rare question is answered at full speed."""


class Allowance:
    """CPU time of any number of threads together."""

    def __init__(self, share: float, saved: float = _SAVED) -> None:
        self._share = share
        self._most = saved
        self._saved = saved
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def spend(self, seconds: float) -> float:
        """Charge `seconds` of CPU time. Returns how many s to wait now."""
        with self._lock:
            now = time.monotonic()
            self._saved = min(self._most, self._saved + (now - self._looked) * self._share)
            self._looked = now
            self._saved -= seconds
            return max(0.0, -self._saved / self._share)


class Meter:
    """Charges one thread's use in small parts. For that thread. None: nothing is charged."""

    def __init__(self, allowance: Allowance | None) -> None:
        self._allowance = allowance
        self._before = time.thread_time()

    def begin(self) -> None:
        self._before = time.thread_time()

    def pause(self) -> float:
        """Return how many s to wait after the work since begin() or the last pause()."""
        if self._allowance is None:
            return 0.0
        now = time.thread_time()
        used, self._before = now - self._before, now
        return self._allowance.spend(used)
