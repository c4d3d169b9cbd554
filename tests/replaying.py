# SPDX-License-Identifier: MIT
"""An engine that plays records from memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import numpy as np

from nlproto.engines.engine import Engine, Event
from nlproto.pipeline.account import Account
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes


class Replay:
    """Gives `batches` one a read, then waits; `tail` comes at finish()."""

    name = "replay"
    instance = 7
    awaited: Callable[[], bool]

    def __init__(
        self,
        batches: Iterable[Event] = (),
        tail: Iterable[Event] = (),
        error: Exception | None = None,
    ) -> None:
        self.batches = list(batches)
        self.tail = list(tail)
        self.error = error
        self.opening = self.closing = np.zeros(0, wire.TAIL)
        self.closed = threading.Event()
        self.group = "packets"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed.set()

    def read(self, timeout: float) -> Iterator[Event]:
        if self.batches:
            yield self.batches.pop(0)
        elif self.error is not None:
            raise self.error
        else:
            time.sleep(min(timeout, 0.01))

    def catch_up(self) -> Iterator[Event]:
        while self.batches:
            yield self.batches.pop(0)
        self.closing = self.opening

    def begin(self) -> int:
        self.batches.clear()
        self.begun_ns = time.monotonic_ns()
        return self.begun_ns

    def finish(self, until_ns: int | None = None) -> Iterator[Event]:
        self.until_ns = until_ns
        while self.batches:
            yield self.batches.pop(0)
        yield from self.tail

    def stats(self) -> dict[str, object]:
        return {}

    def wake(self) -> None:
        """Do nothing: read() never waits long."""

    def want_packets(self, wanted: bool) -> None:
        """All records are of packets."""

    def want_first_bytes(self, wanted: bool) -> bool:
        return False


def pipeline_of(engine: Engine, **more: Any) -> Pipeline:
    return Pipeline(engine, account=Account(), processes=Processes(), portmap=PortMap(), **more)
