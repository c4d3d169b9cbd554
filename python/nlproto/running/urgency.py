# SPDX-License-Identifier: MIT
"""Lets a thread go first for as long as it has little to do.

Who has a socket can be asked only while the socket is open: some milliseconds, for which a busy
machine lets a thread wait. One that uses much of a processor goes back into the queue.

The real-time class, since Linux weighs a nice value only within a session (autogroup) or cgroup.
Where that is not allowed, a nice value.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

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
        self._calm_nice = 0
        self._ordinary = True
        self._looked_ns = self._seen_ns = 0
        self.raised = False

    def look(self) -> None:
        """Go first, or no more; cheap, to be called often by the thread itself."""
        now, thread = self._now_ns(), threading.get_native_id()
        if thread != self._thread:
            self.rest()
            self._thread, self._calm_nice = thread, os.getpriority(os.PRIO_PROCESS, thread)
            policy = os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK
            self._ordinary = policy == os.SCHED_OTHER
            self._looked_ns, self._seen_ns = now, self._used_ns()
            self._set(self._ordinary)
        elif now - self._looked_ns >= _LOOK_NS:
            used = self._used_ns()
            calm = (used - self._seen_ns) * _SHARE < now - self._looked_ns
            self._looked_ns, self._seen_ns = now, used
            self._set(calm and self._ordinary)

    def rest(self) -> None:
        """Give back what look() took; also from another thread."""
        self._set(False)

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """For long work inside: it waits for its turn as everybody's does. Any thread may call."""
        if threading.get_native_id() != self._thread:
            yield
            return
        raised = self.raised
        self._set(False)
        try:
            yield
        finally:
            self._set(raised)

    def _set(self, raised: bool) -> None:
        if raised == self.raised:
            return
        try:
            if raised:
                self._raise()
            else:
                self._lower()
        except OSError:  # it may not, or the thread has ended
            self.raised = False
            return
        self.raised = raised

    def _raise(self) -> None:
        try:
            os.sched_setscheduler(self._thread, _CLASS, os.sched_param(_PRIORITY))
        except OSError:
            if self._calm_nice > _NICE:
                os.setpriority(os.PRIO_PROCESS, self._thread, _NICE)

    def _lower(self) -> None:
        if os.sched_getscheduler(self._thread) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR:
            # to take the flag back would need a right
            policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(self._thread, policy, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, self._thread, self._calm_nice)
