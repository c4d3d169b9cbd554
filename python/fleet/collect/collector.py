# SPDX-License-Identifier: MIT
"""The collector: moves batches from the server into stores, then acknowledges them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nats.aio.msg import Msg
from nats.js import JetStreamContext

from fleet import bus, wire
from fleet.collect.tables import Received
from fleet.options import FleetServer
from fleet.subjects import CONSUMER, STREAM
from nlproto.errors import Error

__all__ = ["Collector", "BatchStore"]

_FETCH = 256
"""How many batches it asks for at once."""
_MOST_ROWS = 400_000
_MOST_BYTES = 128 << 20
"""Bytes in memory, unpacked, from which on it writes at once."""
_MOST_BATCHES = 8_000
_POLL = 0.5  # s that the server waits for a batch
_COMPLAIN = 60.0  # s between two lines about invalid batches
_AGAIN = 5.0  # s between two tries to write

log = logging.getLogger(__name__)


class BatchStore(Protocol):
    """Where batches are kept."""

    def write(self, received: Sequence[Received]) -> None:
        """Return when all of it is safe. A batch that comes again is left out. Raises Error."""
        ...


class Collector:
    """Runs until stop(). `interval`: seconds between two writes; `replicas`: of a new stream.

    `tidy` is called after each write, in a thread; it raises Error.
    """

    def __init__(
        self,
        server: FleetServer,
        stores: Sequence[BatchStore],
        interval: float,
        replicas: int = 1,
        tidy: Callable[[], None] = lambda: None,
    ) -> None:
        self.collected = 0
        """Rows that are stored safely."""
        self.malformed = 0
        """Messages that were no batches."""
        self._server = server
        self._stores = stores
        self._interval = interval
        self._replicas = replicas
        self._tidy = tidy
        self._stopping = asyncio.Event()
        self._waiting: list[tuple[Msg, Received]] = []
        self._rows = self._bytes = 0
        self._since = 0.0
        """When the first of these batches came."""
        self._complained = -_COMPLAIN

    def stop(self) -> None:
        """Write what is here, then end."""
        self._stopping.set()

    async def run(self) -> None:
        """Connect and collect, again and again."""
        failures = 0
        complained = ""
        while not self._stopping.is_set():
            try:
                client = await bus.connect(self._server, "collector", self._told)
            except Error as error:
                if str(error) != complained:
                    log.warning("%s", complained := str(error))
                failures += 1
                await self._wait(bus.backoff(failures))
                continue
            complained, begun = "", time.monotonic()
            log.info("connected")
            try:
                jetstream = client.jetstream(timeout=20.0)
                await bus.ensure_stream(jetstream, self._replicas)
                await self._collect(jetstream)
            except bus.FAILURES as error:
                failures = bus.one_more(failures, begun)
                log.warning("the server: %s", bus.words(error))
            finally:
                self._forget()
                with contextlib.suppress(*bus.FAILURES):
                    await client.close()
            if failures:
                await self._wait(bus.backoff(failures))

    async def _told(self, error: Exception) -> None:
        log.debug("the server: %s", error)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _collect(self, jetstream: JetStreamContext) -> None:
        asked = await jetstream.pull_subscribe_bind(CONSUMER, STREAM)
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                messages = await asked.fetch(_FETCH, timeout=_POLL)
            except TimeoutError:  # nats-py's own, or asyncio's where it was late itself
                messages = []
            if messages and not self._waiting:
                self._since = begun
            for message in messages:
                await self._take(message)
                if self._bytes >= _MOST_BYTES:
                    await self._write()
            if self._is_due():
                await self._write()
        await self._write()

    async def _take(self, message: Msg) -> None:
        try:
            batch = wire.decode(message.data)
            kind, _, host = message.subject.partition(".")
            if wire.KINDS[batch.kind] != kind or len(host) > 253:
                raise wire.MalformedBatch(
                    f"a batch of {wire.KINDS[batch.kind]} on {message.subject}"
                )
        except wire.MalformedBatch as error:
            self.malformed += 1
            if time.monotonic() - self._complained > _COMPLAIN:
                self._complained = time.monotonic()
                log.warning("%s: %s (%d so far)", message.subject, error, self.malformed)
            await message.term()
            return
        self._waiting.append((message, Received(host, batch)))
        self._rows += len(batch)
        self._bytes += batch.size + len(message.data)

    def _is_due(self) -> bool:
        if not self._waiting:
            return False
        return (
            time.monotonic() - self._since >= self._interval
            or self._rows >= _MOST_ROWS
            or self._bytes >= _MOST_BYTES
            or len(self._waiting) >= _MOST_BATCHES
        )

    async def _write(self) -> None:
        """Try to write until it works. Server and hosts keep what is not acknowledged.

        If it takes too long, other collectors get these batches, and store them.
        """
        received = [one for _, one in self._waiting]
        complained = ""
        while received:
            if time.monotonic() - self._since > bus.ACK_WAIT / 2:
                log.warning("%d batches took too long; the server sends them again", len(received))
                self._forget()
                return
            try:
                for store in self._stores:
                    await asyncio.to_thread(store.write, received)
                break
            except Error as error:
                if str(error) != complained:
                    log.error("%s", complained := str(error))
                if self._stopping.is_set():
                    self._forget()
                    return
                await self._wait(_AGAIN)
        for message, _ in self._waiting:
            await message.ack()
        self.collected += self._rows
        self._forget()
        try:
            await asyncio.to_thread(self._tidy)
        except Error as error:
            log.error("%s", error)

    def _forget(self) -> None:
        self._waiting = []
        self._rows = self._bytes = 0
