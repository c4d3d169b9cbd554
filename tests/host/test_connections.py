# SPDX-License-Identifier: MIT
"""How TCP connections go: loss, refusal and silence, made by a firewall in our namespaces."""

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
from nlproto.client.client import DaemonClient
from nlproto.errors import NoPrivilege
from nlproto.host.tcp_info import TcpInfo
from waiting import patient, there, until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
]

LOSS = """table inet lossy {
  chain arriving {
    type filter hook input priority 0;
    tcp dport 8080 meta length 400-2000 numgen inc mod 4 == 0 drop
    tcp dport 9 drop
  }
}
"""

# the same four ends in every namespace: which of them loses is all that differs
SERVER = """
import socket
with socket.create_server(("127.0.0.1", 8080)) as server:
    print("ready", flush=True)
    one, _ = server.accept()
    while data := one.recv(65536):
        one.sendall(b"." * len(data))
"""
CLIENT = """
import socket
with socket.socket() as one:
    one.bind(("127.0.0.1", 40000))
    one.connect(("127.0.0.1", 8080))
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(12):
        one.sendall(b"x" * 600)
        got = 0
        while got < 600:
            got += len(one.recv(600 - got))
    print("done", flush=True)
    input()
"""
FAILS = """
import socket
for port in (7, 9):
    with socket.socket() as one:
        one.settimeout(1.5)
        try:
            one.connect(("127.0.0.1", port))
        except OSError as error:
            print(type(error).__name__, flush=True)
input()
"""


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    names = [f"phc{os.getpid() % 10000}{letter}" for letter in "ab"]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    made = subprocess.run(
        ["ip", "netns", "exec", names[0], "nft", "-f", "-"],
        input=LOSS,
        text=True,
        capture_output=True,
        check=False,
    )
    try:
        if made.returncode:
            pytest.skip(f"this kernel's nft has no numgen: {made.stderr.splitlines()[0]}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@contextlib.contextmanager
def inside(name: Any, code: Any) -> Iterator[Any]:
    with subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def inode(name: Any) -> Any:
    return os.stat(f"/run/netns/{name}").st_ino


def test_what_is_lost_counts_for_who_lost_it_and_for_nobody_with_the_same_ends(
    start: StartDaemon, namespaces: list[str], directory: Path
) -> None:
    metrics = str(directory / "metrics")
    daemon = start(config=f"metrics: {metrics}\n")
    with contextlib.ExitStack() as stack, DaemonClient(daemon.path) as client:
        numbers = {inode(name) for name in namespaces}
        clients = {}
        for name in namespaces:
            server = stack.enter_context(inside(name, SERVER))
            assert server.stdout.readline() == "ready\n"
        until(lambda: numbers <= {one["netns"] for one in client.owner(8080)["owners"]})
        for name in namespaces:
            clients[name] = stack.enter_context(inside(name, CLIENT))
        for child in clients.values():
            assert child.stdout.readline() == "done\n"

        def flows() -> dict[Any, Any]:
            return {
                one["netns"]: one
                for one in client.who(port=40000)["flows"]
                if one["lport"] == 40000 and one["pid"]
            }

        def known() -> Any:
            found = flows()
            return len(found) == 2 and all(one["retransmits"] is not None for one in found.values())

        # while they are open, by a look
        until(known, 60, "a look at open connections")
        for child in clients.values():
            child.stdin.write("\n")
            child.stdin.flush()
            child.wait(patient(10))
        until(lambda: flows()[inode(namespaces[0])]["retransmits"] >= 3, 30)
        lossy, fine = (flows()[inode(name)] for name in namespaces)
        assert lossy["pid"] == clients[namespaces[0]].pid
        assert fine["pid"] == clients[namespaces[1]].pid
        assert fine["retransmits"] == 0 and fine["outcome"] is None
        assert 0 < fine["rtt"] < 5 and 0 < lossy["rtt"] < 5
        sent_again = re.search(
            r'process_retransmits_total\{comm="python3?[^"]*"\} (\S+)', scrape(metrics)
        )
        assert sent_again and float(sent_again[1]) >= 3
        summed = re.search(
            r'process_rtt_seconds_count\{comm="python3?[^"]*"\} (\S+)', scrape(metrics)
        )
        assert summed and float(summed[1]) >= 2


FULL = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full:
    full.bind(("127.0.0.1", 0))
    full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    print(full.getsockname()[1], flush=True)
    while True:
        full.sendto(b"x" * 500, full.getsockname())
        time.sleep(0.05)
"""


def test_packets_that_found_no_room_count_for_who_did_not_read_them(
    start: StartDaemon, directory: Path
) -> None:
    metrics = str(directory / "metrics")
    daemon = start(config=f"metrics: {metrics}\n")
    command = [sys.executable, "-c", FULL]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child,
        DaemonClient(daemon.path, timeout=patient(10)) as client,
    ):
        try:
            port = int(there(child.stdout).readline())

            def dropped() -> int:
                owners = client.who(port=port)["owners"]
                return sum(one["drops"] for one in owners if one["pid"] == child.pid)

            until(lambda: dropped() > 3, 30, "drops in an answer")
            found = r'process_dropped_total\{comm="python3?[^"]*"\} ([1-9]\S*)'
            until(lambda: re.search(found, scrape(metrics)), 30, "drops in the metrics")
            words = [sys.executable, "-m", "hunter", "who", "--socket", daemon.path]
            shown = subprocess.run(
                [*words, "--port", str(port)], capture_output=True, text=True, check=True
            )
            assert "dropped" in shown.stdout, shown.stdout
        finally:
            child.kill()


def test_refused_and_unanswered_attempts_are_told_apart(
    start: StartDaemon, namespaces: list[str], directory: Path
) -> None:
    metrics = str(directory / "metrics")
    daemon = start(config=f"metrics: {metrics}\n")
    number = inode(namespaces[0])
    with DaemonClient(daemon.path) as client, inside(namespaces[0], SERVER) as server:
        assert server.stdout.readline() == "ready\n"
        until(lambda: number in {one["netns"] for one in client.owner(8080)["owners"]})
        with inside(namespaces[0], FAILS) as child:
            assert child.stdout.readline() == "ConnectionRefusedError\n"
            assert child.stdout.readline() == "TimeoutError\n"

            def outcomes() -> dict[Any, Any]:
                return {
                    one["rport"]: one["outcome"]
                    for port in (7, 9)
                    for one in client.who(port=port, netns=number)["flows"]
                    if one["rport"] in (7, 9)
                }

            until(lambda: outcomes() == {7: "refused", 9: "unanswered"}, 20, "both outcomes")
        refused = re.search(
            r'failed_connects_total\{[^}]*why="refused"\} ([1-9]\S*)', scrape(metrics)
        )
        assert refused, scrape(metrics)


def test_what_the_kernel_does_not_tell_is_unknown_and_not_zero(
    start: StartDaemon, namespaces: list[str]
) -> None:
    with DaemonClient(start().path) as client:
        number = inode(namespaces[1])
        with inside(namespaces[1], SERVER) as server:
            assert server.stdout.readline() == "ready\n"
            until(lambda: number in {one["netns"] for one in client.owner(8080)["owners"]})
            sender = (
                "import socket; socket.socket(type=2).sendto(b'x', ('127.0.0.1', 8081)); input()"
            )
            with inside(namespaces[1], sender):
                until(lambda: client.who(port=8081, netns=number)["flows"])
                for one in client.who(port=8081, netns=number)["flows"]:
                    assert (one["rtt"], one["retransmits"], one["outcome"]) == (None, None, None)


def test_a_connection_that_ends_is_told_once() -> None:
    import socket

    try:
        info = TcpInfo()
    except NoPrivilege as error:
        pytest.skip(str(error))
    with info, socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        cookie = int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)
        assert cookie in info.open()["cookie"]
        assert cookie not in info.closed()["cookie"]
        one.close()
        other.close()
        told: list[int] = []

        def is_told() -> bool:
            told.extend(info.closed()["cookie"].tolist())
            return cookie in told

        until(is_told)
        assert told.count(cookie) == 1 and cookie not in info.open()["cookie"]
