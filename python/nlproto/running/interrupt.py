# SPDX-License-Identifier: MIT
"""Ctrl-C before a program has begun and after it has ended: the process ends at once, silently."""

from __future__ import annotations

import signal

__all__ = ["ends_quietly", "raises"]


def ends_quietly() -> None:
    """Let SIGINT end the process, the kernel's default; if it is ignored (nohup), it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raises() -> None:
    """Let SIGINT raise KeyboardInterrupt, so that begun work is undone."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
