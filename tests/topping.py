# SPDX-License-Identifier: MIT
"""A source that a test feeds, and `hunter top` driven by its keys (Textual's pilot)."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self, TypeAlias

import numpy as np
from textual.css.query import NoMatches
from textual.pilot import Pilot
from textual.widgets import Static

from hunter.show.columns import Holder
from hunter.show.names import HostNames
from hunter.top.app import Top
from hunter.top.grid import Grid
from hunter.top.state import State
from nlproto.filters.filter import Filter
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.records.ends import Ends, NoEnds
from nlproto.records.first_bytes import FirstBytes
from nlproto.tables.processes import Process, Processes

__all__ = ["REPLY", "Feed", "Script", "batch", "becomes", "cells", "drive", "text"]

Script: TypeAlias = Callable[[Top, Pilot[Any]], Awaitable[None]]


def batch(*rows: dict[str, Any]) -> NamedBatch:
    """Packets of this process, to which each of `rows` says what is different."""
    records = np.zeros(len(rows), wire.RECORD)
    for record, fields in zip(records, rows, strict=True):
        values = {
            "family": socket.AF_INET,
            "proto": socket.IPPROTO_TCP,
            "dir": wire.lib.SNIFFER_DIR_OUT,
            "how": wire.lib.SNIFFER_HOW_CONTEXT,
            "sport": 50000,
            "dport": 80,
            "len": 1000,
            "gso_segs": 1,
            "tgid": os.getpid(),
            "start_ns": 1,
            "uid": 0,
            "comm": b"web",
            "saddr": [10, 0, 0, 1] + [0] * 12,
            "daddr": [10, 0, 0, 2] + [0] * 12,
        } | fields
        for name, value in values.items():
            record[name] = value
    return NamedBatch(np.zeros(1, wire.BATCH)[0], records, Clock(0, 0))


REPLY: dict[str, Any] = {
    "dir": wire.lib.SNIFFER_DIR_IN,
    "saddr": [10, 0, 0, 2] + [0] * 12,
    "daddr": [10, 0, 0, 1] + [0] * 12,
    "sport": 80,
    "dport": 50000,
    "len": 3000,
}


class Feed:
    """A source that gives what the test puts in."""

    ends: Ends = NoEnds()
    first_bytes: FirstBytes | None = None
    description = "a test"

    def __init__(self, *processes: Process) -> None:
        self.processes = Processes()
        self.processes.restore(list(processes))
        self.batches: list[NamedBatch] = []
        self.lock = threading.Lock()
        self.failure: Exception | None = None
        self.ended = False

    def put(self, *rows: dict[str, Any]) -> None:
        with self.lock:
            self.batches.append(batch(*rows))

    def read(self, timeout: float) -> list[NamedBatch] | None:
        if self.failure:
            raise self.failure
        time.sleep(0.01)
        with self.lock:
            batches, self.batches = self.batches, []
        return None if self.ended and not batches else batches

    def get(self, tgid: int, start_ns: int) -> Process | None:
        return self.processes.get(tgid, start_ns)

    def account(self) -> None:
        return None

    def lost(self) -> int:
        return 3

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        return []

    def finish(self) -> list[NamedBatch]:
        return []

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return {}


def drive(feed: Feed, script: Script, **options: Any) -> Top:
    """Play `script` once the first rows are there."""
    notes = options.pop("notes", ())
    size = options.pop("size", (140, 30))
    app = Top(State(feed, HostNames(), **options), interval=0.05, notes=notes)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await becomes(pilot, lambda: app.screen.query_one(Grid).row_count)
            await script(app, pilot)

    asyncio.run(run())
    return app


async def becomes(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
    """Wait until `condition()` holds, or fail with what it last said."""
    until = time.monotonic() + 10
    while True:
        await pilot.pause()
        try:
            assert condition()
            return
        except (AssertionError, NoMatches):
            if time.monotonic() > until:
                raise
        await asyncio.sleep(0.02)


def cells(app: Top) -> list[list[str]]:
    table = app.screen.query_one(Grid)
    return [table.texts(row) for row in range(table.row_count)]


def text(app: Top, name: str) -> str:
    return str(app.screen.query_one(name, Static).render())
