# SPDX-License-Identifier: MIT
"""File descriptors: the highest limit, shares for each use, errors when none is left, one to wake.

Sources: man 2 getrlimit, man 5 systemd.exec (LimitNOFILE: raise the soft limit, avoid select()).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import threading
from collections.abc import Iterator

from nlproto.errors import Error

__all__ = [
    "NoDescriptors",
    "Wakeup",
    "lower_limit",
    "namespaces",
    "none_left",
    "or_error",
    "raise_limit",
]

_PER_NETNS = 10
"""Ring, sock_diag, rtnetlink, conntrack of the engine; of watcher, namer, tcp_info; taps, NAT."""
_OTHERS = 64  # files, history, event loop, the questions under way
_CLIENTS = 512
_LEAST = 18

_soft_at_start = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class NoDescriptors(Error):
    """This process, or the machine, has no file descriptor left."""

    @classmethod
    def of(cls, error: OSError) -> NoDescriptors:
        """Return the exception for `error`."""
        return cls(f"{error.strerror}: raise the limit (ulimit -n, LimitNOFILE=) or close some")


def raise_limit() -> None:
    """Raise this process's soft limit to the hard one. Nothing here uses select(2).

    Raises Error if even the hard limit is too low to begin.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if 0 <= hard < _LEAST:
        raise NoDescriptors(f"{hard} open files are too few: raise the limit (ulimit -n)")


def lower_limit() -> None:
    """Restore the soft limit of the start, for a program that is started from here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (_soft_at_start, hard))


def namespaces(most: int) -> int:
    """Return how many network namespaces may be captured: at least one, at most `most`.

    At least half of the descriptors stay for others, or enough for the full number of clients.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    others = _OTHERS + min(_CLIENTS, soft // 2)
    return max(1, min(most, (soft - others) // _PER_NETNS))


def none_left(error: BaseException) -> bool:
    """Return whether `error` says that no descriptor is left."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


@contextlib.contextmanager
def or_error() -> Iterator[None]:
    """Raise NoDescriptors in place of an OSError that says the same."""
    try:
        yield
    except OSError as error:
        if not none_left(error):
            raise
        raise NoDescriptors.of(error) from None


class Wakeup:
    """A descriptor that ends the poll(2) of another thread."""

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
