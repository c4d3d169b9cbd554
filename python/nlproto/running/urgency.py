# SPDX-License-Identifier: MIT
"""Lets a thread go first for as long as it has little to do.

Who has a socket can be asked only while the socket is open: some milliseconds, for which a busy
machine lets a thread wait. One that uses much of a processor goes back into the queue, where a
nice value lets it go before the other threads of its program.

The real-time class, since Linux weighs a nice value only within a session (autogroup) or cgroup.
Where that is not allowed, a nice value.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable

__all__ = ["Urgency"]

_NICE = -10
_PRIORITY = 1  # the lowest of the real-time class
_CLASS = os.SCHED_RR | os.SCHED_RESET_ON_FORK  # what this thread starts is not urgent
_LOOK_NS = 200_000_000  # between two looks at how much it used
_SHARE = 2  # half of a processor's time is too much


class Urgency:
    """For one thread at a time. Without the right (CAP_SYS_NICE, or LimitRTPRIO= or LimitNICE=) it
    does nothing, nor for a thread that somebody gave a class of its own.
    """

    def __init__(
        self,
        now_ns: Callable[[], int] = time.monotonic_ns,
        used_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._now_ns = now_ns
        self._used_ns = used_ns
        self._thread = 0
        self._own_nice = 0
        self._ordinary = True
        self._looked_ns = self._seen_ns = 0
        self._set: bool | None = None
        """Whether it is calm, as was said to the kernel; None: nothing was."""

    def look(self) -> None:
        """Go first, or a little less so; cheap, to be called often by the thread itself."""
        now, thread = self._now_ns(), threading.get_native_id()
        if thread != self._thread:
            self.rest()
            self._thread, self._own_nice = thread, os.getpriority(os.PRIO_PROCESS, thread)
            policy = os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK
            self._ordinary = policy == os.SCHED_OTHER
            self._looked_ns, self._seen_ns = now, self._used_ns()
            self._go(calm=True)
        elif now - self._looked_ns >= _LOOK_NS:
            used = self._used_ns()
            calm = (used - self._seen_ns) * _SHARE < now - self._looked_ns
            self._looked_ns, self._seen_ns = now, used
            self._go(calm)

    def rest(self) -> None:
        """Give back what look() took; also from another thread."""
        if self._set is not None:
            self._set = None
            with contextlib.suppress(OSError):  # it has ended
                self._in_the_queue(self._own_nice)

    def _go(self, calm: bool) -> None:
        if not self._ordinary or calm == self._set:
            return
        self._set = calm
        with contextlib.suppress(OSError):  # it may not, and goes on as it is
            if not calm:
                self._in_the_queue(min(_NICE, self._own_nice))
                return
            try:
                os.sched_setscheduler(self._thread, _CLASS, os.sched_param(_PRIORITY))
            except OSError:
                self._in_the_queue(min(_NICE, self._own_nice))

    def _in_the_queue(self, nice: int) -> None:
        if os.sched_getscheduler(self._thread) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR:
            # to take the flag back would need a right
            policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(self._thread, policy, os.sched_param(0))
        if os.getpriority(os.PRIO_PROCESS, self._thread) != nice:
            os.setpriority(os.PRIO_PROCESS, self._thread, nice)
