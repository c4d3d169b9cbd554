# SPDX-License-Identifier: MIT
"""What engine packet counts, skips, loses and gives back."""

from __future__ import annotations

import gc
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capturing import IN, OUT, TCP, UDP, StartRun, StartWorker, facts, owners
from nlproto.engines.engine import open_engine
from nlproto.engines.packet import PacketEngine
from nlproto.kernel.loading import advice
from nlproto.pipeline.account import Account
from waiting import stand_in, there

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")


def test_fragments_after_the_first_are_counted_as_skipped(
    run: StartRun, worker: StartWorker
) -> None:
    inside = worker(
        """
import subprocess
subprocess.run(["ip", "link", "set", "lo", "mtu", "1500", "up"], check=True)
tell(netns=os.stat("/proc/self/ns/net").st_ino); sys.stdin.readline()
kept = []
for f in (socket.AF_INET, socket.AF_INET6):
    s = socket.socket(f, socket.SOCK_DGRAM); kept.append(s); s.bind((loopback(f), 0))
    s.sendto(b"x" * 4000, s.getsockname()); tell(port=s.getsockname()[1])
sys.stdin.read()
""",
        prefix=["unshare", "-n"],
    )
    netns = facts(inside)["netns"]
    taken = run()
    there(inside.stdin).write("\n")
    there(inside.stdin).flush()
    ports = [facts(inside)["port"] for _ in range(2)]
    taken.wait(4, *ports, netns=netns)
    records = taken.records(*ports)
    records = records[records["netns"] == netns]
    assert len(records) == 4
    assert owners(records) == {(OUT, inside.pid), (IN, inside.pid)}
    assert taken.account.skipped >= 8
    assert taken.account.closes()


def test_segments_of_a_large_skb_are_counted(run: StartRun, worker: StartWorker) -> None:
    if tuple(int(part) for part in platform.release().split(".")[:2]) < (6, 2):
        pytest.skip("needs Linux 6.2: earlier ones tell segments only at the price of losing some")
    taken = run()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        other.bind(("127.0.0.1", 0))
        one.setsockopt(UDP, 103, 100)  # UDP_SEGMENT
        one.sendto(b"x" * 950, other.getsockname())
        taken.wait(2, other.getsockname()[1])
        records = taken.records(other.getsockname()[1])
    assert records[records["dir"] == OUT]["gso_segs"].tolist() == [10]
    assert records[records["dir"] == IN]["gso_segs"].sum() == 10


def test_malformed_packets_are_skipped_and_nothing_breaks(
    run: StartRun, worker: StartWorker
) -> None:
    inside = worker(
        """
import random, subprocess
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
tell(netns=os.stat("/proc/self/ns/net").st_ino); sys.stdin.readline()
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0); raw.bind(("lo", 0))
dice = random.Random(1); sent = 0
for number in range(4000):
    six = number % 2
    body = bytearray(dice.randbytes(dice.randrange(1, 400)))
    body[0] = (0x60 if six else 0x40) | body[0] & 15
    if six and len(body) > 6: body[6] = dice.choice([0, 6, 17, 43, 44, 51, 60])
    if not six and len(body) > 9: body[9] = dice.choice([6, 17])
    try: raw.send(bytes(12) + bytes.fromhex("86dd" if six else "0800") + body)
    except OSError: continue
    sent += 1
tell(sent=sent); sys.stdin.read()
""",
        prefix=["unshare", "-n"],
    )
    netns = facts(inside)["netns"]
    taken = run()
    there(inside.stdin).write("\n")
    there(inside.stdin).flush()
    sent = facts(inside)["sent"]
    taken.stop()
    records = np.concatenate([part.records for part in taken.parts])
    records = records[records["netns"] == netns]
    assert sent > 3000
    assert len(records) > 100
    assert taken.account.skipped > 1000
    assert set(records["proto"].tolist()) <= {TCP, UDP}
    assert not np.any(records["tgid"])
    assert taken.account.closes(), taken.account.as_dict()


def test_a_full_ring_is_lost_in_the_socket_and_the_account_closes() -> None:
    engine = PacketEngine(lambda note: None, ring_bytes=1 << 18, everywhere=False)
    with engine, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        account = Account()
        account.open(engine.opening, engine.instance)
        sock.bind(("127.0.0.1", 0))
        for _ in range(2000):
            sock.sendto(b"x", sock.getsockname())
            sock.recv(10)
        for batch in engine.finish():
            account.add(batch.head)
            account.deliver(stand_in(batch).records["how"])
        account.close(engine.closing)
    assert account.lost["socket"] > 2000
    assert account.delivered >= 512
    assert account.records >= 4000
    assert account.closes(), account.as_dict()


def test_of_two_engines_that_take_turns_each_packet_is_told_once() -> None:
    """Both capture all the while, as when one is opened to take the other's place."""
    with (
        PacketEngine(print, everywhere=False) as first,
        PacketEngine(print, everywhere=False) as second,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        for _ in range(30):
            sock.sendto(b"x", sock.getsockname())
        moment = second.begin()
        account = Account()
        account.open(second.opening, second.instance)
        for _ in range(20):
            sock.sendto(b"x", sock.getsockname())
        told = [
            sum(
                [
                    int(np.count_nonzero(stand_in(batch).records["sport"] == port))
                    for batch in events
                ]
            )
            for events in (first.finish(moment), _counted(account, second.finish()))
        ]
        account.close(second.closing)
    assert told == [60, 40]
    assert account.closes()


def _counted(account: Any, batches: Any) -> Iterator[Any]:
    for batch in batches:
        account.add(batch.head)
        account.deliver(batch.records["how"])
        yield batch


def test_the_mapped_rings_and_sockets_are_given_back(run: StartRun) -> None:
    gc.collect()  # what a test before this one has left is not this one's
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with PacketEngine(lambda note: None) as engine:
            list(engine.read(0))
    del engine
    gc.collect()  # the descriptor of an engine's Births goes with it
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unprivileged_user_is_told_what_to_do() -> None:
    code = """
import os
from nlproto import NoPrivilege
from nlproto.engines import packet as engine_packet
from nlproto.engines.engine import open_engine
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open_engine("packet", print)
except NoPrivilege as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "engine packet needs root (CAP_NET_RAW): run it with sudo\n"


@pytest.mark.skipif(os.path.exists("/sys/module/sniffer"), reason="sniffer.ko is loaded")
def test_auto_takes_this_engine_and_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing better runs: here no programs are there."""
    monkeypatch.setattr("nlproto.engines.bpf_programs.OBJECT", Path("/none"))
    monkeypatch.setattr("nlproto.engines.bpf_programs.PARTS", Path("/none"))
    notes: list[Any] = []
    with open_engine("auto", notes.append) as engine:
        assert engine.name == "packet"
    assert any(f"stay unnamed; {advice().text}" in note for note in notes)
