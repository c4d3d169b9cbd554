# SPDX-License-Identifier: MIT
"""Standard input, output and error. Data goes to 1, words to 2. All three are always open."""

from __future__ import annotations

import os
import sys

__all__ = ["open_standard"]

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
