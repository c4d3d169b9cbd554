# SPDX-License-Identifier: MIT
"""Engines without a kernel, for the benches of the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from nlproto.records import wire

BATCH = 124
PORTS = 28_232
"""Local ports that a machine gives its clients by default (net.ipv4.ip_local_port_range)."""


def make_batch(number: int, flow: np.ndarray, processes: int, seq: int, now: int) -> bytes:
    """A batch with a record of each of the TCP flows `flow`, as the module sends it."""
    random = np.random.default_rng(number)
    out = random.integers(0, 2, len(flow)) == 1
    records = np.zeros(len(flow), wire.RECORD)
    records["time_ns"] = now + number * 1_000_000 + np.arange(len(flow))
    records["tgid"] = 1_000_000 + flow % PORTS % processes
    records["start_ns"] = 7
    records["uid"] = 1000
    records["how"] = wire.lib.SNIFFER_HOW_SOCKET
    records["family"], records["proto"] = 2, 6
    records["dir"] = np.where(out, wire.lib.SNIFFER_DIR_OUT, wire.lib.SNIFFER_DIR_IN)
    records["len"], records["hdr_len"], records["gso_segs"] = 1200, 52, 1
    records["netns"], records["comm"] = 4026531840, b"bench"
    records["cpu"] = number % 4
    records["tcp_flags"] = 16  # ACK
    port = 32768 + flow % PORTS
    records["sport"] = np.where(out, port, 443)
    records["dport"] = np.where(out, 443, port)
    records["saddr"][:, 3] = np.where(out, 1, flow // PORTS)
    records["daddr"][:, 3] = np.where(out, flow // PORTS, 1)
    head = np.zeros(1, wire.BATCH)[0]
    head["cpu"], head["instance"], head["record_seq"] = number % 4, 1, seq
    head["packets"] = seq + len(flow)
    head["mono_ns"] = now + number * 1_000_000 + 1000
    head["real_ns"] = head["mono_ns"] + 10**18
    return wire.encode_batch(head, records)


def make_batches(flows: int, processes: int = 200) -> Iterator[bytes]:
    """A record of each of `flows` flows, a new one each, over four CPUs."""
    sequences = [0] * 4
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    for number, first in enumerate(range(0, flows, BATCH)):
        flow = np.arange(first, min(first + BATCH, flows))
        yield make_batch(number, flow, processes, sequences[number % 4], now)
        sequences[number % 4] += len(flow)


class Piped:
    """An engine that reads batches, each behind its length, from a file; then it is silent."""

    name = "module"
    instance = 1
    group = "packets"
    awaited: Callable[[], bool]

    def __init__(self, file: BinaryIO) -> None:
        self.opening = self.closing = np.zeros(0, wire.TAIL)
        self._file = file

    def __enter__(self) -> Piped:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, timeout: float) -> Iterator[Any]:
        size = self._file.read(4)
        if not size:
            time.sleep(min(timeout, 0.1))
            return
        yield wire.decode_batch(self._file.read(int.from_bytes(size, "little")))

    def wake(self) -> None:
        pass

    def want_packets(self, wanted: bool) -> None:
        pass

    def catch_up(self) -> Iterator[Any]:
        return iter(())

    def begin(self) -> int:
        return 0

    def finish(self, until_ns: int | None = None) -> Iterator[Any]:
        return iter(())

    def want_first_bytes(self, wanted: bool) -> bool:
        return False

    def stats(self) -> dict[str, object]:
        return {}
