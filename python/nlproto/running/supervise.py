# SPDX-License-Identifier: MIT
"""Threads that survive errors. Errors are logged; a thread that only fails says so and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nlproto.errors import Error
from nlproto.running.descriptors import none_left
from nlproto.running.urgency import Urgency

__all__ = ["PATIENCE", "Failures", "described", "keep_going"]

_QUIET = 60.0  # s between two lines about the same error
_PAUSE = 0.1  # s before another try
PATIENCE = 60.0
"""After so many seconds of nothing but failures it is no use to go on."""

log = logging.getLogger(__name__)


class Failures:
    """Failures of one part of the program. For one thread.

    Each kind is logged once a minute, with its traceback unless the error says what to do.
    """

    def __init__(
        self,
        part: str,
        patience: float = PATIENCE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.part = part
        self._patience = patience
        self._now = now
        self._since: float | None = None
        self._told: dict[str, tuple[float, int]] = {}
        self._last: Exception | None = None

    def add(self, error: Exception, what: str = "") -> None:
        """Note a failure. `what` is a few words, none of them a user's."""
        self._last = error
        now = self._now()
        if self._since is None:
            self._since = now
        at, unsaid = self._told.get(what, (now - _QUIET, 0))
        if now - at < _QUIET:
            self._told[what] = at, unsaid + 1
            return
        self._told[what] = now, 0
        line = f"{self.part}{', ' if what else ''}{what}: {described(error)}"
        if unsaid:
            line += f" ({unsaid} more like it in the last minute)"
        foreseen = isinstance(error, Error) or none_left(error)
        log.error("%s", line, exc_info=None if foreseen else error)

    def clear(self) -> None:
        """Note a success."""
        self._last = self._since = None

    @property
    def hopeless(self) -> bool:
        """Whether nothing has gone well for as long as patience lasts."""
        return self._since is not None and self._now() - self._since > self._patience

    def death(self) -> Error:
        """The error to end the program with."""
        why = "" if self._last is None else f" ({described(self._last)})"
        return Error(f"{self.part} cannot go on{why}; please report this")


def described(error: BaseException) -> str:
    """Return one line: the text of our own Error; for others also the type and the place."""
    text = " ".join(str(error).split())
    if isinstance(error, Error):
        return text
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = "" if at is None else f" [{at.tb_frame.f_globals.get('__name__')}:{at.tb_lineno}]"
    return f"{type(error).__name__}: {text}{place}"


def keep_going(
    turn: Callable[[], bool],
    failures: Failures,
    died: Callable[[Error], None],
    urgent: bool = False,
) -> None:
    """Call `turn` until it returns False, whatever it raises.

    If it only fails, without a clear() in between, died(error) is called in the end. `urgent`:
    questions wait for this thread.
    """
    urgency = Urgency()
    while not failures.hopeless:
        if urgent:
            urgency.look()
        try:
            if not turn():
                return
        except Exception as error:
            failures.add(error)
            time.sleep(_PAUSE)
    died(failures.death())
