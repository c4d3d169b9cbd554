# SPDX-License-Identifier: MIT
"""Ctrl-C before a program has begun, and after its end: it ends at once, and says nothing."""

from __future__ import annotations

import signal

__all__ = ["ends_quietly", "raises"]


def ends_quietly() -> None:
    """Let SIGINT end the process, as the kernel does; one that is ignored (nohup) stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raises() -> None:
    """Let SIGINT raise KeyboardInterrupt, so that what was begun is undone."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
