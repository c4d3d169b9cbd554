# SPDX-License-Identifier: MIT
"""Questions that take time, in two threads. Users take turns. Unwanted questions are given up.

One thread is for users who see everything, one for all others.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from daemon.sharing.allowance import Allowance, Meter
from daemon.sharing.rounds import Rounds
from nlproto.errors import Error
from nlproto.running.urgency import Urgency

__all__ = ["FAILED", "Cancelled", "QueuedQuestion", "Questions", "StopIfGone"]

StopIfGone = Callable[[], None]
"""Raises to end a question. Must be called every few ms."""

log = logging.getLogger(__name__)


FAILED = "the daemon failed on this request; see its log"
_LONGEST = 5.0
"""s that a question of a user with limited rights may take."""
_PART = 0.002  # s of work between two looks at the allowance
_NAP = 0.02  # s, longest sleep between two checks whether the answer is still wanted


class Cancelled(Exception):
    """Not an Error: nobody is told."""


@dataclass(eq=False, slots=True)
class QueuedQuestion:
    """`work` runs in a thread; `done` gets its result or Error in the event loop's thread."""

    user: int
    full: bool
    work: Callable[[StopIfGone], Any]
    done: Callable[[Any], None]
    cancelled: bool = field(default=False, init=False)
    running: bool = field(default=False, init=False)

    def run(self, allowance: Allowance, urgency: Urgency) -> Any:
        """Return the result, or the Error to send. Runs in its thread."""
        meter = Meter(None if self.full else allowance)
        looked = began = time.monotonic()

        def stop() -> None:
            nonlocal looked
            now = time.monotonic()
            if now - looked > _PART:
                looked = now
                if self.full:
                    urgency.look()
                _sleep(meter.pause(), self)
            if self.cancelled:
                raise Cancelled
            if not self.full and now - began > _LONGEST:
                raise Error(f"no answer within {_LONGEST:g} s; ask for less")

        try:
            if self.full:
                urgency.look()
            stop()
            return self.work(stop)
        except Cancelled:
            return None
        except Error as error:
            return error
        except Exception:
            log.exception("a question failed")
            return Error(FAILED)
        finally:
            _sleep(meter.pause(), self)


class Questions:
    """Questions, for the event loop's thread.

    `may_answer(question)` says whether there is room for an answer; pump() asks again.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        may_answer: Callable[[QueuedQuestion], bool],
        allowance: Allowance,
    ) -> None:
        self._loop = loop
        self._allowance = allowance
        self._may_answer = may_answer
        self._sides = {True: _Side("questions-all"), False: _Side("questions")}
        self._urgency = Urgency()
        self._ended = False
        self.cancelled = 0

    @property
    def waiting(self) -> int:
        return sum(side.waiting for side in self._sides.values())

    def ask(self, question: QueuedQuestion) -> None:
        side = self._sides[question.full]
        side.rounds.add(question.user, question)
        side.waiting += 1
        self._next(side)

    def cancel(self, question: QueuedQuestion) -> None:
        """Nobody waits for the answer: `done` is not called, and the thread ends it soon."""
        if question.cancelled:
            return
        question.cancelled = True
        self.cancelled += 1
        if not question.running:
            side = self._sides[question.full]
            side.rounds.discard(question.user, question)
            side.waiting -= 1

    def pump(self) -> None:
        """Somebody has read an answer, or has gone: check again for room."""
        for side in self._sides.values():
            self._next(side)

    def end(self) -> None:
        """Give everything up."""
        self._ended = True
        for side in self._sides.values():
            if side.running is not None:
                side.running.cancelled = True
            side.executor.shutdown(wait=False, cancel_futures=True)

    def _next(self, side: _Side) -> None:
        if side.running is not None or self._ended:
            return
        for user in side.rounds.users():
            question = side.rounds.first(user)
            if not self._may_answer(question):
                continue
            side.rounds.next(user)
            side.waiting -= 1
            side.running = question
            question.running = True
            try:
                future = self._loop.run_in_executor(
                    side.executor, question.run, self._allowance, self._urgency
                )
            except RuntimeError as error:  # no thread can be started
                side.running = None
                question.done(Error(f"the daemon cannot work on this now ({error}); try again"))
                continue
            future.add_done_callback(functools.partial(self._done, side, question))
            return

    def _done(self, side: _Side, question: QueuedQuestion, future: asyncio.Future[Any]) -> None:
        side.running = None
        try:
            if not question.cancelled and not future.cancelled():
                question.done(future.result())
        finally:
            self._next(side)


class _Side:
    def __init__(self, name: str) -> None:
        self.executor = ThreadPoolExecutor(1, name)
        self.rounds: Rounds[QueuedQuestion] = Rounds()
        self.running: QueuedQuestion | None = None
        self.waiting = 0


def _sleep(seconds: float, question: QueuedQuestion) -> None:
    """Sleep, but not longer than the question is wanted."""
    until = time.monotonic() + seconds
    while not question.cancelled and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _NAP))
