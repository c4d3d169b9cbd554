# SPDX-License-Identifier: MIT
"""What engine packet counts without making a record of it, and what it says when it loses."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nlproto.engines.packet import PacketEngine
from nlproto.pipeline.account import Account
from nlproto.pipeline.pipeline import Pipeline
from nlproto.tables.processes import Processes
from waiting import stand_in

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")


def finished(engine: Any) -> Iterator[Any]:
    account = Account()
    account.open(engine.opening, engine.instance)
    yield account
    for batch in engine.finish():
        account.add(batch.head, batch.records)
        account.deliver(batch.records["how"])
    account.close(engine.closing)
    assert account.closes(), account.as_dict()


def test_other_protocols_are_seen_and_skipped() -> None:
    with PacketEngine(pytest.fail, everywhere=False) as engine:
        closing = finished(engine)
        account = next(closing)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as other:  # RFC 3692
            for _ in range(10):
                other.sendto(struct.pack("!I", 1), ("127.0.0.1", 0))
        next(closing, None)
    assert account.skipped >= 20  # out and in
    assert account.packets == account.recorded + account.skipped


def test_a_full_ring_is_told_once_with_the_way_out() -> None:
    told: list[Any] = []
    with (
        PacketEngine(told.append, ring_bytes=1 << 18, everywhere=False) as engine,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        closing = finished(engine)
        account = next(closing)
        sender.bind(("127.0.0.1", 0))
        for _ in range(3):
            for _ in range(1000):
                sender.sendto(b"x", sender.getsockname())
                sender.recv(10)
            list(engine.read(0))
        next(closing, None)
    assert account.lost["socket"] > 0
    assert [note for note in told if "-B" in note] == told
    assert len(told) == 1


class Slow(PacketEngine):
    """On a machine where each look into the ring takes its time."""

    def _read_place(self, place: Any, *how: Any) -> Any:
        time.sleep(0.05)
        return super()._read_place(place, *how)


def test_a_barrier_covers_all_that_the_ring_held_however_long_it_takes() -> None:
    sent, got, seen, passed = 9_000, [], [], threading.Event()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        port = receiver.getsockname()[1]
        engine = Slow(pytest.fail, everywhere=False)
        pipeline = Pipeline(engine, account=Account(), processes=Processes())
        pipeline.subscribe(lambda batch: got.append((batch.records["dport"] == port).sum()))

        def ask() -> None:
            seen.append(
                (sum(got), stand_in(pipeline.account.as_dict(settled=True)["lost"])["socket"])
            )
            passed.set()

        for _ in range(sent):
            sender.sendto(b"x", receiver.getsockname())
        pipeline.barrier(ask)
        with pipeline:
            assert passed.wait(120)
    ((records, lost),) = seen
    assert records + lost >= 2 * sent  # out and in
    assert records == 2 * sent or lost
