# SPDX-License-Identifier: MIT
"""Engine packet against real traffic; each worker tells its own pid and ports."""

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nlproto.engines.engine import open_engine
from nlproto.engines.packet import PacketEngine
from nlproto.host import procfs
from nlproto.kernel.loading import advice
from nlproto.pipeline.account import Account
from nlproto.records import wire
from nlproto.records.clock import Clock
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")

IN, OUT, FWD = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_DIR_OUT, wire.lib.SNIFFER_DIR_FWD
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
families = pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])


class Run:
    """An engine read by a thread of its own, as programs do it."""

    def __init__(self, **options):
        self.notes = []
        self.engine = PacketEngine(self.notes.append, **options)
        self.account = Account()
        self.account.open(self.engine.opening, self.engine.instance)
        self.parts = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _take(self, batch):
        copy = wire.decode_batch(wire.encode_batch(batch.head, batch.records))
        self.account.add(copy.head)
        self.account.deliver(copy.records["how"])
        self.parts.append(copy)

    def _read(self):
        while not self._stop.is_set():
            for batch in self.engine.read(0.05):
                self._take(batch)

    def stop(self):
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            for batch in self.engine.finish():
                self._take(batch)
            self.account.close(self.engine.closing)
        return self

    def records(self, *ports):
        """What was captured with one of `ports` at either end."""
        self.stop()
        return self._with(ports)

    def wait(self, count, *ports, netns=None):
        """Until so many of them were captured and named, while their sockets are still there."""
        until(lambda: len(self._with(ports, netns)) >= count)

    def _with(self, ports, netns=None):
        found = [part.records for part in self.parts] or [np.zeros(0, wire.RECORD)]
        found = np.concatenate(found)
        if netns is not None:
            found = found[found["netns"] == netns]
        return found[np.isin(found["sport"], ports) | np.isin(found["dport"], ports)]


@pytest.fixture
def run():
    with contextlib.ExitStack() as stack:

        def start(**options):
            made = Run(**options)
            stack.callback(made.engine.close)
            stack.callback(made.stop)
            return made

        yield start


COMMON = """
import json, os, signal, socket, sys, threading, time
def loopback(family): return "127.0.0.1" if family == socket.AF_INET else "::1"
def tell(**facts): print(json.dumps({"pid": os.getpid(), **facts}), flush=True)
def stay(): sys.stdin.read()
"""


