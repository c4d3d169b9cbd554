# SPDX-License-Identifier: MIT
"""Engine ebpf, whole: it counts what the kernel itself counts, also when it loses records."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from loading import links, records_of
from nlproto.engines.bpf import NoBpf
from nlproto.engines.ebpf import EbpfEngine
from nlproto.pipeline.account import Account
from nlproto.records.wire import RECORD, Batch, lib
from waiting import until

pytestmark = pytest.mark.parallel

TRAFFIC = """
import os, socket, sys
count = int(sys.argv[1])
def snmp():
    lines = [line.split() for line in open("/proc/net/snmp") if line.startswith("Ip:")]
    ip = dict(zip(*lines))
    return int(ip["OutRequests"]), int(ip["InReceives"])
os.system("ip link set lo up")
receiver = socket.socket(type=socket.SOCK_DGRAM)
receiver.bind(("127.0.0.1", 0))
server = socket.create_server(("127.0.0.1", 0), backlog=128)
before = snmp()
children = []
for _ in range(4):
    pid = os.fork()
    if not pid:
        sender = socket.socket(type=socket.SOCK_DGRAM)
        for n in range(count):
            sender.sendto(b"x", receiver.getsockname())
            if not n % 20:
                with socket.create_connection(server.getsockname()) as client:
                    client.sendall(b"hello")
        os._exit(0)
    children.append(pid)
for n in range(4 * len(range(0, count, 20))):
    server.accept()[0].close()
failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
# what is acknowledged a moment later
import time; time.sleep(0.5)
print(*(after - was for was, after in zip(before, snmp())), os.stat("/proc/self/ns/net").st_ino)
sys.exit(len(failed))
"""


@pytest.fixture(name="engine")
def _engine(request: pytest.FixtureRequest) -> Iterator[EbpfEngine]:
    with EbpfEngine(print, ring_bytes=getattr(request, "param", 16 << 20)) as engine:
        assert engine.whole
        yield engine


def play(count: int) -> tuple[int, int, int]:
    """Packets that a new namespace has sent and received by its own count, and its inode."""
    command = ["unshare", "--net", sys.executable, "-c", TRAFFIC, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    sent, received, inode = map(int, done.stdout.split())
    return sent, received, inode


def figure(engine: EbpfEngine, name: str) -> int:
    value = engine.stats()[name]
    assert isinstance(value, int)
    return value


def test_each_packet_that_the_kernel_counts_has_its_record(engine: EbpfEngine) -> None:
    account = Account()
    account.open(engine.opening, engine.instance)
    sent, received, inode = play(1000)
    records = records_of(engine, account)
    assert account.closes(), account.as_dict()
    ours = records[records["netns"] == inode]
    seen = [int(np.count_nonzero(ours["dir"] == way)) for way in (1, 2)]
    missed = figure(engine, "lost_missed")
    # who is left out twice in one moment is counted, and is all that may be missing
    assert seen[0] == received
    assert sent - missed <= seen[1] <= sent
    assert sum(account.lost.values()) == missed


@pytest.mark.parametrize("engine", [1 << 16], indirect=True)
def test_the_account_closes_when_the_ring_overflows(engine: EbpfEngine) -> None:
    account = Account()
    account.open(engine.opening, engine.instance)
    before = figure(engine, "records")
    sent, received, _ = play(500)
    records = records_of(engine, account)
    missed = figure(engine, "lost_missed")
    assert account.closes(), account.as_dict()
    assert account.lost["alloc"] > 1000
    made = figure(engine, "records") - before
    assert made == len(records) + sum(account.lost.values()) - missed
    assert made >= sent + received - missed


def test_a_namespace_that_is_made_later_gets_its_link(engine: EbpfEngine) -> None:
    if not engine.stats()["namespaces_linked"]:
        pytest.skip("this kernel has no links of Netfilter (before 6.4)")
    script = """
import os, socket, sys
os.system("ip link set lo up")
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 0))
print(os.stat("/proc/self/ns/net").st_ino, flush=True)
for line in sys.stdin:
    for _ in range(100):
        sock.sendto(b"x", sock.getsockname())
        sock.recv(10)
    print("sent", flush=True)
"""
    command = ["unshare", "--net", sys.executable, "-c", script]
    records = [np.zeros(0, RECORD)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin and child.stdout
        inode = int(child.stdout.readline())
        turns = 0
        # before, while and after it gets one
        while turns < 20 or linked(engine) < 100:
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "sent\n"
            turns += 1
            records += [e.records.copy() for e in engine.read(0) if isinstance(e, Batch)]
            assert turns < 2000
        child.stdin.close()
    records += [e.records for e in engine.finish() if isinstance(e, Batch)]
    found = np.concatenate(records)
    ours = found[found["netns"] == inode]
    assert len(ours) == 200 * turns
    assert set(ours["how"].tolist()) <= {lib.SNIFFER_HOW_CONTEXT, lib.SNIFFER_HOW_SOCKET}


def linked(engine: EbpfEngine) -> int:
    """Packets that links have reported; none of them is of our own namespace here."""
    return int(engine._counters["linked"].sum())


def test_nothing_is_left_when_it_is_killed(engine: EbpfEngine) -> None:
    """Links and programs go with the process, links of Netfilter in other namespaces too."""
    script = (
        "import time; from nlproto.engines.engine import open_engine\n"
        "with open_engine('ebpf', print): print('open', flush=True); time.sleep(1000)"
    )
    before = links()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        while b"open" not in child.stdout.readline():
            pass
        assert links() > before
        child.kill()
    until(lambda: links() <= before)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        os.system("ip link set lo up")
        sock.sendto(b"x", sock.getsockname())
        assert sock.recv(10) == b"x"


@pytest.mark.boot("lockdown=confidentiality")
def test_a_kernel_that_lets_nobody_read_it_is_told() -> None:
    with pytest.raises(NoBpf, match="lockdown=confidentiality"):
        EbpfEngine(print)
