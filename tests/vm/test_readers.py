# SPDX-License-Identifier: MIT
"""Readers of the module that do not get along with each other."""

from __future__ import annotations

import os
import socket
from contextlib import closing

from nlproto.engines.module import ModuleEngine
from nlproto.kernel.netlink import Sniffer
from nlproto.records.wire import Batch

SOL_NETLINK, NETLINK_BROADCAST_ERROR = 270, 4
DATAGRAMS = 3000


def _starve(engine: ModuleEngine) -> None:
    """Give a reader that does not read room for a few batches, and let the sender hear of it."""
    with socket.socket(fileno=os.dup(engine._listener.fileno())) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        listener.setsockopt(SOL_NETLINK, NETLINK_BROADCAST_ERROR, 1)


def test_what_one_reader_has_no_room_for_is_not_lost_to_the_other(loaded: None) -> None:
    with (
        Sniffer() as sniffer,
        ModuleEngine(("packets",)) as full,
        ModuleEngine(("packets",)) as other,
        closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sink,
        closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender,
    ):
        _starve(full)
        before = sniffer.counters()
        sink.bind(("127.0.0.1", 0))
        got = 0
        for number in range(DATAGRAMS):
            sender.sendto(b"x", sink.getsockname())
            if number % 100 == 0:
                got += sum(len(b.records) for b in other.read(0) if isinstance(b, Batch))
        got += sum(len(b.records) for b in other.finish() if isinstance(b, Batch))
        after = sniffer.counters()
    assert got >= 2 * DATAGRAMS
    assert int(after["lost_batch"]) == int(before["lost_batch"])
    assert int(after["sent"]) - int(before["sent"]) >= got