@pytest.fixture
def worker():
    running = []

    def start(code, prefix=()):
        child = subprocess.Popen(
            [*prefix, sys.executable, "-c", COMMON + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        return child

    yield start
    for child in running:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def facts(child):
    line = child.stdout.readline()
    assert line, "the worker died"
    return json.loads(line)


def holds(pid, port):
    """Whether it holds a TCP socket of that local port that is no listener."""
    inodes = procfs.socket_inodes(pid)
    tables = procfs.tables()
    mine = tables[(tables["sport"] == port) & (tables["state"] != 10)]
    return any(int(inode) in inodes for inode in mine["inode"])


def owners(records, direction=None):
    """{(direction, pid or the reason)}"""
    return {
        (int(one["dir"]), int(one["tgid"]) or wire.how_name(int(one["how"])))
        for one in records
        if direction in (None, int(one["dir"]))
    }


@families
def test_tcp_is_named_at_both_ends_in_both_directions(run, worker, family):
    taken = run()
    server = worker(f"""
f = socket.{family}; a = socket.socket(f); a.bind((loopback(f), 0)); a.listen()
tell(port=a.getsockname()[1]); c, _ = a.accept()
while c.recv(65536): c.send(b"y" * 100)
stay()
""")
    port = facts(server)["port"]
    client = worker(f"""
f = socket.{family}; c = socket.create_connection((loopback(f), {port}))
tell(port=c.getsockname()[1])
for _ in range(20): c.send(b"x" * 1000); c.recv(65536)
sys.stdin.readline(); c.close(); stay()
""")
    facts(client)
    taken.wait(84, port)
    client.stdin.write("\n")
    client.stdin.flush()
    taken.wait(88, port)
    records = taken.records(port)
    to_server = records[records["dport"] == port]
    to_client = records[records["sport"] == port]
    assert len(to_server) > 40 and len(to_client) > 40
    assert owners(to_server) == {(OUT, client.pid), (IN, server.pid)}
    assert owners(to_client) == {(OUT, server.pid), (IN, client.pid)}
    hows = {wire.lib.SNIFFER_HOW_DIAG, wire.lib.SNIFFER_HOW_LISTENER}  # not accepted yet
    assert set(records["how"].tolist()) <= hows
    assert taken.account.closes(), taken.account.as_dict()


@families
def test_udp_is_named_at_both_ends_in_both_directions(run, worker, family):
    taken = run()
    server = worker(f"""
f = socket.{family}; s = socket.socket(f, socket.SOCK_DGRAM); s.bind((loopback(f), 0))
tell(port=s.getsockname()[1])
for _ in range(20): d, a = s.recvfrom(2000); s.sendto(d, a)
stay()
""")
    port = facts(server)["port"]
    client = worker(f"""
f = socket.{family}; s = socket.socket(f, socket.SOCK_DGRAM)
for _ in range(20): s.sendto(b"x" * 100, (loopback(f), {port})); s.recv(2000)
stay()
""")
    taken.wait(80, port)
    records = taken.records(port)
    assert len(records) == 80
    assert owners(records[records["dport"] == port]) == {(OUT, client.pid), (IN, server.pid)}
    assert owners(records[records["sport"] == port]) == {(OUT, server.pid), (IN, client.pid)}
    header = 28 if family == "AF_INET" else 48
    assert set(records["len"].tolist()) == {100 + header}
    assert set(records["hdr_len"].tolist()) == {header}


def test_a_process_that_only_receives_is_named(run, worker):
    taken = run()
    receiver = worker("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
tell(port=s.getsockname()[1]); sys.stdin.read()
""")
    port = facts(receiver)["port"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(5):
            sender.sendto(b"hi", ("127.0.0.1", port))
        taken.wait(10, port)
    records = taken.records(port)
    assert owners(records) == {(OUT, os.getpid()), (IN, receiver.pid)}


def test_a_record_holds_everything_that_is_known(run):
    taken = run()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        before = time.monotonic_ns()
        one.sendto(b"12345", other.getsockname())
        after = time.monotonic_ns()
        ports = one.getsockname()[1], other.getsockname()[1]
        taken.wait(2, *ports)
        sent, got = taken.records(*ports)
        cookies = [
            int.from_bytes(s.getsockopt(socket.SOL_SOCKET, 57, 8), "little") for s in (one, other)
        ]
        inodes = [os.fstat(s.fileno()).st_ino for s in (one, other)]
    for record, cookie, inode in zip((sent, got), cookies, inodes, strict=True):
        assert before <= int(record["time_ns"]) <= after + 50_000_000
        assert (int(record["cookie"]), int(record["inode"])) == (cookie, inode)
        assert (int(record["sport"]), int(record["dport"])) == ports
        assert int(record["netns"]) == os.stat("/proc/self/ns/net").st_ino
        assert int(record["ifindex"]) == socket.if_nametoindex("lo")
        assert (int(record["len"]), int(record["gso_segs"])) == (33, 1)
        assert int(record["uid"]) == os.getuid()
        me = procfs.identity(os.getpid())
        assert procfs.same_start(int(record["start_ns"]), me.start_ticks)
        assert wire.text(record["comm"]) == open("/proc/self/comm").read().rstrip("\n")
    assert (int(sent["dir"]), int(got["dir"])) == (OUT, IN)
    seen = wire.packet(sent, Clock.from_head(taken.parts[-1].head)).time.timestamp()
    assert abs(seen - time.time()) < 30


def test_a_child_that_the_parent_accepted_for_is_the_owner(run, worker):
    taken = run()
    server = worker("""
a = socket.socket(); a.bind(("127.0.0.1", 0)); a.listen(); tell(port=a.getsockname()[1])
c, _ = a.accept()
child = os.fork()
if child == 0:
    a.close()
    for _ in range(10): c.recv(100); c.send(b"y" * 10)
    stay(); os._exit(0)
c.close(); tell(child=child); os.waitpid(child, 0)
""")
    port = facts(server)["port"]
    with socket.create_connection(("127.0.0.1", port)) as client:
        child = facts(server)["child"]
        until(lambda: not holds(server.pid, port))
        for _ in range(10):
            client.send(b"x" * 10)
            client.recv(100)
        records = taken.records(port)
    payload = records[(records["len"] == 62) & (records["dport"] == port)]
    assert owners(payload, IN) == {(IN, child)}
    replies = records[(records["len"] == 62) & (records["sport"] == port)]
    assert owners(replies, OUT) == {(OUT, child)}


def test_a_shared_socket_is_flagged(run, worker):
    taken = run()
    parent = worker("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
child = os.fork()
if child == 0:
    for _ in range(30): s.sendto(b"x", s.getsockname()); time.sleep(0.1)
    stay(); os._exit(0)
tell(port=s.getsockname()[1], child=child); os.waitpid(child, 0)
""")
    told = facts(parent)
    taken.wait(60, told["port"])
    records = taken.records(told["port"])
    assert len(records) == 60
    assert {pid for _, pid in owners(records)} <= {told["child"], parent.pid}
    assert np.all(records["flags"][-2:] & wire.lib.SNIFFER_F_SHARED)


def test_a_port_that_another_process_takes_over_gets_the_new_owner(run, worker):
    taken = run()
    code = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("127.0.0.1", PORT))
tell(port=s.getsockname()[1])
s.sendto(b"x", s.getsockname()); stay()
"""
    first = worker(code.replace("PORT", "0"))
    port = facts(first)["port"]
    taken.wait(2, port)
    first.communicate()
    second = worker(code.replace("PORT", str(port)))
    taken.wait(4, port)
    found = [int(one["tgid"]) for one in taken.records(port)]
    assert found == [first.pid, first.pid, second.pid, second.pid]


def test_a_closed_port_has_no_socket(run):
    taken = run()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    taken.wait(4, port)
    records = taken.records(port)
    arrived = records[(records["dport"] == port) & (records["dir"] == IN)]
    # Only the answer proves that there was none; it may be read after the question.
    assert {wire.how_name(how) for how in arrived["how"].tolist()} <= {"no_socket", "socket_gone"}
    resets = records[(records["sport"] == port) & (records["dir"] == OUT)]
    assert {wire.how_name(how) for how in resets["how"].tolist()} == {"no_socket"}


def test_never_a_wrong_owner_for_processes_that_live_a_moment(run, worker):
    taken = run()
    sink = worker("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
tell(port=s.getsockname()[1]); sys.stdin.read()
""")
    port = facts(sink)["port"]
    parent = worker(f"""
for _ in range(100):
    child = os.fork()
    if child == 0:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind(("127.0.0.1", 0))
        tell(port=s.getsockname()[1]); s.sendto(b"x", ("127.0.0.1", {port})); os._exit(0)
    os.waitpid(child, 0)
""")
    truth = [json.loads(line) for line in parent.stdout]
    taken.wait(200, port)
    records = taken.records(port)
    assert owners(records, IN) == {(IN, sink.pid)}
    sent = records[records["dir"] == OUT]
    assert len(truth) == len(sent) == 100
    for one, told in zip(sent, truth, strict=True):
        assert int(one["sport"]) == told["port"]
        if wire.is_named(int(one["how"])):
            assert int(one["tgid"]) == told["pid"]
        else:
            assert wire.how_name(int(one["how"])) in ("socket_gone", "not_probed")


