# SPDX-License-Identifier: MIT
"""Gives a thread precedence as long as it has little to do.

The holder of a socket can be found only while the socket is open. That may be some milliseconds,
and on a busy machine a thread waits longer. A thread that uses much of a processor loses
precedence.

It uses the real-time class, because Linux weighs a nice value only within a session (autogroup) or
cgroup. Where that is not allowed, it uses a nice value.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Urgency"]

_NICE = -10
_PRIORITY = 1  # the lowest of the real-time class
_CLASS = os.SCHED_RR | os.SCHED_RESET_ON_FORK  # threads started from here are not urgent
_LOOK_NS = 200_000_000  # between two looks at the time it used
_SHARE = 2  # half of a processor's time is too much


class Urgency:
    """Gives one thread at a time precedence.

    It does nothing without the right (CAP_SYS_NICE, or LimitRTPRIO= or LimitNICE=), or for a thread
    that somebody else gave a class.
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
        """Give the thread precedence, or take it. Cheap; the thread itself calls it often."""
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
        """Undo look(). Also from another thread."""
        self._set(False)

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """For long work: inside, the thread waits like any other. Any thread may call it."""
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
            # clearing the flag would need a right
            policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(self._thread, policy, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, self._thread, self._calm_nice)
