# SPDX-License-Identifier: MIT
"""What hunter top shows, in any of its tables."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable

from hunter.show.account import ShownAccount
from hunter.show.names import HostNames, Namespaces
from hunter.show.programs import place
from hunter.show.rates import KEPT_S, FlowRate, ProcessRate, RateKey, Rates
from hunter.show.text import plain
from hunter.show.units import UNITS
from hunter.sources.source import Source
from hunter.top.going import Going, SocketGoing
from nlproto import Error
from nlproto.records.batch import NamedBatch
from nlproto.records.ends import FlowKey, Translated
from nlproto.records.wire import joined
from nlproto.tables.flows import summarize
from nlproto.tables.processes import Process

__all__ = ["GROUPS", "State"]

GROUPS = ("name", "unit", "container", "user")
"""What processes are summed up by."""
_MAX_ENDED = 1 << 16


class State:
    """Rates and account of `source`, and how to show them.

    A thread reads the source between start() and stop(). Everything else is for the thread that
    calls take().
    """

    def __init__(
        self,
        source: Source,
        known: HostNames,
        units: str = UNITS[0],
        filter_text: str = "",
        kept_s: float = KEPT_S,
        numbers: bool = False,
        going: Going | None = None,
    ) -> None:
        self.source = source
        self.known = known
        self.numbers = numbers
        """Whether hosts and services are shown as numbers."""
        self.units = units
        self.paused = False
        self.shows_ended = kept_s == math.inf
        """Whether ended processes are shown; a file has no others."""
        self._ended: set[RateKey] = set()
        self.namespaces = Namespaces(None)
        self.rates = Rates(kept_s)
        self.shown = ShownAccount()
        self.failure: Error | None = None
        """Why nothing more comes."""
        self._filter_text = filter_text
        self._inbox = _Inbox(source)
        self._asking = going
        self._going: dict[int, SocketGoing] = {}
        self._last_s = time.monotonic()

    def start(self) -> None:
        self._inbox.start()

    def stop(self) -> None:
        self._inbox.stop()

    def take(self) -> None:
        """Count what came since the last call."""
        now_s = time.monotonic()
        batches, became = self._inbox.take()
        for batch in batches:
            self.shown.add(batch)
            self.namespaces.see(batch.records["netns"])
        self.rates.tick(batches, now_s, max(now_s - self._last_s, 1e-3), became)
        self._last_s = now_s
        if self._asking is not None:
            self._hear(self._asking.take())
        self.failure = self._inbox.failure

    def _hear(self, found: dict[int, SocketGoing] | None) -> None:
        """Of flows that are shown; what has been closed since stays as it was."""
        if found is None:
            return
        cookies = {flow.cookie for one in self.rates for flow in one.flows.values()}
        self._going = {
            cookie: now
            for cookie in cookies
            if (now := found.get(cookie) or self._going.get(cookie)) is not None
        }

    def going(self, flows: Iterable[FlowRate]) -> SocketGoing:
        """Return how the sockets of these flows go, added up; the round trip time in the middle."""
        cookies = {flow.cookie for flow in flows}
        known = [self._going[cookie] for cookie in cookies if cookie in self._going]
        times = sorted(one.rtt_us for one in known if one.rtt_us)
        return SocketGoing(
            times[len(times) // 2] if times else 0,
            sum(one.resent for one in known),
            sum(one.dropped for one in known),
            sum((Counter(one.reasons) for one in known), Counter()),
        )

    def next_units(self) -> None:
        self.units = UNITS[(UNITS.index(self.units) + 1) % len(UNITS)]

    def hides(self, process: ProcessRate) -> bool:
        """Return whether the process has ended, and its last packet is not from this moment."""
        return not self.shows_ended and not process.meter.rate and self.ended(process)

    def place(self, process: ProcessRate) -> str:
        """Return what the process runs in. It may contain any character."""
        one = self._details(process)
        return "" if one is None else place(one.container, one.container_name, one.pod, one.unit)

    def group(self, process: ProcessRate, by: str) -> str:
        """Return the process's group in sums by `by`, one of GROUPS; "" for none."""
        if by == "name":
            return process.comm
        if by == "user":
            return "" if process.uid is None else self.known.user(process.uid)
        one = self._details(process)
        if one is None:
            return ""
        if by == "unit":
            return one.unit
        return place(one.container, one.container_name, one.pod, "")

    def _details(self, process: ProcessRate) -> Process | None:
        return self.source.get(*process.key[:2]) if process.pid else None

    def ended(self, process: ProcessRate) -> bool:
        """Return whether the process is known to have exited."""
        if process.pid is None:
            return False
        if process.key not in self._ended:
            if not self._has_ended(process):
                return False
            if len(self._ended) >= _MAX_ENDED:
                self._ended.clear()
            self._ended.add(process.key)
        return True

    def _has_ended(self, process: ProcessRate) -> bool:
        details = self.source.get(*process.key[:2])
        if details is not None and details.exit_ns is not None:
            return True
        return not os.path.exists(f"/proc/{process.pid}")

    def account_text(self) -> str:
        shown = self.shown
        share = f" ({100 * shown.named / shown.records:.1f} %)" if shown.records else ""
        text = f"{shown.records:,} packets, {shown.named:,} named{share}"
        account = self.source.account()
        lost = self.source.lost() + (sum(account["lost"].values()) if account else 0)
        text += f", {lost:,} lost ({self.source.description})"
        if self._filter_text:
            text += f" | {self._filter_text}"
        if self._inbox.ended:
            text += " | the source has ended"
        return plain(text)

    def host(self, address: str) -> str:
        return address if self.numbers else self.known.host(address)


class _Inbox:
    """What the thread has read from the source since the last tick."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._batches: list[NamedBatch] = []
        self._became: dict[FlowKey, Translated] = {}
        """Of flows among the batches: who tells it may forget it with the next one."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self.failure: Error | None = None
        self.ended = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def take(self) -> tuple[list[NamedBatch], dict[FlowKey, Translated]]:
        with self._lock:
            batches, self._batches = self._batches, []
            became, self._became = self._became, {}
        return batches, became

    def _read(self) -> None:
        while not self._stopping.is_set():
            try:
                batches = self._source.read(0.1)
            except Error as error:
                self.failure = error
                return
            if batches is None:
                self.ended = True
                return
            records = [one.records for one in batches if len(one.records)]
            became = self._source.ends.translated(summarize(joined(records))) if records else {}
            with self._lock:
                self._batches += batches
                self._became |= became
