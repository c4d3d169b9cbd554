# SPDX-License-Identifier: MIT
"""Engine ebpf, whole: it counts what the kernel itself counts, also when it loses records."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loading import links, records_of
from nlproto.engines.ebpf import EbpfEngine
from nlproto.kernel.bpf import NoBpf
from nlproto.pipeline.account import Account
from nlproto.records.wire import RECORD, Batch, lib
from waiting import there, until

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


SENDER = """
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


class Sender:
    """A process in a new namespace that sends itself 100 packets a turn."""

    def __init__(self, engine: EbpfEngine) -> None:
        if not engine.stats()["namespaces_linked"]:
            pytest.skip("this kernel has no links of Netfilter (before 6.4)")
        self._engine = engine
        self._records = [np.zeros(0, RECORD)]
        self._child = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", SENDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.inode = int(there(self._child.stdout).readline())
        self.turns = 0

    def turn(self) -> None:
        there(self._child.stdin).write("\n")
        there(self._child.stdin).flush()
        assert there(self._child.stdout).readline() == "sent\n"
        self.turns += 1
        assert self.turns < 2000
        self._keep(self._engine.read(0))

    def records(self) -> np.ndarray:
        """End it; return all records of its namespace."""
        with self._child:
            there(self._child.stdin).close()
        self._keep(self._engine.finish())
        found: np.ndarray = np.concatenate(self._records)
        return np.compress(found["netns"] == self.inode, found)

    def _keep(self, events: Iterable[object]) -> None:
        self._records += [event.records.copy() for event in events if isinstance(event, Batch)]


def test_a_namespace_that_is_made_later_gets_its_link(engine: EbpfEngine) -> None:
    sender = Sender(engine)
    while sender.turns < 20 or linked(engine) < 100:  # before, while and after it gets one
        sender.turn()
    records = sender.records()
    assert len(records) == 200 * sender.turns
    assert set(records["how"].tolist()) <= {lib.SNIFFER_HOW_CONTEXT, lib.SNIFFER_HOW_SOCKET}


def test_a_packet_is_told_once_while_its_link_begins(engine: EbpfEngine) -> None:
    """The functions report what no link has, whichever of their two programs runs first."""
    sender = Sender(engine)
    while linked(engine) < 100:
        sender.turn()
    key, (begins, tells) = struct.pack("=I", sender.inode), map(struct.Struct("=I").pack, (1, 2))
    until(lambda: engine._object.lookup("links", key, 4) == tells)
    engine._object.update("links", key, begins)  # as in the first 50 ms
    for _ in range(10):
        sender.turn()
    assert len(sender.records()) == 200 * sender.turns


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


def reads(engine: EbpfEngine, seconds: float) -> list[float]:
    """How long each read took until then."""
    times = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        list(engine.read(60))
        times.append(time.monotonic() - began)
    return times


def test_a_read_sleeps_until_a_packet_or_somebody_wakes_it(engine: EbpfEngine) -> None:
    """A guest without packets; beside this other tests may run, so the longest read counts."""
    assert max(reads(engine, 5)) > 0.8
    with socket.socket(type=socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))

        def send() -> object:
            return one.sendto(b"x", one.getsockname())

        for wake in (engine.wake, send):
            until(lambda: max(reads(engine, 1.5)) > 0.8)
            with ThreadPoolExecutor() as pool:
                began = time.monotonic()
                reading = pool.submit(lambda: list(engine.read(60)))
                time.sleep(0.1)
                wake()
                reading.result()
                assert time.monotonic() - began < 0.8, wake


FORKS = """
import os, socket
held = socket.socket()
for _ in range(1500):
    if not os.fork():
        os._exit(0)
    os.wait()
"""


def test_many_events_of_processes_wake_the_reader(engine: EbpfEngine) -> None:
    list(engine.read(0))
    with ThreadPoolExecutor() as pool:
        poll = select.poll()
        poll.register(engine._object.map_fd("events"), select.POLLIN)
        waiting = pool.submit(lambda: poll.poll(60_000))
        subprocess.run([sys.executable, "-c", FORKS], check=True)
        assert waiting.result()
    list(engine.read(0))
    assert figure(engine, "events_lost") == 0