def test_fragments_after_the_first_are_counted_as_skipped(run, worker):
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
    inside.stdin.write("\n")
    inside.stdin.flush()
    ports = [facts(inside)["port"] for _ in range(2)]
    taken.wait(4, *ports, netns=netns)
    records = taken.records(*ports)
    records = records[records["netns"] == netns]
    assert len(records) == 4
    assert owners(records) == {(OUT, inside.pid), (IN, inside.pid)}
    assert taken.account.skipped >= 8
    assert taken.account.closes()


def test_a_name_space_of_its_own_is_captured_with_its_owner(run, worker):
    taken = run()
    inside = worker(
        """
import subprocess
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
tell(netns=os.stat("/proc/self/ns/net").st_ino); sys.stdin.readline()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
for _ in range(5): s.sendto(b"x", s.getsockname())
tell(port=s.getsockname()[1]); sys.stdin.read()
""",
        prefix=["unshare", "-n"],
    )
    netns = facts(inside)["netns"]
    until(lambda: netns in taken.engine._places)
    inside.stdin.write("\n")
    inside.stdin.flush()
    port = facts(inside)["port"]
    taken.wait(10, port, netns=netns)
    records = taken.records(port)
    records = records[records["netns"] == netns]
    assert len(records) == 10
    assert owners(records) == {(OUT, inside.pid), (IN, inside.pid)}


