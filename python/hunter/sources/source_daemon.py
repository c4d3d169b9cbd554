# SPDX-License-Identifier: MIT
"""Packets from the daemon, which names them. It needs no privilege."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from hunter.show.columns import Holder
from hunter.sources.daemon_accounts import DaemonAccounts
from nlproto import Error, NoDaemon, UsageError
from nlproto.client.client import (
    AccountEvent,
    ClientEvent,
    DaemonClient,
    DaemonEvent,
    EndsEvent,
    FirstBytesEvent,
    ProcessesEvent,
    StreamBatch,
)
from nlproto.filters.filter import Filter
from nlproto.records.batch import NamedBatch
from nlproto.records.ends import FlowKey, ToldEnds
from nlproto.records.first_bytes import FirstBytes
from nlproto.tables.processes import Process, Processes

__all__ = ["OwnerQuestions", "DaemonSource"]

_HELLO = 3.0  # s, for a daemon that is starting
_ANSWER = 10.0  # s
_LAST_ANSWER = 60.0  # s, for the account of all that was recorded: a busy daemon needs time


class OwnerQuestions:
    """Holders of shared sockets. The daemon is asked about a cookie once in a while."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._client: DaemonClient | None = None
        self._known: dict[int, list[Holder]] = {}

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        """Return those known; empty when the daemon does not answer."""
        if len(self._known) > 4096:
            self._known.clear()
        wanted = [cookie for cookie in cookies if cookie not in self._known]
        try:
            if wanted and self._client is None:
                self._client = DaemonClient(self._path)
            for at in range(0, len(wanted), 1000):
                self._ask(wanted[at : at + 1000])
        except Error:
            self.close()
        return {cookie: self._known[cookie] for cookie in cookies if self._known.get(cookie)}

    def _ask(self, cookies: list[int]) -> None:
        assert self._client is not None
        owners = self._client.lookup([{"cookie": cookie} for cookie in cookies])
        for cookie, owner in zip(cookies, owners, strict=True):
            found = owner["holders"] if owner else []
            self._known[cookie] = [{"pid": one["pid"], "comm": one["comm"]} for one in found]

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class DaemonSource:
    """A subscription. If the daemon goes away, it waits for another one and goes on with that.

    Raises NoDaemon if there is no daemon at `path` at the beginning.
    """

    def __init__(
        self, path: str, filter: Filter, notify: Callable[[str], None], first_bytes: bool = False
    ) -> None:
        self._path = path
        self._filter = str(filter)
        self._notify = notify
        self._processes = Processes()
        self.ends = self._processes.ends = ToldEnds()
        self._told: set[FlowKey] = set()
        """Flows whose ends the daemon has sent since the last batch."""
        self._questions = OwnerQuestions(path)
        self._spans = DaemonAccounts()
        self._wants_first_bytes = first_bytes
        self.first_bytes: FirstBytes | None = None
        self._client: DaemonClient | None = None
        self._gone_at = 0.0
        self._away = 0.0
        """Seconds without a daemon. Nobody knows how many packets passed then."""
        self._dropped = self._dropped_before = 0
        daemon = self._subscribe(DaemonClient(path)).daemon
        self.description = f"daemon, engine {daemon['engine']}"
        if not daemon.get("everything", True):
            notify("the daemon shows you the packets of your own processes; root sees all")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._client is not None:
            self._client.close()
        self._questions.close()

    def _subscribe(self, client: DaemonClient) -> DaemonClient:
        try:
            reply = client.start(self._filter, self._wants_first_bytes)
        except BaseException:
            client.close()
            raise
        self._missed = self._spans.begin(reply["account"])
        self.first_bytes = self.first_bytes or (FirstBytes() if reply["snaps"] else None)
        self._client = client
        return client

    def read(self, timeout: float) -> list[NamedBatch] | None:
        if self._client is None:
            self._resume(timeout)
            return []
        try:
            return self._taken(self._client.read(timeout))
        except NoDaemon:
            self._leave("the daemon has gone")
            return []

    def _leave(self, why: str) -> None:
        assert self._client is not None
        self._client.close()
        self._client = None
        self._spans.cut()
        self._gone_at = time.monotonic()
        self._dropped_before += self._dropped
        self._dropped = 0
        self._notify(f"{why}; waiting for it to come back")

    def _resume(self, timeout: float) -> None:
        """Try once, after waiting `timeout` s."""
        time.sleep(timeout)
        try:
            client = self._subscribe(DaemonClient(self._path, _HELLO))
        except UsageError:
            raise
        except Error:
            return  # it is not there, or not yet ready
        client.timeout = _ANSWER
        away = time.monotonic() - self._gone_at
        missed = "what passed meanwhile is lost"
        if self._missed is None:
            self._away += away
        else:
            missed = f"{self._missed} packets passed meanwhile"
        self._notify(f"the daemon is back after {away:.1f} s: {missed}")

    def _taken(self, events: list[ClientEvent]) -> list[NamedBatch]:
        batches = []
        for event in events:
            if isinstance(event, StreamBatch):
                self._dropped = event.dropped
                self._spans.received(event.batch.records["how"])
                self.ends.forget_others(event.batch.records, self._told)
                self._told = set()
                batches.append(event.batch)
            elif isinstance(event, ProcessesEvent):
                self._processes.restore(event.processes)
            elif isinstance(event, EndsEvent):
                for one in event.ends:
                    self._told.add(one.key)
                    self.ends.tell(one.key, one.domain, one.became)
            elif isinstance(event, FirstBytesEvent):
                if self.first_bytes is not None:
                    self.first_bytes.keep(event.batch)
            elif isinstance(event, AccountEvent):
                self._spans.mark(event.account)
            elif isinstance(event, DaemonEvent):
                self._happened(event)
        return batches

    def _happened(self, event: DaemonEvent) -> None:
        if event.name == "bye":
            self._leave("the daemon has ended")
        elif event.name != "gap":  # gaps are in the closing account
            self._notify(f"daemon: {event.fields.get('message') or event.name}")

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        self._filter = str(filter)
        if self._client is None:
            return []  # the next daemon gets the new filter
        batches = self._finish(self._client)
        if self._client is not None:
            self._dropped_before += self._dropped
            self._dropped = 0
            self._subscribe(self._client)
        return batches

    def finish(self) -> list[NamedBatch]:
        batches: list[NamedBatch] = []
        if self._client is not None:
            batches = self._finish(self._client)
        if self._client is None:
            self._away += time.monotonic() - self._gone_at
        if self._away:
            self._notify(f"no daemon for {self._away:.1f} s: what passed then is lost, not counted")
        return batches

    def _finish(self, client: DaemonClient) -> list[NamedBatch]:
        reply = None
        client.timeout = _LAST_ANSWER
        with contextlib.suppress(NoDaemon):
            reply = client.unsubscribe()
        batches: list[NamedBatch] = []
        with contextlib.suppress(NoDaemon):
            batches = self._taken(client.read(0))
        if reply is not None:
            self._spans.end(reply["account"])
            self._dropped = int(reply["dropped"])
        elif self._client is not None:
            self._leave("the daemon has gone")
        return batches

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        return self._processes.get(tgid, start_ns)

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return self._questions.holders(cookies)

    def account(self) -> Mapping[str, Any] | None:
        return self._spans.total()

    def lost(self) -> int:
        return self._dropped_before + self._dropped
