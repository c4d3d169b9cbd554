# SPDX-License-Identifier: MIT
"""The exporter: makes batches of the source's flows, spools them, and sends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial

import msgspec
import numpy as np
from nats.js import JetStreamContext

import nlproto
from fleet import bus, wire
from fleet.export.deltas import rows_of
from fleet.export.source import FlowSource
from fleet.export.spool import Make, Pending, Spool, SpoolFull
from fleet.options import FleetServer
from fleet.subjects import STREAM
from nlproto._host import lib as host
from nlproto.errors import Error

__all__ = ["Exporter", "boot_id"]

FLOWS_IN_BATCH = 4000
PROCESSES_IN_BATCH = 100
MAX_PAYLOAD = 512 << 10
"""The most bytes of a batch; the server's own limit is 1 MiB."""
HOUR_NS = 3600 * 10**9
_EARLY = 50_000
"""With more flows it does not wait for the end of the interval."""
_MOST = 200_000
"""The most flows kept in memory while the disk takes nothing."""
_KEPT = 16 << 20
"""Bytes of memory that one flush leaves for the next. New pages cost a third of a flush."""
_AT_ONCE = 64  # batches
_TIMEOUT = 10.0  # s for an acknowledgement
_ACCOUNT = 60.0  # s, as in fleet.schema, which needs pyarrow; exporters do not need it
_LAST = 3.0  # s to send the rest at the end

log = logging.getLogger(__name__)


