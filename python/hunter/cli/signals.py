# SPDX-License-Identifier: MIT
"""SIGINT, SIGTERM and SIGHUP end the program in order, a second one at once; SIGUSR2 reopens."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

__all__ = ["Stop"]


class Stop:
    """True when a signal asked to end. A context manager that restores the old handlers."""

    def __init__(self) -> None:
        self._asked = False
        self._reopen = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:
                self._before[number] = signal.signal(number, self._ask)
        self._before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._ask_reopen)
        return self

    def takes_reopen(self) -> bool:
        """Return whether SIGUSR2 came since the last call: the saved file was moved away."""
        asked, self._reopen = self._reopen, False
        return asked

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _ask_reopen(self, number: int, frame: FrameType | None) -> None:
        self._reopen = True
