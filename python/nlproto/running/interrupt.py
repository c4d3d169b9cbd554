# SPDX-License-Identifier: MIT
"""What ends a program before it has begun, or after it has ended.

Ctrl-C, too little memory, or a damaged file of Python's cache.
"""

from __future__ import annotations

import errno
import signal
import sys
from types import TracebackType

from nlproto.guard import leave_no_cut_modules

__all__ = ["begins", "ends_quietly", "raises"]

_UNMAPPED = ("failed to map segment", "cannot allocate memory")
"""What ld.so says when a library of NumPy or Python has no room."""


def begins(program: str) -> None:
    """Until raises() Ctrl-C ends `program` silently. A failed import is one line if it can be."""
    ends_quietly()
    leave_no_cut_modules()

    def tell(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        if _lacks_memory(error):
            line = "not enough memory: raise the limit (ulimit -v, MemoryMax=)"
        elif damaged := _damaged(error, at):
            line = f"{damaged} is cut: remove it"
        else:
            sys.__excepthook__(kind, error, at)
            return
        if sys.stderr is not None:
            print(f"{program}: {line}", file=sys.stderr)

    sys.excepthook = tell


def _damaged(error: BaseException, at: TracebackType | None) -> str:
    """Return the file of Python's cache that could not be read, if that was the error."""
    if "marshal data" not in str(error):
        return ""
    found = ""
    while at is not None:
        found = str(at.tb_frame.f_locals.get("bytecode_path") or found)
        at = at.tb_next
    return found


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
