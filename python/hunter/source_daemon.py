# SPDX-License-Identifier: MIT
"""Packets from the daemon, which names them; no privilege needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from hunter.columns import Holder
from nlproto import Error, NoDaemon
from nlproto.client import DaemonClient, DaemonEvent, Event, ProcessesEvent, StreamBatch
from nlproto.filter import Filter
from nlproto.pipeline import NamedBatch
from nlproto.processes import Process, Processes

__all__ = ["Asker", "DaemonSource"]


class Asker:
    """Holders of shared sockets, asked of the daemon once a cookie in a while."""

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
            pass
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


class DaemonSource:
    """A subscription. Raises NoDaemon when nobody serves `path`."""

    def __init__(self, path: str, filter: Filter, notify: Callable[[str], None]) -> None:
        self._client = DaemonClient(path)
        self._notify = notify
        self._processes = Processes()
        self._asker = Asker(path)
        self._ended = False
        self._dropped = 0
        self._client.start(str(filter))
        daemon = self._client.daemon
        self.description = f"daemon, engine {daemon['engine']}"
        if not daemon.get("everything", True):
            notify("the daemon shows you the packets of your own processes; root sees all")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()
        self._asker.close()

    def read(self, timeout: float) -> list[NamedBatch] | None:
        if self._ended:
            return None
        return self._taken(self._client.read(timeout))

    def _taken(self, events: list[Event]) -> list[NamedBatch]:
        batches = []
        for event in events:
            if isinstance(event, StreamBatch):
                self._dropped = event.dropped
                batches.append(event.batch)
            elif isinstance(event, ProcessesEvent):
                self._processes.restore(event.processes)
            elif isinstance(event, DaemonEvent):
                self._happened(event)
        return batches

    def _happened(self, event: DaemonEvent) -> None:
        if event.name == "bye":
            self._ended = True
            self._notify("the daemon has ended")
        elif event.name == "engine":
            self._notify(f"the daemon goes on with engine {event.fields.get('name', '?')}")
        elif event.name != "gap":  # gaps are in the closing account
            self._notify(f"daemon: {event.name.replace('_', ' ')}")

    def finish(self) -> list[NamedBatch]:
        if self._ended:
            return []
        try:
            reply = self._client.unsubscribe()
        except NoDaemon:
            self._ended = True
            return []
        batches = self._taken(self._client.read(0))
        self._dropped = int(reply["dropped"])
        return batches

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        return self._processes.get(tgid, start_ns)

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return self._asker.holders(cookies)

    def account(self) -> Mapping[str, Any] | None:
        closing = self._client.account
        start, end = closing.get("account_at_start"), closing.get("account")
        if start is None or end is None:
            return None
        return _difference(end, start)

    def lost(self) -> int:
        return self._dropped


def _difference(end: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Every count of `end` less what it was at `start`."""
    result: dict[str, Any] = {}
    for name, value in end.items():
        before = start.get(name)
        if isinstance(value, Mapping):
            result[name] = _difference(value, before or {})
        elif isinstance(value, int) and not isinstance(value, bool):
            result[name] = value - (before or 0)
        else:
            result[name] = value
    return result