FORWARD = """
import subprocess
def sh(line): subprocess.run(line.split(), check=True)
router = os.open("/proc/self/ns/net", os.O_RDONLY)
sh("ip link set lo up")
for n in (1, 2):
    sh(f"ip netns add PREFIX{n}")
    sh(f"ip link add veth{n} type veth peer name eth0 netns PREFIX{n}")
    sh(f"ip addr add 10.99.{n}.1/24 dev veth{n}")
    sh(f"ip link set veth{n} up")
    sh(f"ip -n PREFIX{n} addr add 10.99.{n}.2/24 dev eth0")
    sh(f"ip -n PREFIX{n} link set eth0 up")
    sh(f"ip -n PREFIX{n} route add default via 10.99.{n}.1")
open("/proc/sys/net/ipv4/ip_forward", "w").write("1")
tell(netns=os.stat("/proc/self/ns/net").st_ino); sys.stdin.read()
"""


@pytest.fixture
def forwarding(worker):
    prefix = f"phtest{os.getpid()}n"
    router = worker(FORWARD.replace("PREFIX", prefix), prefix=["unshare", "-n"])
    yield prefix, facts(router)["netns"]
    for number in (1, 2):
        subprocess.run(["ip", "netns", "delete", f"{prefix}{number}"], check=False)


def test_a_forwarded_packet_is_one_record_without_owner(run, worker, forwarding):
    prefix, router = forwarding
    taken = run()
    server = worker(
        """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("10.99.2.2", 0))
tell(port=s.getsockname()[1])
for _ in range(3): d, a = s.recvfrom(100)
tell(); sys.stdin.read()
""",
        prefix=["ip", "netns", "exec", f"{prefix}2"],
    )
    port = facts(server)["port"]
    client = worker(
        f"""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(3): s.sendto(b"x", ("10.99.2.2", {port}))
sys.stdin.read()
""",
        prefix=["ip", "netns", "exec", f"{prefix}1"],
    )
    facts(server)
    taken.wait(9, port)
    records = taken.records(port)
    assert len(records) == 9
    assert owners(records[records["netns"] == router]) == {(FWD, "forwarded")}
    assert owners(records[records["netns"] != router]) == {(OUT, client.pid), (IN, server.pid)}
    assert taken.account.closes()


BRIDGE = """
import subprocess
def sh(line): subprocess.run(line.split(), check=True)
sh("ip link add br0 type bridge"); sh("ip addr add 10.98.0.1/24 dev br0")
sh("ip link set br0 up"); sh("ip link set lo up")
sh("ip netns add NAME")
sh("ip link add port1 type veth peer name eth0 netns NAME")
sh("ip link set port1 master br0"); sh("ip link set port1 up")
sh("ip -n NAME addr add 10.98.0.2/24 dev eth0"); sh("ip -n NAME link set eth0 up")
tell(netns=os.stat("/proc/self/ns/net").st_ino)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("10.98.0.1", 0))
sys.stdin.readline()
tell(port=s.getsockname()[1])
d, a = s.recvfrom(100); s.sendto(d, a); tell(); sys.stdin.read()
"""


def test_a_packet_through_a_bridge_port_is_one_record(run, worker):
    name = f"phtest{os.getpid()}b"
    host = worker(BRIDGE.replace("NAME", name), prefix=["unshare", "-n"])
    try:
        netns = facts(host)["netns"]
        taken = run()
        host.stdin.write("\n")
        host.stdin.flush()
        port = facts(host)["port"]
        worker(
            f"""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b"x", ("10.98.0.1", {port})); s.recv(100); sys.stdin.read()
""",
            prefix=["ip", "netns", "exec", name],
        )
        facts(host)
        taken.wait(2, port, netns=netns)
        records = taken.records(port)
        records = records[records["netns"] == netns]
        assert [(int(one["dir"]), int(one["tgid"])) for one in records] == [
            (IN, host.pid),
            (OUT, host.pid),
        ]
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def test_a_broadcast_is_a_record_for_each_receiver(run, worker):
    name = f"phtest{os.getpid()}c"
    code = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 47001))
tell(netns=os.stat("/proc/self/ns/net").st_ino); s.recv(10); tell(); sys.stdin.read()
"""
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "netns", "add", name + "x"], check=True)
    try:
        for line in (
            f"-n {name} link add eth0 type veth peer name eth0 netns {name}x",
            f"-n {name} addr add 10.97.0.1/24 brd + dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name}x addr add 10.97.0.2/24 brd + dev eth0",
            f"-n {name}x link set eth0 up",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        inside = ["ip", "netns", "exec", name]
        receivers = [worker(code, prefix=inside) for _ in range(3)]
        netns = [facts(one)["netns"] for one in receivers][0]
        taken = run()
        sender = worker(
            """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.sendto(b"x", ("10.97.0.255", 47001)); tell(); sys.stdin.read()
