# SPDX-License-Identifier: MIT
"""Lets a thread go first for as long as it has little to do.

Who has a socket can be asked only while the socket is open: some milliseconds, for which a busy
machine lets a thread wait. One that uses much of a processor goes back into the queue.
"""

import os
import threading
import time
from collections.abc import Callable

__all__ = ["Urgency"]

_NICE = -10
_LOOK_NS = 200_000_000  # between two looks at how much it used
_SHARE = 2  # half of a processor's time is too much


class Urgency:
    """For one thread at a time. Without the right (CAP_SYS_NICE, LimitNICE=) it does nothing."""

    def __init__(
        self,
        now_ns: Callable[[], int] = time.monotonic_ns,
        used_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._now_ns = now_ns
        self._used_ns = used_ns
        self._thread = 0
        self._calm_nice = 0
        self._looked_ns = self._seen_ns = 0
        self.raised = False

    def look(self) -> None:
        """Go first, or no more; cheap, to be called often by the thread itself."""
        now, thread = self._now_ns(), threading.get_native_id()
        if thread != self._thread:
            self.rest()
            self._thread, self._calm_nice = thread, os.getpriority(os.PRIO_PROCESS, thread)
            self._looked_ns, self._seen_ns = now, self._used_ns()
            self._set(self._calm_nice > _NICE)
        elif now - self._looked_ns >= _LOOK_NS:
            used = self._used_ns()
            calm = (used - self._seen_ns) * _SHARE < now - self._looked_ns
            self._looked_ns, self._seen_ns = now, used
            self._set(calm and self._calm_nice > _NICE)

    def rest(self) -> None:
        """Give back what look() took; also from another thread."""
        self._set(False)

    def _set(self, raised: bool) -> None:
        if raised == self.raised:
            return
        try:
            nice = _NICE if raised else self._calm_nice
            os.setpriority(os.PRIO_PROCESS, self._thread, nice)
        except OSError:  # it may not, or the thread has ended
            self.raised = False
            return
        self.raised = raised
