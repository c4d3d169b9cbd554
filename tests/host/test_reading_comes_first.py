# SPDX-License-Identifier: MIT
"""Engine packet empties its ring before it looks anybody up, and ends lookups if others wait."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet import PacketEngine
from nlproto.records import wire
from nlproto.records.wire import Batch, FirstBytesBatch, lib
from waiting import stand_in

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")

FLOWS = 400
LOOKUP_NS = 5_000_000  # what each costs by the engine's clock


class Place:
    """An engine of one network namespace, whose clock goes on by its lookups alone."""

    def __init__(self) -> None:
        self.spent_ns, self.looked_up = 0, 0
        began_ns = time.monotonic_ns()
        self.engine = PacketEngine(
            pytest.fail, everywhere=False, now_ns=lambda: began_ns + self.spent_ns
        )
        (self.place,) = self.engine._places.values()
        names = stand_in(self.place.names)
        real = names._sockets.find

        def find(one: Any) -> Any:
            self.spent_ns += LOOKUP_NS
            self.looked_up += 1
            return real(one)

        names._sockets.find = find


def count(events: Iterable[Batch | FirstBytesBatch]) -> int:
    return sum(one.count for one in events if isinstance(one, Batch))


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    with made.engine:
        yield made


@pytest.fixture
def send() -> Iterator[Callable[[int], None]]:
    """Sends so many packets, each of another flow."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))

        def sends(count: int) -> None:
            for number in range(count):
                to = f"127.1.{number >> 8}.{number & 255}"
                sender.sendto(b"x", (to, receiver.getsockname()[1]))

        yield sends


def test_all_packets_are_out_of_the_ring_before_the_first_lookup(
    place: Place, send: Callable[[int], None]
) -> None:
    """Meanwhile others come, and a ring without room loses them."""
    waited: list[int] = []
    names = stand_in(place.place.names)
    real = names.name

    def name(*arguments: Any) -> Any:
        waited.append(place.place.capture.waiting())
        return real(*arguments)

    names.name = name
    send(3000)
    place.engine.awaited = lambda: True
    assert count(place.engine.read(0)) >= 6000  # out and in
    assert waited[0] < 1024  # others use this machine too


@pytest.mark.parametrize(("waits", "most"), [(True, 20), (False, 1000)])
def test_lookups_end_soon_if_somebody_waits(
    place: Place, send: Callable[[int], None], waits: bool, most: int
) -> None:
    place.engine.awaited = lambda: waits
    send(FLOWS)
    records = count(place.engine.read(0))
    assert records >= 2 * FLOWS
    assert place.looked_up <= most
    assert waits or place.looked_up > 100


def test_a_ring_that_fills_counts_as_somebody_who_waits(
    place: Place, send: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    send(FLOWS)
    ring = place.place.capture
    assert not ring.fills
    monkeypatch.setattr("nlproto.engines.ring._FILLS", ring._ring.count // FLOWS)
    assert ring.fills  # by the frames that the kernel has filled
    monkeypatch.setattr(type(ring), "fills", True)
    list(place.engine.read(0))
    assert place.looked_up <= 20


def test_catching_up_looks_up_for_a_moment_alone(place: Place, send: Callable[[int], None]) -> None:
    """Who subscribes or stops waits for it."""
    send(FLOWS)
    records = count(place.engine.catch_up())
    assert records >= 2 * FLOWS
    assert place.looked_up <= 50


def test_a_read_of_many_copies_becomes_several_batches(
    place: Place, send: Callable[[int], None]
) -> None:
    """A batch counts in 16 bits. Copies of a multicast packet may be more in one read."""
    names = stand_in(place.place.names)
    real = names.name
    names.name = lambda *arguments: np.repeat(real(*arguments), 300)
    send(250)
    batches = [one for one in place.engine.read(0) if isinstance(one, Batch)]
    records = np.concatenate([one.records for one in batches])
    assert len(records) >= 2 * 250 * 300 and [one.count for one in batches] == [
        len(one.records) for one in batches
    ]
    first = int(batches[0].head["record_seq"])
    assert records["seq"].tolist() == list(range(first, first + len(records)))


def test_a_packet_for_any_number_of_sockets_is_recorded_for_some(place: Place) -> None:
    """A user who opens thousands on one port would take the daemon's memory."""
    group = "239.7.7.7"
    with contextlib.ExitStack() as opened:
        port = 0
        for _ in range(100):
            one = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((group, port))
            port = one.getsockname()[1]
        records = np.zeros(1, wire.RECORD)
        records["family"], records["proto"] = socket.AF_INET, socket.IPPROTO_UDP
        records["dir"], records["time_ns"] = lib.SNIFFER_DIR_IN, time.monotonic_ns()
        records["daddr"][0, :4] = list(socket.inet_aton(group))
        records["sport"], records["dport"] = 9, port
        found = place.place.names.name(records, np.ones(1, bool))
    assert len(found) == 64 and np.count_nonzero(found["flags"] & lib.SNIFFER_F_COPY) == 63
    assert np.all(found["flags"] & lib.SNIFFER_F_AMBIGUOUS)
    assert set(found["tgid"].tolist()) == {os.getpid()}
