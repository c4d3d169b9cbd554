# SPDX-License-Identifier: MIT
"""An engine that plays records from memory."""

import threading
import time

import numpy as np

from nlproto.pipeline.account import Account
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes


class Replay:
    """Gives `batches` one a read, then waits; `tail` comes at finish()."""

    name = "replay"
    instance = 7

    def __init__(self, batches=(), tail=(), error=None):
        self.batches = list(batches)
        self.tail = list(tail)
        self.error = error
        self.opening = self.closing = np.zeros(0, wire.TAIL)
        self.closed = threading.Event()
        self.group = "packets"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed.set()

    def read(self, timeout):
        if self.batches:
            yield self.batches.pop(0)
        elif self.error is not None:
            raise self.error
        else:
            time.sleep(min(timeout, 0.01))

    def catch_up(self):
        while self.batches:
            yield self.batches.pop(0)
        self.closing = self.opening

    def begin(self):
        self.batches.clear()
        self.begun_ns = time.monotonic_ns()
        return self.begun_ns

    def finish(self, until_ns=None):
        self.until_ns = until_ns
        while self.batches:
            yield self.batches.pop(0)
        yield from self.tail

    def stats(self):
        return {}


def pipeline_of(engine, **more):
    return Pipeline(engine, account=Account(), processes=Processes(), portmap=PortMap(), **more)
