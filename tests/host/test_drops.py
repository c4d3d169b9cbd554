# SPDX-License-Identifier: MIT
"""Why the kernel dropped packets, by process: as the kernel itself counts them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import StartDaemon, scrape
from loading import attached, is_there
from nlproto.client.client import DaemonClient
from nlproto.kernel.bpf import NoBpf
from nlproto.kernel.drop_reasons import DropReasons
from waiting import patient, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it loads a program")

ROOM = "SOCKET_RCVBUFF"

# SO_MEMINFO's last number is sk_drops
FULL = """
import socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full:
    full.bind(("127.0.0.1", 0))
    full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    for _ in range(300):
        full.sendto(b"x" * 500, full.getsockname())
    drops = struct.unpack("9I", full.getsockopt(socket.SOL_SOCKET, 55, 36))[8]
    print(full.getsockname()[1], drops, flush=True)
    input()
"""
CONNECTS = """
import socket
with socket.socket() as one:
    one.connect(("127.0.0.1", 9))
"""
WALL = """table inet wall {
  chain out { type filter hook output priority 0; tcp dport 9 counter drop; }; }"""


@pytest.fixture(autouse=True)
def _counted() -> None:
    try:
        with DropReasons() as reasons:
            if not reasons.tells_receivers:
                pytest.skip("this kernel does not say who would have received a packet")
    except NoBpf as error:
        pytest.skip(str(error))


@pytest.fixture(name="daemon")
def _daemon(start: StartDaemon, directory: Path) -> Any:
    return start(config=f"metrics: {directory}/metrics\n")


@pytest.fixture(name="netns")
def _netns() -> Iterator[str]:
    name = f"phd{os.getpid() % 100000}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@contextlib.contextmanager
def running(program: str, *before: str) -> Iterator[Any]:
    command = [*before, sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def why(client: Any, pid: int, **asked: Any) -> dict[str, int]:
    """The reasons of the sockets of a process at a port."""
    found: dict[str, int] = {}
    for one in client.who(**asked)["owners"]:
        if one["pid"] == pid:
            found |= one["drop_reasons"]
    return found


def counted(metrics: Path) -> dict[tuple[str, str], float]:
    """What the metrics say, by name of process and reason."""
    pattern = r'process_dropped_by_reason_total\{comm="([^"]*)",reason="(\w+)"\} (\S+)'
    found = re.findall(pattern, scrape(metrics))
    return {(comm, reason): float(count) for comm, reason, count in found}


def rcvbuf_errors(netns: str) -> int:
    """/proc/net/snmp's of a network namespace."""
    command = ["ip", "netns", "exec", netns, "cat", "/proc/net/snmp"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, numbers = (line.split() for line in text.splitlines() if line.startswith("Udp:"))
    return int(dict(zip(names, numbers, strict=True))["RcvbufErrors"])


def test_packets_without_room_have_that_reason_and_are_as_many_as_the_kernel_counts(
    daemon: Any, netns: str, directory: Path
) -> None:
    with (
        DaemonClient(daemon.path, timeout=patient(10)) as client,
        running(FULL, "ip", "netns", "exec", netns) as child,
    ):
        port, drops = map(int, child.stdout.readline().split())
        assert drops == rcvbuf_errors(netns) > 100
        until(lambda: why(client, child.pid, port=port) == {ROOM: drops}, 30, "the reason in who")

        def in_metrics() -> bool:
            client.who(port=port)  # who asks makes the daemon look
            return drops in counted(directory / "metrics").values()

        until(in_metrics, 30, "it in the metrics")
        [(comm, reason)] = [key for key, n in counted(directory / "metrics").items() if n == drops]
        assert comm.startswith("python") and reason == ROOM
        command = [sys.executable, "-m", "hunter", "who", "--socket", daemon.path]
        shown = subprocess.run(
            [*command, "--port", str(port)], capture_output=True, text=True, check=True
        )
        assert f"{drops} {ROOM}" in shown.stdout


def test_packets_that_a_firewall_drops_count_for_who_sent_them(daemon: Any, netns: str) -> None:
    into = ("ip", "netns", "exec", netns)
    subprocess.run([*into, "nft", "-f", "-"], input=WALL, text=True, check=True)
    with (
        DaemonClient(daemon.path, timeout=patient(10)) as client,
        running(CONNECTS, *into) as child,
    ):

        def fallen() -> int:
            listed = [*into, "nft", "list", "table", "inet", "wall"]
            text = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
            return int(text.partition("packets ")[2].split()[0])

        until(
            lambda: why(client, child.pid, port=9) == {"NETFILTER_DROP": fallen()}, 30, "the reason"
        )
        assert fallen()


def test_a_daemon_that_is_killed_leaves_no_program(start: StartDaemon) -> None:
    daemon = start("--engine", "packet")
    [link] = attached(daemon.process.pid)
    assert is_there(link)
    daemon.process.kill()
    daemon.process.wait()
    until(lambda: not is_there(link), 30, "its end")


def test_no_program_is_attached_where_it_is_switched_off(start: StartDaemon) -> None:
    daemon = start(config="drop_reasons: off\n")
    with DaemonClient(daemon.path) as client:
        assert client.stats()["drops"] == {"reasons": "off"}
    assert attached(daemon.process.pid) == []
