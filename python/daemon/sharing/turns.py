# SPDX-License-Identifier: MIT
"""The event loop's time. Users take turns; those with limited rights have an allowance."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from daemon.sharing.allowance import Allowance, Meter
from daemon.sharing.rounds import Rounds
from nlproto.running.supervise import Failures

__all__ = ["Turns"]


class Taker(Hashable, Protocol):
    """Something that takes turns."""

    @property
    def user(self) -> int: ...

    @property
    def full(self) -> bool:
        """Whether it sees everything. The others take turns apart."""

    def take_turn(self) -> bool:
        """Work for a moment. Returns whether there is more to do."""

    def abort(self) -> None:
        """End: its turn failed."""


T = TypeVar("T", bound=Taker)


class Turns(Generic[T]):
    """For the event loop's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, allowance: Allowance, failures: Failures
    ) -> None:
        self._loop = loop
        self._allowance = allowance
        self._failures = failures
        self._rounds: dict[bool, Rounds[T]] = {True: Rounds(), False: Rounds()}
        self._turning: set[bool] = set()

    def add(self, taker: T) -> None:
        """It has something to do."""
        self._rounds[taker.full].add(taker.user, taker)
        if taker.full not in self._turning:
            self._turning.add(taker.full)
            self._loop.call_soon(self._take_turn, taker.full)

    def discard(self, taker: T) -> None:
        self._rounds[taker.full].discard(taker.user, taker)

    def _take_turn(self, full: bool) -> None:
        rounds, meter = self._rounds[full], Meter(None if full else self._allowance)
        taker = rounds.next()
        try:
            if taker is not None and taker.take_turn():
                rounds.add(taker.user, taker)
        except Exception as error:  # the others' turns go on
            self._failures.add(error, "a turn")
            assert taker is not None
            taker.abort()
        pause = meter.pause()
        if not rounds:
            self._turning.discard(full)
        elif pause:
            self._loop.call_later(pause, self._take_turn, full)
        else:
            self._loop.call_soon(self._take_turn, full)
