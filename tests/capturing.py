# SPDX-License-Identifier: MIT
"""Engine packet read by a thread; workers that tell their pid and ports."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import pytest

from nlproto.engines.packet import PacketEngine
from nlproto.host import procfs
from nlproto.pipeline.account import Account
from nlproto.records import wire
from nlproto.records.process_event import Event
from waiting import until

IN, OUT, FWD = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_DIR_OUT, wire.lib.SNIFFER_DIR_FWD
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
families = pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])


class Run:
    """An engine read by a thread of its own, as programs do it."""

    def __init__(self, **options: Any) -> None:
        self.notes: list[str] = []
        self.engine = PacketEngine(self.notes.append, **options)
        self.account = Account()
        self.account.open(self.engine.opening, self.engine.instance)
        self.parts: list[wire.Batch] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _take(self, batch: Event) -> None:
        assert isinstance(batch, wire.Batch)
        copy = wire.decode_batch(wire.encode_batch(batch.head, batch.records))
        self.account.add(copy.head)
        self.account.deliver(copy.records["how"])
        self.parts.append(copy)

    def _read(self) -> None:
        while not self._stop.is_set():
            for batch in self.engine.read(0.05):
                self._take(batch)

    def stop(self) -> Self:
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            for batch in self.engine.finish():
                self._take(batch)
            self.account.close(self.engine.closing)
        return self

    def records(self, *ports: int) -> np.ndarray:
        """What was captured with one of `ports` at either end; nothing more is captured."""
        self.stop()
        return self._with(ports)

    def so_far(self, *ports: int) -> np.ndarray:
        """The same, and the capture goes on."""
        return self._with(ports)

    def wait(self, count: int, *ports: int, netns: int | None = None) -> None:
        """Until so many of them were captured and named, while their sockets are still there."""
        until(lambda: len(self._with(ports, netns)) >= count)

    def _with(self, ports: Sequence[int], netns: int | None = None) -> np.ndarray:
        parts = [part.records for part in self.parts]
        found = np.concatenate([np.zeros(0, wire.RECORD), *parts])
        if netns is not None:
            found = found[found["netns"] == netns]
        return np.asarray(found[np.isin(found["sport"], ports) | np.isin(found["dport"], ports)])


class StartRun(Protocol):
    """The fixture `run`: opens an engine with these options, and reads it."""

    def __call__(self, **options: Any) -> Run: ...


class StartWorker(Protocol):
    """The fixture `worker`: runs Python code, behind COMMON, in a process of its own."""

    def __call__(self, code: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]: ...


COMMON = """
import json, os, signal, socket, sys, threading, time
def loopback(family): return "127.0.0.1" if family == socket.AF_INET else "::1"
def tell(**facts): print(json.dumps({"pid": os.getpid(), **facts}), flush=True)
def stay(): sys.stdin.read()
"""


def facts(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, "the worker died"
    found: dict[str, Any] = json.loads(line)
    return found


def holds(pid: int, port: int) -> bool:
    """Whether it holds a TCP socket of that local port that is no listener."""
    inodes = procfs.socket_inodes(pid) or {}
    tables = procfs.tables()
    mine = tables[(tables["sport"] == port) & (tables["state"] != 10)]
    return any(int(inode) in inodes for inode in mine["inode"])


def owners(records: np.ndarray, direction: int | None = None) -> set[tuple[int, int | str]]:
    """{(direction, pid or the reason)}"""
    return {
        (int(one["dir"]), int(one["tgid"]) or wire.how_name(int(one["how"])))
        for one in records
        if direction in (None, int(one["dir"]))
    }
