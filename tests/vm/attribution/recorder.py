# SPDX-License-Identifier: MIT
"""Records everything an engine says while a scenario plays, and checks that its account closes."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from nlproto.engines.ebpf import EbpfEngine
from nlproto.engines.engine import Engine, open_engine
from nlproto.pipeline.account import Account
from nlproto.records.wire import RECORD, Batch, lib
from waiting import until

_EBPF: list[Engine] = []
"""Engine ebpf, kept from scenario to scenario as a loaded module is: loading takes a while."""


def _open(engine: str, notes: list[str]) -> Engine:
    if engine != "ebpf":
        return open_engine(engine, notes.append)
    if not _EBPF:
        _EBPF.append(open_engine(engine, notes.append).__enter__())
    for _ in _EBPF[0].read(0):
        pass
    _EBPF[0].begin()
    return _EBPF[0]


def forget_ebpf(recorder: Recorder | None) -> None:
    """Load engine ebpf again, as a module would be: what exists now is older than it."""
    for engine in _EBPF:
        engine.__exit__(None, None, None)
    _EBPF.clear()
    if recorder is not None:
        recorder.reopen()


class Recorder:
    """An open engine with all its records so far; a context manager.

    Records are copied as they come. Where the engine leaves names to its reader, they get them
    in user space, as in the daemon.
    """

    def __init__(self, engine: str) -> None:
        self.notes: list[str] = []
        self.engine: Engine = _open(engine, self.notes)
        self.account = Account()
        self.account.open(self.engine.opening, self.engine.instance)
        self._before = self._counters()
        self._chunks: list[np.ndarray] = []

    def __enter__(self) -> Recorder:
        self.engine.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.engine.name != "ebpf":
            self.engine.__exit__(*exc)

    def reopen(self) -> None:
        """Go on with a fresh engine ebpf."""
        self.engine = _open("ebpf", self.notes)
        self.account.open(self.engine.opening, self.engine.instance)

    def starve(self) -> None:
        """Make the module engine's receive buffer hold no more than a few batches."""
        if self.engine.name == "ebpf":  # its ring is too large to fill here
            return
        with socket.socket(fileno=os.dup(self.engine._listener.fileno())) as netlink:  # type: ignore[attr-defined]
            netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)

    def await_links(self, namespaces: set[int]) -> None:
        """Wait until each has its Netfilter links: before that, engine ebpf may miss packets."""
        if not isinstance(self.engine, EbpfEngine) or self.engine._links is None:
            return
        loaded, tells = self.engine._object, struct.pack("=I", 2)  # as in bpf/out.h
        for inode in namespaces:
            until(lambda: loaded.lookup("links", struct.pack("=I", inode), 4) == tells)  # noqa: B023

    def read(self, timeout: float) -> None:
        """Take what there is, waiting up to ``timeout`` seconds for the first."""
        self._take(self.engine.read(timeout))

    def finish(self) -> np.ndarray:
        """Flush, take the tail, and return all records in order of time."""
        self._take(self.engine.finish())
        self.account.close(self.engine.closing)
        records = np.concatenate(self._chunks) if self._chunks else np.zeros(0, RECORD)
        return records[np.argsort(records["time_ns"], kind="stable")]

    def _take(self, events: Iterable[object]) -> None:
        for event in events:
            if isinstance(event, Batch):
                records = event.records.copy()
                self.account.add(event.head, records)
                self.account.deliver(records["how"])
                self._chunks.append(records)

    def _counters(self) -> np.void | None:
        control = getattr(self.engine, "control", None)
        return control.counters().copy() if control is not None else None

    def faults(self, records: np.ndarray, lossy: bool) -> list[str]:
        """Every sum of the account that does not hold, one line each."""
        account, lines = self.account, []
        if not account.closes():
            lines.append(f"the account does not close: {account.as_dict()}")
        if account.delivered != len(records):
            lines.append(f"{account.delivered} delivered, but {len(records)} records received")
        if account.named + sum(account.unnamed.values()) != account.delivered:
            lines.append("delivered is not named + unnamed")
        lost = sum(account.lost.values())
        if lost and not lossy:
            lines.append(f"lost without need: {account.lost}")
        if lossy and not lost:
            lines.append("nothing was lost: the scenario did not force it")
        copies = int(np.count_nonzero(records["flags"] & lib.SNIFFER_F_COPY))
        if not lost and copies != account.copies:
            lines.append(f"{copies} records are marked as copies, {account.copies} by the account")
        lines += self._module_faults()
        return lines

    def _module_faults(self) -> list[str]:
        after = self._counters()
        if after is None or self._before is None:
            return []
        grown = {
            name: int(after[name]) - int(self._before[name])
            for name in after.dtype.names or ()
            if name != "by_how"
        }
        by_how = int(after["by_how"].sum()) - int(self._before["by_how"].sum())
        skipped = sum(n for name, n in grown.items() if name.startswith("skipped_"))
        # All CPUs are read one after another while packets pass. So sums may be out by the few
        # that pass meanwhile in the rest of the system; at rest in a test machine there are
        # none.
        lines = []
        if grown["packets"] != grown["recorded"] + skipped:
            lines.append(f"counters: packets is not recorded + skipped: {grown}")
        if grown["records"] != grown["recorded"] + grown["copies"]:
            lines.append(f"counters: records is not recorded + copies: {grown}")
        if by_how != grown["records"]:
            lines.append(f"counters: records {grown['records']} is not sum(by_how) {by_how}")
        return lines

    def summary(self) -> dict[str, Any]:
        """The account for JSON."""
        return {**self.account.as_dict(), "notes": self.notes, "pid": os.getpid()}
