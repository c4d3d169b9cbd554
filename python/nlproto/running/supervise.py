# SPDX-License-Identifier: MIT
"""Threads that outlive a mistake: it is logged, and who fails for good says so before it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nlproto.errors import Error
from nlproto.running.descriptors import none_left

__all__ = ["PATIENCE", "Failures", "described", "keep_going"]

_QUIET = 60.0  # s between two lines about the same
_PAUSE = 0.1  # s before a turn is tried again
PATIENCE = 60.0
"""Seconds of nothing but failures after which going on is of no use."""

log = logging.getLogger(__name__)


class Failures:
    """What went wrong in one part of the program; for one thread.

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
        """Something failed; `what` of a few words, none of them a user's."""
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
        """Something went well."""
        self._last = self._since = None

    @property
    def hopeless(self) -> bool:
        """Whether nothing went well for as long as patience lasts."""
        return self._since is not None and self._now() - self._since > self._patience

    def death(self) -> Error:
        """What to end the program with."""
        why = "" if self._last is None else f" ({described(self._last)})"
        return Error(f"{self.part} cannot go on{why}; please report this")


def described(error: BaseException) -> str:
    """One line: an Error's own words, else also its type and where it came from."""
    text = " ".join(str(error).split())
    if isinstance(error, Error):
        return text
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = "" if at is None else f" [{at.tb_frame.f_globals.get('__name__')}:{at.tb_lineno}]"
    return f"{type(error).__name__}: {text}{place}"


def keep_going(turn: Callable[[], bool], failures: Failures, died: Callable[[Error], None]) -> None:
    """Call `turn` until it returns False, whatever it raises.

    Who fails only, and has no success to clear(), calls died(error) in the end.
    """
    while not failures.hopeless:
        try:
            if not turn():
                return
        except Exception as error:
            failures.add(error)
            time.sleep(_PAUSE)
    died(failures.death())
