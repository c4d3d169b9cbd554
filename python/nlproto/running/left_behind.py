# SPDX-License-Identifier: MIT
"""Work that may hang on a disk or a server, in a thread that nobody waits for."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

from nlproto.errors import Error
from nlproto.running.supervise import Failures

__all__ = ["Beside", "LeftBehind"]

T = TypeVar("T")

_STEP_S = 0.02  # between two looks whether who waits has time left


class LeftBehind(Generic[T]):
    """A thread that does `work` on one thing after another. A context manager.

    At the end the thread is not joined, because its wait cannot be interrupted. At most `most`
    things may wait. Errors of the types `foreseen` are not logged: the next thing may go well.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[T], None],
        most: int,
        foreseen: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        self._work = work
        self._foreseen = foreseen
        self._waiting: queue.Queue[tuple[T] | None] = queue.Queue(most)
        self._failures = Failures(name)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)

    def add(self, thing: T) -> bool:
        """Queue `thing`. Returns False if too many wait. From any thread, at once."""
        try:
            self._waiting.put_nowait((thing,))
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while (one := self._waiting.get()) is not None:
            try:
                self._work(*one)
            except Exception as error:
                if not isinstance(error, self._foreseen):
                    self._failures.add(error)


class Beside:
    """Does `work` in a thread named `name`, one at a time. For any thread."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._failed: Error | None = None
        self._waits = threading.local()

    @contextlib.contextmanager
    def waiting_until(self, over: Callable[[], bool]) -> Iterator[None]:
        """In this block the calling thread does not wait once its time is `over`."""
        self._waits.over = over
        try:
            yield
        finally:
            del self._waits.over

    def is_over(self) -> bool:
        """Return whether the calling thread has no time to wait."""
        over: Callable[[], bool] | None = getattr(self._waits, "over", None)
        return over is not None and over()

    @property
    def runs(self) -> bool:
        """Whether it is at work."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, wait_s: float) -> None:
        """Return when it is not at work, or after `wait_s`."""
        if (thread := self._thread) is not None:
            thread.join(wait_s)

    def run(self, wait_s: float) -> bool:
        """Begin, unless it runs already. Returns whether it ended within `wait_s`.

        Raises the Error of the last one that failed.
        """
        with self._starting:
            thread = self._thread
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread = thread
                thread.start()
        until = time.monotonic() + wait_s
        while thread.is_alive() and (left := until - time.monotonic()) > 0 and not self.is_over():
            thread.join(min(left, _STEP_S))
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        return not thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except Error as error:
            self._failed = error
