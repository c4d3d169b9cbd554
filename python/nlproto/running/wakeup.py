# SPDX-License-Identifier: MIT
"""Ends the poll(2) of another thread."""

from __future__ import annotations

import os
import select
import threading

__all__ = ["Wakeup"]


class Wakeup:
    """A descriptor that one thread polls, and that any thread makes ready."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Nobody writes to the number of a closed descriptor, which may be another file's."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def register(self, poll: select.poll) -> None:
        """Have it polled."""
        poll.register(self._fd, select.POLLIN)

    def wake(self) -> None:
        """Make it ready, until clear(). Does nothing after close()."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self, fd: int) -> bool:
        """Return whether the ready descriptor `fd` is this one. Then it is ready no more."""
        if fd != self._fd:
            return False
        os.eventfd_read(fd)
        return True

    def close(self) -> None:
        """Close it."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