""",
            prefix=["ip", "netns", "exec", name + "x"],
        )
        facts(sender)
        for one in receivers:
            facts(one)
        taken.wait(3, 47001, netns=netns)
        records = taken.records(47001)
        records = records[records["netns"] == netns]
        assert {int(one["tgid"]) for one in records} == {one.pid for one in receivers}
        copies = records["flags"] & wire.lib.SNIFFER_F_COPY
        assert np.count_nonzero(copies) == len(records) - 1 == 2
        assert taken.account.copies == 2
        assert taken.account.closes()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)
        subprocess.run(["ip", "netns", "delete", name + "x"], check=False)


def test_segments_of_a_large_skb_are_counted(run, worker):
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


@families
def test_without_sock_diag_proc_net_names_as_well(run, worker, family):
    taken = run(sock_diag=False)
    server = worker(f"""
f = socket.{family}; a = socket.socket(f); a.bind((loopback(f), 0)); a.listen()
u = socket.socket(f, socket.SOCK_DGRAM); u.bind((loopback(f), 0))
tell(tcp=a.getsockname()[1], udp=u.getsockname()[1]); c, _ = a.accept(); sys.stdin.read()
""")
    told = facts(server)
    client = worker(f"""
f = socket.{family}
c = socket.create_connection((loopback(f), {told["tcp"]}))
u = socket.socket(f, socket.SOCK_DGRAM); u.connect((loopback(f), {told["udp"]}))
for _ in range(10): time.sleep(0.1); c.send(b"x" * 9); u.send(b"x")
tell(); sys.stdin.read()
""")
    facts(client)
    taken.wait(20, told["udp"])
    records = taken.records(told["tcp"], told["udp"])
    for last in (
        records[records["dport"] == told["udp"]][-10:],
        records[(records["dport"] == told["tcp"]) & (records["tcp_flags"] & 8 != 0)][-10:],
    ):
        assert owners(last) == {(OUT, client.pid), (IN, server.pid)}
        assert set(last["how"].tolist()) == {wire.lib.SNIFFER_HOW_PROC}
    assert taken.engine.stats()["sock_diag"] is False


def test_malformed_packets_are_skipped_and_nothing_breaks(run, worker):
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
    inside.stdin.write("\n")
    inside.stdin.flush()
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


def test_a_full_ring_is_lost_in_the_socket_and_the_account_closes():
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
            account.deliver(batch.records["how"])
        account.close(engine.closing)
    assert account.lost["socket"] > 2000
    assert account.delivered >= 512
    assert account.records >= 4000
    assert account.closes(), account.as_dict()


def test_of_two_engines_that_take_turns_each_packet_is_told_once():
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
            sum(np.count_nonzero(batch.records["sport"] == port) for batch in events)
            for events in (first.finish(moment), _counted(account, second.finish()))
        ]
        account.close(second.closing)
    assert told == [60, 40]
    assert account.closes()


def _counted(account, batches):
    for batch in batches:
        account.add(batch.head)
        account.deliver(batch.records["how"])
        yield batch


def test_the_mapped_rings_and_sockets_are_given_back(run):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with PacketEngine(lambda note: None) as engine:
            list(engine.read(0))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_namespace_that_ended_is_let_go(run, worker):
    """Asked by its number: others on this machine make and end namespaces of their own."""
    taken = run()
    child = worker(
        'tell(netns=os.stat("/proc/self/ns/net").st_ino); sys.stdin.read()',
        prefix=["unshare", "-n"],
    )
    number = facts(child)["netns"]
    until(lambda: number in taken.engine._places)
    child.kill()
    child.wait()
    until(lambda: number not in taken.engine._places)


def test_an_unprivileged_user_is_told_what_to_do():
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
def test_auto_takes_this_engine_and_says_what_is_lost(monkeypatch):
    """Where nothing better runs: here no programs are there."""
    monkeypatch.setattr("nlproto.engines.ebpf.OBJECT", Path("/none"))
    monkeypatch.setattr("nlproto.engines.ebpf.PARTS", Path("/none"))
    notes = []
    with open_engine("auto", notes.append) as engine:
        assert engine.name == "packet"
    assert any(f"stay unnamed; {advice().text}" in note for note in notes)
