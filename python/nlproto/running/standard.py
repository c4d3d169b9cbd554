# SPDX-License-Identifier: MIT
"""Standard input, output and error. Data goes to 1, words to 2. All three are always open.

Words are one line each. What they quote may come from other users, or from a network.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

__all__ = ["OneLine", "one_line", "open_standard"]

# Reading a closed input ends at once, and writing to a closed output fails, as with GNU's tools.
# Words that nobody can read are no failure.
_MODES = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_RDWR}


def open_standard() -> None:
    """Open those of 0, 1 and 2 that the caller closed (>&-), before any file gets their number.

    Python has None for a closed stream, and print() to a stderr that is None writes to stdout.
    """
    for number, mode in _MODES.items():
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, mode)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)


def one_line(text: str) -> str:
    """Return `text` with control characters, line ends too, as \\xNN or \\uNNNN."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _number(ord(one)) for one in text)


def _number(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class OneLine(logging.Formatter):
    """A message is one line. A traceback's lines are indented: none passes for a message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See logging.Formatter."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See logging.Formatter."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {one_line(line)}" for line in lines)
