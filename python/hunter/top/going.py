# SPDX-License-Identifier: MIT
"""How the sockets go that top shows: round trip times, segments sent again, packets dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

from nlproto.host.namespace_sockets import NamespaceSockets, PerNamespace
from nlproto.host.tcp_info import TcpInfo
from nlproto.kernel.bpf import NoBpf
from nlproto.kernel.drop_reasons import DropReasons
from nlproto.running.budget import Budget
from nlproto.running.supervise import Failures, keep_going

__all__ = ["Going", "SocketGoing"]

_TURN_S = 2.0
_SHARE, _SAVED_NS = 50, 500_000_000
"""Looks take this part of the time at most: with many sockets they come less often."""


class SocketGoing(NamedTuple):
    """Since the socket was made; what the kernel does not tell is 0."""

    rtt_us: int = 0
    resent: int = 0
    """TCP segments."""
    dropped: int = 0
    """Packets for which the socket had no room."""
    reasons: Mapping[str, int] = MappingProxyType({})
    """Why the kernel dropped packets at the socket, since the display began."""


class Going:
    """A thread that asks the kernel; a context manager. Without rights: of its own namespace."""

    def __init__(self) -> None:
        self._tcp = PerNamespace(lambda: TcpInfo(ends=False), share=_SHARE)
        self._sockets = NamespaceSockets()
        self._reasons: DropReasons | None = None
        with suppress(NoBpf):
            self._reasons = DropReasons()
        self._budget = Budget(_SHARE, _SAVED_NS, time.monotonic_ns)
        self._found: dict[int, SocketGoing] | None = None
        self._stopping = threading.Event()
        self._failures = Failures("sockets")
        self._thread = threading.Thread(
            target=lambda: keep_going(self._go_round, self._failures, lambda error: None),
            name="going",
            daemon=True,
        )

    def __enter__(self) -> Going:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._tcp.close()
        self._sockets.close()
        if self._reasons is not None:
            self._reasons.close()

    def take(self) -> dict[int, SocketGoing] | None:
        """Return by cookie what was found since the last call; None: nothing."""
        found, self._found = self._found, None
        return found

    def _go_round(self) -> bool:
        if self._budget.allows():
            with self._budget.spend():
                self._found = self._look()
        self._failures.clear()
        return not self._stopping.wait(_TURN_S)

    def _look(self) -> dict[int, SocketGoing]:
        found: dict[int, SocketGoing] = {}
        tables = self._sockets.tables()
        dropped = {} if self._reasons is None else self._reasons.read(tables)
        for table in tables.values():
            some = table[(table["drops"] != 0) & (table["cookie"] != 0)]
            for cookie, drops in zip(some["cookie"].tolist(), some["drops"].tolist(), strict=True):
                found[cookie] = SocketGoing(dropped=drops)
        for one in self._tcp.there().values():
            rows = one.open()
            names = ("cookie", "rtt_us", "retransmits")
            for cookie, rtt_us, resent in zip(
                *(rows[name].tolist() for name in names), strict=True
            ):
                before = found.get(cookie)
                found[cookie] = SocketGoing(rtt_us, resent, before.dropped if before else 0)
        for cookie, reasons in dropped.items():
            found[cookie] = found.get(cookie, SocketGoing())._replace(reasons=reasons)
        return found
