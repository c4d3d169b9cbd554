# SPDX-License-Identifier: MIT
"""The module's configuration, its counters, and what a flush and the first bytes bring."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from commands import configure
from sockets import (
    LOOPBACK,
    insert,
    listening,
    send,
    udp_receiver,
)

from nlproto.engines.module import ModuleEngine
from nlproto.kernel.netlink import Sniffer
from nlproto.records import wire
from nlproto.records.wire import Batch, lib

pytestmark = pytest.mark.usefixtures("loopback_is_up")


@pytest.mark.parametrize(
    "change", [{"batch": 0}, {"batch": 253}, {"flush_ms": 0}, {"flush_ms": 1001}]
)
def test_a_configuration_out_of_range_is_refused(loaded: None, change: dict[str, int]) -> None:
    with Sniffer() as sniffer:
        before = sniffer.info().tobytes()
        with pytest.raises(Exception, match=os.strerror(errno.ERANGE)):
            configure(sniffer, **change)
        info, old = sniffer.info(), np.frombuffer(before, wire.INFO)[0]
        assert (info["batch"], info["flush_ms"]) == (old["batch"], old["flush_ms"])


def test_a_batch_of_one_sends_each_record_by_itself(module_file: Path, unloaded: None) -> None:
    insert(module_file)
    with Sniffer() as sniffer, closing(udp_receiver()) as receiver:
        configure(sniffer, batch=1, flush_ms=1000)
        with ModuleEngine(("packets",)) as engine:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(5):
                    sender.sendto(b"x", receiver.getsockname())
            heads = [int(b.head["count"]) for b in engine.finish() if isinstance(b, Batch)]
    assert len(heads) >= 10
    assert set(heads) == {1}


def test_counters_add_up_to_the_last_packet(module_file: Path, unloaded: None) -> None:
    insert(module_file)
    with Sniffer() as sniffer:
        with listening(), closing(udp_receiver()) as receiver:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for size in (1, 100, 40000):
                    sender.sendto(b"x" * size, receiver.getsockname())
            subprocess.run(["ping", "-c1", "-W1", LOOPBACK], check=False, capture_output=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            # who listens is asked for once in each jiffy
            while not int(sniffer.counters()["skipped_listener"]):
                sender.sendto(b"nobody listens", (LOOPBACK, 9))
        sniffer.flush()
        count = sniffer.counters()
    skipped = sum(
        int(count[name]) for name in count.dtype.names or () if name.startswith("skipped_")
    )
    assert int(count["skipped_other"]) > 0
    assert int(count["skipped_listener"]) > 0
    assert int(count["packets"]) == int(count["recorded"]) + skipped
    assert int(count["records"]) == int(count["recorded"]) + int(count["copies"])
    assert int(count["records"]) == int(count["by_how"].sum())
    assert int(count["records"]) == int(count["sent"] + count["lost_alloc"] + count["lost_batch"])


def test_flush_brings_the_tail_of_every_cpu(loaded: None) -> None:
    with ModuleEngine(("packets",)) as engine, closing(udp_receiver()) as receiver:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(10):
                sender.sendto(b"x", receiver.getsockname())
        delivered = sum(len(b.records) for b in engine.finish() if isinstance(b, Batch))
        sent = int(engine.closing["record_seq"].sum()) - int(engine.opening["record_seq"].sum())
    assert delivered == sent >= 20


def test_snaps_carry_the_first_bytes_and_belong_to_a_record(loaded: None) -> None:
    with listening("packets", "snaps") as seen, closing(udp_receiver()) as receiver:
        port = receiver.getsockname()[1]
        send(port, b"hello, snap", b"y" * 1000)
    known = {(int(r["cpu"]), int(r["seq"])): r for r in seen.records if r["dport"] == port}
    first_bytes = [s for s in seen.first_bytes if (int(s.head["cpu"]), int(s.head["seq"])) in known]
    assert len(first_bytes) == len(known) == 4
    assert sorted({len(s.data) for s in first_bytes}) == [28 + 11, lib.SNIFFER_SNAP_LEN]
    for one in first_bytes:
        assert one.data[0] == 0x45
        assert struct.unpack_from(">H", one.data, 22)[0] == port
    assert any(s.data.endswith(b"hello, snap") for s in first_bytes)


def test_fragments_and_truncated_packets_are_counted_not_recorded(loaded: None) -> None:
    with Sniffer() as sniffer:
        before = sniffer.counters().copy()
        with (
            listening(),
            closing(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw,
        ):
            addresses = socket.inet_aton(LOOPBACK) * 2
            later = struct.pack(">BBHHHBBH", 0x45, 0, 60, 7, 100, 64, 17, 0) + addresses + bytes(40)
            short = struct.pack(">BBHHHBBH", 0x45, 0, 24, 8, 0, 64, 6, 0) + addresses + bytes(4)
            raw.sendto(later, (LOOPBACK, 0))
            raw.sendto(short, (LOOPBACK, 0))
        after = sniffer.counters()
    assert int(after["skipped_fragment"]) > int(before["skipped_fragment"])
    assert int(after["skipped_truncated"]) > int(before["skipped_truncated"])
