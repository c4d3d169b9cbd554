# SPDX-License-Identifier: MIT
"""How much of a CPU the work for users without rights may take.

Python runs one thread at a time: what such users cause would else take the turns of the threads
that record.
"""

from __future__ import annotations

import threading
import time

__all__ = ["FILTERS", "QUESTIONS", "REQUESTS", "Allowance", "Meter"]

REQUESTS, FILTERS, QUESTIONS = 0.1, 0.1, 0.2
"""Of one CPU, in the long run: the event loop's work, streams, and what Questions does."""
_SAVED = 0.3
"""s of CPU time that can be saved up: a question now and then is answered at full speed."""


class Allowance:
    """CPU time of any number of threads, together."""

    def __init__(self, share: float, saved: float = _SAVED) -> None:
        self._share = share
        self._most = saved
        self._saved = saved
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def spend(self, seconds: float) -> float:
        """Take `seconds` of CPU time that were used; how many s to do nothing now."""
        with self._lock:
            now = time.monotonic()
            self._saved = min(self._most, self._saved + (now - self._looked) * self._share)
            self._looked = now
            self._saved -= seconds
            return max(0.0, -self._saved / self._share)


class Meter:
    """Spends what one thread uses, in small parts; for that thread. None: nothing is spent."""

    def __init__(self, allowance: Allowance | None) -> None:
        self._allowance = allowance
        self._before = time.thread_time()

    def begin(self) -> None:
        self._before = time.thread_time()

    def pause(self) -> float:
        """How many s to do nothing, after what was done since begin() or the last pause()."""
        if self._allowance is None:
            return 0.0
        now = time.thread_time()
        used, self._before = now - self._before, now
        return self._allowance.spend(used)
