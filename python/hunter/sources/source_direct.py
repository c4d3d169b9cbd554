# SPDX-License-Identifier: MIT
"""Packets from an engine in this process, owners from the daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from hunter.show.columns import Holder
from hunter.sources.source_alone import PATIENCE, PipelineSource
from hunter.sources.source_daemon import OwnerQuestions
from nlproto import Error
from nlproto.client.client import DaemonClient
from nlproto.engines.engine import open_engine
from nlproto.filters.filter import Filter
from nlproto.host.kernel_sockets import Endpoint
from nlproto.pipeline.account import Account
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.records.wire import address_text
from nlproto.tables.processes import Process, Processes

__all__ = ["DaemonNames", "DirectSource", "open_direct"]

_DAEMON_LAG_S = 0.06  # from a packet to its entry in the daemon's port map, at rest
_ASK_AGAIN_S = 1.0
_MAX_UNKNOWN = 65536


class DaemonNames:
    """Names records that the engine could not name, by asking the daemon a batch at a time.

    For the pipeline's worker thread. If the daemon does not know an end, it is asked once more.
    Until then it has had time to see the same packets. Then it is not asked for a second. If
    the daemon goes away, `lost` is called once, and records stay as they are.
    """

    def __init__(self, client: DaemonClient, lost: Callable[[str], None]) -> None:
        self._client: DaemonClient | None = client
        self._lost = lost
        self._lock = threading.Lock()
        self._unknown: dict[Endpoint, float] = {}

    def name(self, records: np.ndarray) -> None:
        """Fill in owner and `how` of unnamed records that a process may own."""
        local = records["dir"] != wire.lib.SNIFFER_DIR_FWD
        keys: dict[Endpoint, list[int]] = {}
        for row in np.flatnonzero(local & np.isin(records["how"], _ASKABLE)).tolist():
            keys.setdefault(_local_end(records[row]), []).append(row)
        now = time.monotonic()
        wanted = [key for key in keys if self._unknown.get(key, 0.0) <= now]
        for pause in (0.0, _DAEMON_LAG_S):
            if not wanted or self._client is None:
                return
            time.sleep(pause)
            answers = self._ask([_question(key) for key in wanted])
            missing = []
            for key, owner in zip(wanted, answers, strict=False):
                if owner is None:
                    missing.append(key)
                else:
                    _fill(records, keys[key], owner)
            wanted = missing
        if len(self._unknown) > _MAX_UNKNOWN:
            self._unknown.clear()
        self._unknown.update(dict.fromkeys(wanted, now + _ASK_AGAIN_S))

    def details(self, pid: int, start_ns: int) -> Process | None:
        """Return what the daemon knows of a process."""
        (answer,) = self._ask([{"tgid": pid, "start_ns": start_ns}]) or [None]
        return msgspec.convert(answer["process"], Process) if answer else None

    def _ask(self, keys: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
        answers: list[dict[str, Any] | None] = []
        with self._lock:
            try:
                for at in range(0, len(keys), 1000):
                    if self._client is None:
                        return []
                    answers += self._client.lookup(keys[at : at + 1000])
            except Error as error:
                self._client = None
                self._lost(f"owners are not asked any more: {error}")
                return []
        return answers

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None


def _fill(records: np.ndarray, rows: list[int], owner: dict[str, Any]) -> None:
    records["tgid"][rows] = owner["pid"]
    records["start_ns"][rows] = owner["start_ns"]
    records["uid"][rows] = owner["uid"]
    records["comm"][rows] = owner["comm"].encode()[: wire.lib.SNIFFER_COMM_LEN]
    records["how"][rows] = wire.lib.SNIFFER_HOW_DIAG
    if len({holder["pid"] for holder in owner["holders"]}) > 1:
        records["flags"][rows] |= wire.lib.SNIFFER_F_SHARED


_ASKABLE = np.array(
    [
        wire.lib.SNIFFER_HOW_PREDATES,
        wire.lib.SNIFFER_HOW_NOT_PROBED,
        wire.lib.SNIFFER_HOW_TABLE_FULL,
    ]
)


def _local_end(record: np.void) -> Endpoint:
    end = "d" if record["dir"] == wire.lib.SNIFFER_DIR_IN else "s"
    return (
        int(record["netns"]),
        int(record["proto"]),
        int(record["family"]),
        record[f"{end}addr"].tobytes(),
        int(record[f"{end}port"]),
    )


def _question(key: Endpoint) -> dict[str, Any]:
    netns, proto, family, address, port = key
    return {
        "netns": netns,
        "proto": wire.PROTO_NAMES[proto],
        "address": address_text(family, address),
        "port": port,
    }


class DirectSource(PipelineSource):
    """A pipeline whose names come from the daemon."""

    def __init__(
        self,
        pipeline: Pipeline,
        filter: Filter,
        first_bytes: bool,
        names: DaemonNames,
        questions: OwnerQuestions,
    ) -> None:
        super().__init__(pipeline, filter, first_bytes)
        self.description += ", owners from the daemon"
        self._names = names
        self._questions = questions

    def __exit__(self, kind: object = None, *exc: object) -> None:
        try:
            super().__exit__(kind, *exc)
        finally:
            self._names.close()
            self._questions.close()

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return self._questions.holders(cookies)


def open_direct(
    engine: str,
    socket: str,
    filter: Filter,
    notify: Callable[[str], None],
    first_bytes: bool = False,
    ring_bytes: int | None = None,
) -> DirectSource:
    """Return a source with an own engine. Raises NoDaemon, NoModule, NoPrivilege, Error."""
    names = DaemonNames(DaemonClient(socket), notify)
    try:
        sources: list[DirectSource] = []
        pipeline = Pipeline(
            open_engine(engine, notify, ring_bytes=ring_bytes),
            account=Account(),
            processes=Processes(names.details),
            namer=names,
            on_failure=lambda error: sources[0].failed(error),
            on_death=lambda error: sources[0].failed(error),
            patience=PATIENCE,
        )
    except BaseException:
        names.close()
        raise
    sources.append(DirectSource(pipeline, filter, first_bytes, names, OwnerQuestions(socket)))
    return sources[0]
