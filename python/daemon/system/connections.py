# SPDX-License-Identifier: MIT
"""Asks the kernel about TCP connections, for the history and the metrics."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable
from typing import Self

import numpy as np

from nlproto.errors import Error
from nlproto.host.namespace_sockets import PerNamespace
from nlproto.host.netns import Finder
from nlproto.host.tcp_info import HOST_TCP, TcpInfo
from nlproto.running.budget import Budget
from nlproto.running.supervise import Failures, keep_going

__all__ = ["Connections"]

_TURN = 0.5  # s for which ends of connections are gathered
_SETTLED_NS = 1_000_000_000
"""Time after its end when the history surely has the packets of a connection."""
_LOOK_NS = 10_000_000_000
"""Time between two looks at open connections, in all namespaces."""
_SHARE, _SAVED_NS = 500, 50_000_000
"""Looks take at most this part of the time. With many connections they are rarer."""
_MOST = 200_000
"""The most ended connections that wait to be stored."""

log = logging.getLogger(__name__)


class Connections:
    """A thread that gives figures of TCP connections (HOST_TCP) to `learn`. A context manager.

    The kernel reports a closed connection once; open ones are looked at. If the kernel refuses
    both, nothing is known.
    """

    def __init__(self, learn: Callable[[np.ndarray], None], finder: Finder | None = None) -> None:
        self._learn = learn
        self._namespaces = PerNamespace(TcpInfo, share=_SHARE, finder=finder)
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._looks_ns = 0
        self._look_budget = Budget(_SHARE, _SAVED_NS, time.monotonic_ns)
        self._stopping = threading.Event()
        self._failures = Failures("connections")
        self._thread = threading.Thread(
            target=lambda: keep_going(self._go_round, self._failures, self._give_up),
            name="connections",
            daemon=True,
        )
        self.lost = 0
        """Ends of connections without room here; for the kernel's losses, how often."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._namespaces.close()

    def _give_up(self, error: Error) -> None:
        """Log that it failed. The daemon works without it."""
        log.error("%s", error)

    def _go_round(self) -> bool:
        if self._stopping.wait(_TURN):
            return False
        now = time.monotonic_ns()
        there = self._namespaces.there()
        if not there:
            return True
        poll = select.poll()
        by_descriptor = {}
        for number, one in there.items():
            poll.register(one, select.POLLIN)
            by_descriptor[one.fileno()] = number, one
        for descriptor, _ in poll.poll(0):
            number, one = by_descriptor[descriptor]
            self._keep(number, one.closed(), now)
        self._settle(now)
        if now >= self._looks_ns and self._look_budget.allows():
            self._looks_ns = now + _LOOK_NS
            with self._look_budget.spend():
                self._look(there, now)
        self._failures.clear()
        return True

    def _look(self, there: dict[int, TcpInfo], now: int) -> None:
        found = []
        for number, one in there.items():
            try:
                found.append(_of(number, one.open()))
            except Error as error:
                self._failures.add(error)
            self._keep(number, one.closed(), now)
        if found:
            self._learn(np.concatenate(found))

    def _keep(self, number: int, closed: np.ndarray, now: int) -> None:
        room = _MOST - sum(len(one) for _, one in self._waiting)
        self.lost += max(0, len(closed) - room)
        if len(closed):
            self._waiting.append((now, _of(number, closed[:room])))

    def _settle(self, now: int) -> None:
        ready = [found for at, found in self._waiting if now - at >= _SETTLED_NS]
        if ready:
            self._waiting = self._waiting[len(ready) :]
            self._learn(np.concatenate(ready))


def _of(number: int, found: np.ndarray) -> np.ndarray:
    found["netns"] = number
    assert found.dtype == HOST_TCP
    return found
