# SPDX-License-Identifier: MIT
"""Gives a thread precedence as long as it has little to do.

The holder of a socket can be found only while the socket is open. That may be some milliseconds,
and on a busy machine a thread waits longer. A thread that uses much of a processor loses the class,
and keeps a nice value: with it the thread goes before others of its program.

It uses the real-time class, because Linux weighs a nice value only within a session (autogroup) or
cgroup. Where that is not allowed, it uses a nice value.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

__all__ = ["Urgency"]

_NICE = -10
_PRIORITY = 1  # the lowest of the real-time class
_CLASS = os.SCHED_RR | os.SCHED_RESET_ON_FORK  # threads started from here are not urgent
_LOOK_NS = 200_000_000  # between two looks at the time it used
_SHARE = 2 if len(os.sched_getaffinity(0)) > 1 else 8
"""Half of a processor is too much; an eighth of the only one, which several threads ask for."""


class Urgency:
    """Gives one thread at a time precedence.

    It does nothing without the right (CAP_SYS_NICE, or LimitRTPRIO= or LimitNICE=). Nor for a
    thread that somebody else gave a class. Without `real_time` it is a nice value alone: for
    threads that use a processor for long, now and then.
    """

    def __init__(
        self,
        now_ns: Callable[[], int] = time.monotonic_ns,
        used_ns: Callable[[], int] = time.thread_time_ns,
        real_time: bool = True,
    ) -> None:
        self._real_time = real_time
        self._now_ns = now_ns
        self._used_ns = used_ns
        self._thread = 0
        self._own_nice = 0
        self._ordinary = True
        self._looked_ns = self._seen_ns = 0
        self._set: bool | None = None
        """Whether the thread was calm when the kernel was last told. None: it was not told."""

    def look(self) -> None:
        """Give the thread precedence, or take it. Cheap; the thread itself calls it often."""
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
            if not calm or not self._real_time:
                self._in_the_queue(min(_NICE, self._own_nice))
                return
            try:
                os.sched_setscheduler(self._thread, _CLASS, os.sched_param(_PRIORITY))
            except OSError:
                self._in_the_queue(min(_NICE, self._own_nice))

    def _in_the_queue(self, nice: int) -> None:
        policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK  # clearing the flag would need a right
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(self._thread) != policy:
                os.sched_setscheduler(self._thread, policy, os.sched_param(0))
        if os.getpriority(os.PRIO_PROCESS, self._thread) != nice:
            os.setpriority(os.PRIO_PROCESS, self._thread, nice)
