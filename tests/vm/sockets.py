# SPDX-License-Identifier: MIT
"""Sockets of a test in the guest, and what the module tells while it uses them."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from nlproto.engines.module import ModuleEngine
from nlproto.kernel.netlink import Sniffer
from nlproto.records import wire
from nlproto.records.process_event import ProcessEvent
from nlproto.records.wire import Batch, FirstBytesBatch, lib
from waiting import patient

__all__ = [
    "LOOPBACK",
    "Seen",
    "cookie_of",
    "insert",
    "known_socket",
    "listening",
    "reasons",
    "receivers",
    "send",
    "udp_receiver",
]

LOOPBACK = "127.0.0.1"


def insert(module_file: Path, *parameters: str) -> None:
    subprocess.run(["insmod", str(module_file), *parameters], check=True)


class Seen:
    """What an engine delivered while a block ran."""

    def __init__(self) -> None:
        self.records = np.zeros(0, wire.RECORD)
        self.processes: list[ProcessEvent] = []
        self.first_bytes: list[wire.PacketBytes] = []

    def to_port(self, port: int, direction: int) -> np.ndarray:
        found: np.ndarray = self.records[self.records["dport"] == port]
        return np.asarray(found[found["dir"] == direction])


def known_socket(sniffer: Sniffer, cookie: int) -> tuple[np.void, np.ndarray]:
    """The socket that the module has to know."""
    found = sniffer.socket(cookie)
    assert found is not None
    return found


@contextmanager
def listening(*groups: str) -> Iterator[Seen]:
    seen = Seen()
    with ModuleEngine(groups or ("packets",)) as engine:
        yield seen
        time.sleep(patient(0.01))  # process events are sent by a work item
        parts = []
        # one by one: an event is a view that the next one overwrites
        for event in chain(engine.read(0.2), engine.finish()):
            if isinstance(event, Batch):
                parts.append(event.records.copy())
            elif isinstance(event, FirstBytesBatch):
                seen.first_bytes += [
                    wire.PacketBytes(one.head.copy(), one.data) for one in event.first_bytes
                ]
            elif isinstance(event, ProcessEvent):
                seen.processes.append(event)
        if parts:
            seen.records = np.concatenate(parts)


def udp_receiver() -> socket.socket:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((LOOPBACK, 0))
    return receiver


def cookie_of(sock: socket.socket) -> int:
    so_cookie = 57
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, so_cookie, 8))[0])


def reasons(records: np.ndarray) -> set[str]:
    return {wire.how_name(int(how)) for how in records["how"]}


def receivers(seen: Seen, port: int) -> set[tuple[int, int]]:
    """(process, user) that received at `port`."""
    records = seen.to_port(port, lib.SNIFFER_DIR_IN)
    return {(int(one["tgid"]), int(one["uid"])) for one in records}


def send(port: int, *datagrams: bytes) -> None:
    """Send to `port` from a socket that lives no longer; without `datagrams` one of a byte."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for data in datagrams or (b"x",):
            sender.sendto(data, (LOOPBACK, port))
