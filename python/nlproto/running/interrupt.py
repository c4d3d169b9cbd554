# SPDX-License-Identifier: MIT
"""What ends a program before it has begun, or after it has ended: Ctrl-C, and too little memory."""

from __future__ import annotations

import errno
import signal
import sys
from types import TracebackType

__all__ = ["begins", "ends_quietly", "raises"]

_UNMAPPED = ("failed to map segment", "cannot allocate memory")
"""What ld.so says when a library of NumPy or Python has no room."""


def begins(program: str) -> None:
    """Until raises() Ctrl-C ends `program` silently. If it lacks memory, one line says so."""
    ends_quietly()

    def tell(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        if not _lacks_memory(error):
            sys.__excepthook__(kind, error, at)
        elif sys.stderr is not None:
            line = "not enough memory: raise the limit (ulimit -v, MemoryMax=)"
            print(f"{program}: {line}", file=sys.stderr)

    sys.excepthook = tell


def _lacks_memory(error: BaseException) -> bool:
    """Return whether `error`, or what it came from, says so."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, MemoryError):
            return True
        if isinstance(one, SystemError) and "without exception set" in str(one):  # so says NumPy
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        if isinstance(one, ImportError) and any(words in str(one).lower() for words in _UNMAPPED):
            return True
        one = one.__cause__ or one.__context__
    return False


def ends_quietly() -> None:
    """Let SIGINT end the process, the kernel's default; if it is ignored (nohup), it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raises() -> None:
    """Let SIGINT raise KeyboardInterrupt, so that begun work is undone."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