def boot_id() -> bytes:
    """Return the kernel's id of this boot, 16 bytes."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return uuid.UUID(file.read().strip()).bytes


class Exporter:
    """Runs until stop(). `host`: end of its subjects; `interval`: seconds between batches."""

    def __init__(
        self, source: FlowSource, spool: Spool, server: FleetServer, host: str, interval: float
    ) -> None:
        self._source = source
        self._spool = spool
        self._server = server
        self._host = host
        self._interval = interval
        self._boot = boot_id()
        self._stopping = asyncio.Event()
        self._filled = asyncio.Event()
        self._full = False
        self._refused = ""
        self._accounts = time.time_ns() // 10**6 << 20
        """The number of the last account. It differs from every batch's, and is new each time."""

    def stop(self) -> None:
        """End. What waits is spooled, and sent if the server takes it at once."""
        self._stopping.set()

    async def run(self) -> None:
        """Export. Raises Error if the daemon refuses us."""
        host.host_one_heap()
        host.host_keep_heap(_KEPT)
        sending = asyncio.create_task(self._send_on())
        try:
            # hosts begin at different moments
            due = time.monotonic() + self._interval * random.uniform(0.1, 1.0)
            while not self._stopping.is_set():
                await self._wait(min(1.0, max(0.0, due - time.monotonic())))
                if self._source.failure is not None:
                    raise self._source.failure
                if time.monotonic() >= due or self._holds_many():
                    due = time.monotonic() + self._interval
                    self.flush()
            await asyncio.to_thread(self._source.__exit__, None, None, None)
            self.flush()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(sending, _LAST)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _holds_many(self) -> bool:
        with self._source.lock:
            return not self._full and len(self._source.deltas) > _EARLY

    # Into the spool

    def flush(self) -> None:
        """Put what waits into the spool. The rest waits on, or is lost and counted."""
        source, spool = self._source, self._spool
        with source.lock:
            # first packets wait for who accepts the connection, but not at the end
            flows = source.deltas.take(None if self._stopping.is_set() else time.time_ns())
            processes = source.due(flows, time.time_ns() // HOUR_NS)
            names = source.deltas.names_of(np.unique(flows["domain"]))
            spool.unsaved_gap_ms += source.gap_ms
            source.gap_ms = 0
        makers = [*self._processes(processes), *self._flows(rows_of(flows), names)]
        try:
            spool.put(makers)
        except SpoolFull as error:
            if not self._full:
                log.error("%s", error)
            self._full = True
            lost = max(0, len(flows) - _MOST)
            spool.unsaved_lost += lost
            with source.lock:
                source.deltas.give_back(flows[lost:])
                source.untold(processes)
            return
        if self._full:
            log.info("%s takes batches again", spool.path)
        self._full = False
        self._filled.set()

    def _flows(self, rows: np.ndarray, names: dict[int, str]) -> Iterator[Make]:
        for at in range(0, len(rows), FLOWS_IN_BATCH):
            yield from self._flow_batches(rows[at : at + FLOWS_IN_BATCH], names)

    def _flow_batches(self, rows: np.ndarray, names: dict[int, str]) -> Iterator[Make]:
        wanted = set(rows["domain"].tolist()) if names else set()
        known = {number: names[number] for number in wanted if number in names}
        if sum(map(len, known.values())) > MAX_PAYLOAD // 4 and len(rows) > 1:
            middle = len(rows) // 2
            yield from self._flow_batches(rows[:middle], names)
            yield from self._flow_batches(rows[middle:], names)
            return

        def make(sequence: int) -> Pending:
            payload = wire.encode_flows(self._boot, sequence, rows, known)
            return Pending(sequence, wire.FLOWS, len(rows), payload)

        yield make

    def _processes(self, told: Sequence[wire.ToldProcess]) -> Iterator[Make]:
        batch: list[wire.ToldProcess] = []
        size = 0
        for one in told:
            length = len(msgspec.json.encode(one))
            if batch and (len(batch) == PROCESSES_IN_BATCH or size + length > MAX_PAYLOAD):
                yield partial(self._process_batch, batch)
                batch, size = [], 0
            batch.append(one)
            size += length
        if batch:
            yield partial(self._process_batch, batch)

    def _process_batch(self, told: Sequence[wire.ToldProcess], sequence: int) -> Pending:
        return Pending(sequence, wire.PROCS, 0, wire.encode(wire.PROCS, self._boot, sequence, told))

    # To the server

    async def _send_on(self) -> None:
        """Connect and send, again and again."""
        failures = 0
        complained = ""
        while True:
            try:
                client = await bus.connect(self._server, self._host, self._told)
            except Error as error:
                if str(error) != complained:
                    log.warning("%s", complained := str(error))
                failures += 1
                if self._stopping.is_set():
                    return
                await self._wait(bus.backoff(failures))
                continue
            complained = self._refused = ""
            begun = time.monotonic()
            log.info("connected as %s", self._host)
            try:
                if await self._send(client.jetstream(timeout=_TIMEOUT)):
                    return
            except bus.FAILURES as error:
                failures = bus.one_more(failures, begun)
                log.warning("the server: %s", self._refused or bus.words(error))
            finally:
                with contextlib.suppress(*bus.FAILURES):
                    await client.close()
            if self._stopping.is_set():
                return
            await self._wait(bus.backoff(failures))

    async def _told(self, error: Exception) -> None:
        self._refused = str(error) or type(error).__name__

    async def _send(self, jetstream: JetStreamContext) -> bool:
        """Send what is spooled, and what comes; return True if all is sent and no more comes."""
        accounted = -math.inf
        every = min(_ACCOUNT, 6 * self._interval)
        while True:
            self._filled.clear()
            batches = self._spool.oldest(_AT_ONCE)
            if batches:
                await self._publish(jetstream, batches)
            if len(batches) < _AT_ONCE:
                stopping = self._stopping.is_set()
                if stopping or time.monotonic() - accounted >= every:
                    accounted = time.monotonic()
                    await self._tell_account(jetstream)
                if stopping and not self._filled.is_set():
                    return True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._filled.wait(), min(1.0, self._interval))

    async def _publish(self, jetstream: JetStreamContext, batches: Sequence[Pending]) -> None:
        """Raise the first failure, after the successful ones are acknowledged."""
        results = await asyncio.gather(
            *(self._publish_one(jetstream, batch) for batch in batches), return_exceptions=True
        )
        done = [one.sequence for one, result in zip(batches, results, strict=True) if not result]
        if done and not self._spool.acknowledge(done):
            log.warning("%s accepts nothing; batches will be sent again", self._spool.path)
            await asyncio.sleep(1.0)
        for result in results:
            if result is not None:
                raise result

    async def _publish_one(self, jetstream: JetStreamContext, batch: Pending) -> None:
        boot, sequence = wire.sequence_of(batch.payload)
        await jetstream.publish(
            f"{wire.KINDS[batch.kind]}.{self._host}",
            batch.payload,
            stream=STREAM,
            headers={"Nats-Msg-Id": f"{self._host}-{boot}-{batch.kind}-{sequence}"},
        )

    async def _tell_account(self, jetstream: JetStreamContext) -> None:
        totals, source = self._spool.totals(), self._source
        with source.lock:
            told = wire.ToldAccount(
                at_ns=time.time_ns(),
                exported=totals.exported,
                acknowledged=totals.acknowledged,
                spooled=totals.spooled,
                lost=totals.lost,
                received=source.received,
                dropped=source.dropped,
                delivered=source.account.get("delivered"),
                daemon_lost=sum(source.account.get("lost", {}).values()),
                gap_ms=totals.gap_ms + source.gap_ms,
                version=nlproto.__version__,
                engine=source.engine,
            )
        self._accounts += 1
        payload = wire.encode(wire.ACCOUNT, self._boot, self._accounts, [told])
        await self._publish_one(jetstream, Pending(self._accounts, wire.ACCOUNT, 0, payload))
