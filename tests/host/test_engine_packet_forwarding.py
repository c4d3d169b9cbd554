# SPDX-License-Identifier: MIT
"""Engine packet where packets pass through, or reach many."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from capturing import FWD, IN, OUT, StartRun, StartWorker, facts, owners
from nlproto.records import wire
from waiting import there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")


def test_a_name_space_of_its_own_is_captured_with_its_owner(
    run: StartRun, worker: StartWorker
) -> None:
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
    there(inside.stdin).write("\n")
    there(inside.stdin).flush()
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
def forwarding(worker: StartWorker) -> Iterator[tuple[Any, ...]]:
    prefix = f"phtest{os.getpid()}n"
    router = worker(FORWARD.replace("PREFIX", prefix), prefix=["unshare", "-n"])
    yield prefix, facts(router)["netns"]
    for number in (1, 2):
        subprocess.run(["ip", "netns", "delete", f"{prefix}{number}"], check=False)


def test_a_forwarded_packet_is_one_record_without_owner(
    run: StartRun, worker: StartWorker, forwarding: tuple[Any, ...]
) -> None:
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


def test_a_packet_through_a_bridge_port_is_one_record(run: StartRun, worker: StartWorker) -> None:
    name = f"phtest{os.getpid()}b"
    host = worker(BRIDGE.replace("NAME", name), prefix=["unshare", "-n"])
    try:
        netns = facts(host)["netns"]
        taken = run()
        there(host.stdin).write("\n")
        there(host.stdin).flush()
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


def test_a_broadcast_is_a_record_for_each_receiver(run: StartRun, worker: StartWorker) -> None:
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


def test_a_namespace_that_ended_is_let_go(run: StartRun, worker: StartWorker) -> None:
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
