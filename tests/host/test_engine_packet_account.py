# SPDX-License-Identifier: MIT
"""What engine packet counts without making a record of it, and what it says when it loses."""

import os
import socket
import struct

import pytest

from nlproto.engines.packet import PacketEngine
from nlproto.pipeline.account import Account

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")


def finished(engine):
    account = Account()
    account.open(engine.opening, engine.instance)
    yield account
    for batch in engine.finish():
        account.add(batch.head, batch.records)
        account.deliver(batch.records["how"])
    account.close(engine.closing)
    assert account.closes(), account.as_dict()


def test_other_protocols_are_seen_and_skipped():
    with PacketEngine(pytest.fail, everywhere=False) as engine:
        closing = finished(engine)
        account = next(closing)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as other:  # RFC 3692
            for _ in range(10):
                other.sendto(struct.pack("!I", 1), ("127.0.0.1", 0))
        next(closing, None)
    assert account.skipped >= 20  # out and in
    assert account.packets == account.recorded + account.skipped


def test_a_full_ring_is_told_once_with_the_way_out():
    told = []
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
