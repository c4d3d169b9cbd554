# SPDX-License-Identifier: MIT
"""Packets from a pipeline in this process."""

from __future__ import annotations

import queue
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from hunter.show.columns import Holder
from nlproto import Error, NoPrivilege
from nlproto.engines.engine import open_engine
from nlproto.filters.filter import Filter
from nlproto.host import procfs
from nlproto.host.containers import ContainerFiles
from nlproto.overheard.listening import Overheard
from nlproto.pipeline.account import Account
from nlproto.pipeline.naming import Namer
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records.batch import NamedBatch
from nlproto.records.ends import Ends
from nlproto.running.commands import as_root
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Process, Processes

__all__ = ["PATIENCE", "PipelineSource", "open_alone"]

PATIENCE = 5.0  # s of nothing but failures: somebody waits for packets, and wants to know
_BATCHES = 64  # that may wait for the reader; beyond them the pipeline's own queue fills


class PipelineSource:
    """Takes what `pipeline` delivers. A slow reader shows as loss in the pipeline's queue."""

    def __init__(
        self,
        pipeline: Pipeline,
        filter: Filter,
        first_bytes: bool,
        overheard: Overheard | None = None,
    ) -> None:
        self.description = f"engine {pipeline.engine.name}"
        self.ends: Ends = pipeline.processes.ends
        self._overheard: AbstractContextManager[object] = overheard or nullcontext()
        self._pipeline = pipeline
        self._filter = filter
        self._inbox: queue.Queue[NamedBatch | None] = queue.Queue(_BATCHES)
        self._failure: Error | None = None
        self._left = False
        self._stopper: threading.Thread | None = None
        self.first_bytes = (
            pipeline.first_bytes if first_bytes and pipeline.want_first_bytes(True) else None
        )
        pipeline.subscribe(self._take)

    def __enter__(self) -> Self:
        self._overheard.__enter__()
        self._pipeline.__enter__()
        return self

    def __exit__(self, kind: object = None, *exc: object) -> None:
        """Raise Error if all else went well, but this program lost records by its own fault."""
        self._left = True
        if self._stopper is None:
            self.finish()
        self._pipeline.engine.__exit__(None, None, None)
        self._overheard.__exit__(None, None, None)
        lost = self._pipeline.account.lost["failed"]
        if lost and kind is None:
            raise Error(f"{lost} records were lost by a fault of this program: please report it")

    def failed(self, error: Error) -> None:
        """Remember why nothing more comes; for the pipeline's on_failure and on_death."""
        self._failure = self._failure or error

    def _take(self, batch: NamedBatch) -> None:
        mask = self._filter.mask(batch.records, self._pipeline.processes)
        if mask.all():
            self._inbox.put(batch)
        elif mask.any():
            self._inbox.put(NamedBatch(batch.head, batch.records[mask], batch.clock))

    def read(self, timeout: float) -> list[NamedBatch] | None:
        if self._failure is not None and self._inbox.empty():
            raise self._failure
        batches = []
        try:
            batches.append(self._inbox.get(timeout=timeout))
            while True:
                batches.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        return [batch for batch in batches if batch is not None]

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        self._filter = filter
        return []

    def finish(self) -> list[NamedBatch]:
        self._stopper = threading.Thread(target=self._stop, name="stopper")
        self._stopper.start()
        batches: list[NamedBatch] = []
        while (batch := self._inbox.get()) is not None:
            if not self._left:
                batches.append(batch)
        self._stopper.join()
        return batches

    def _stop(self) -> None:
        try:
            self._pipeline.stop()
        finally:
            self._inbox.put(None)

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        return self._pipeline.processes.get(tgid, start_ns)

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        portmap = self._pipeline.portmap
        if portmap is None:
            return {}
        found: dict[int, list[Holder]] = {}
        for cookie, holding in portmap.with_cookies(cookies).items():
            owners = {owner.tgid: owner.comm for owner in holding}
            found[cookie] = [{"pid": pid, "comm": comm} for pid, comm in owners.items()]
        return found

    def account(self) -> Mapping[str, Any]:
        with self._pipeline.account_lock:
            return self._pipeline.account.as_dict()

    def lost(self) -> int:
        return 0


def open_alone(
    engine: str,
    filter: Filter,
    notify: Callable[[str], None],
    first_bytes: bool = False,
    ring_bytes: int | None = None,
    domains: str = "dns",
) -> PipelineSource:
    """Return a source with an engine of its own; `first_bytes`: with the first bytes of packets.
    `domains`: where names of far ends come from, "dns", "sni" or "off".

    Raises Error, NoPrivilege with the way out."""
    try:
        opened = open_engine(engine, notify, ring_bytes=ring_bytes)
    except NoPrivilege as error:
        again = " ".join([as_root("packet-hunter"), *map(shlex.quote, sys.argv[1:])])
        raise NoPrivilege(f"{str(error).partition(':')[0]}: {again}") from None
    processes = Processes(procfs.details, containers=ContainerFiles())
    overheard = Overheard(notify, domains)
    processes.ends = overheard.ends
    sources: list[PipelineSource] = []
    pipeline = Pipeline(
        opened,
        account=Account(),
        processes=processes,
        namer=Namer(),
        portmap=PortMap(),
        on_failure=lambda error: sources[0].failed(error),
        on_death=lambda error: sources[0].failed(error),
        patience=PATIENCE,
        overheard=overheard,
    )
    sources.append(PipelineSource(pipeline, filter, first_bytes, overheard))
    return sources[0]
