# SPDX-License-Identifier: MIT
"""Situations from reports about other tools, with a real engine (unit/test_public_reports.py)."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from typing import Any

import pytest

from daemons import Daemon, StartDaemon
from nlproto.client.client import DaemonClient
from translating import ask
from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

SAYS = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.sendto(b"x", ("127.0.0.1", int(sys.argv[1])))
    print("sent", flush=True)
    while sys.stdin.readline():
        one.sendto(b"x", ("127.0.0.1", int(sys.argv[1])))
        print("sent", flush=True)
"""


def test_a_second_run_has_its_own_arguments(start: StartDaemon, receiver: socket.socket) -> None:
    """One program twice, at the same time and one after the other, under other names too."""
    daemon, port = start(config="cmdline: full\n"), str(receiver.getsockname()[1])
    wanted = {}
    for name, argument in (("one", "first"), ("one", "second"), ("other", "third")):
        with subprocess.Popen(
            [name, "-c", SAYS, port, argument],
            executable=sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            wanted[child.pid] = name, argument

            def known() -> Any:
                print(file=there(child.stdin), flush=True)
                assert there(child.stdout).readline()
                return [one for one in ask(daemon.path, port=int(port)) if one["pid"] == child.pid]

            until(known, 20, "its flow")
    with DaemonClient(daemon.path, timeout=patient(10)) as asking:
        told = {one["tgid"]: one["cmdline"] for one in asking.who(port=int(port))["processes"]}
    for pid, (name, argument) in wanted.items():
        assert told[pid].startswith(f"{name} -c "), told[pid]
        assert told[pid].endswith(f" {port} {argument}"), told[pid]


def segment(sport: int, dport: int) -> bytes:
    """A SYN from and to 127.0.0.1 with its IP header, as a scanner makes it."""
    address = socket.inet_aton("127.0.0.1")
    tcp = struct.pack(">HHIIBBHHH", sport, dport, 1, 0, 5 << 4, 2, 1024, 0, 0)
    pseudo = address * 2 + struct.pack(">BBH", 0, 6, len(tcp)) + tcp
    total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
    total = (total >> 16) + (total & 0xFFFF)
    total = ~(total + (total >> 16)) & 0xFFFF
    tcp = tcp[:16] + struct.pack(">H", total) + tcp[18:]
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, 6, 0, address, address) + tcp


def test_a_scan_by_a_raw_socket_is_nobodys_and_a_closed_port_says_so(daemon: Daemon) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as closed,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as scanner,
    ):
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        own, ports = 61_000 + os.getpid() % 4000, {}
        ports["open"], ports["closed"] = server.getsockname()[1], closed.getsockname()[1]

        def seen() -> Any:
            for port in ports.values():
                scanner.sendto(segment(own, port), ("127.0.0.1", 0))
            found = ask(daemon.path, port=own)
            sent = {one["rport"]: one for one in found if one["lport"] == own}
            came = {one["lport"]: one for one in found if one["rport"] == own}
            whole = sent.keys() >= set(ports.values()) and came.keys() >= set(ports.values())
            return (sent, came) if whole else None

        sent, came = until(seen, 20, "both sides of both SYNs")
        for port in ports.values():
            assert sent[port]["pid"] is None
            assert sent[port]["how"] in ("socket_gone", "no_socket")
        assert came[ports["closed"]]["pid"] is None
        assert came[ports["closed"]]["how"] == "no_socket"
        assert came[ports["open"]]["pid"] in (None, os.getpid())


@pytest.mark.skipif(
    subprocess.run(["setpriv", "--version"], capture_output=True).returncode != 0,
    reason="setpriv is not installed",
)
def test_capabilities_alone_are_enough_for_the_names_of_others(receiver: socket.socket) -> None:
    held = "+net_raw,+net_admin,+sys_ptrace,+dac_read_search,+sys_admin"
    port = receiver.getsockname()[1]
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    words += [f"--inh-caps={held}", f"--ambient-caps={held}", sys.executable, "-m", "hunter"]
    words += ["--engine", "packet", "--socket", "/nonexistent/none.sock", "-c", "2", "--json"]
    with (
        subprocess.Popen(
            [*words, "udp", "port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        ) as child,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        deadline = time.monotonic() + patient(30)
        while child.poll() is None and time.monotonic() < deadline:
            sender.sendto(b"x", ("127.0.0.1", port))
            time.sleep(0.05)
        child.kill()
        shown, told = child.communicate()
    rows = [json.loads(line) for line in shown.splitlines()]
    assert len(rows) == 2, told
    assert {row["pid"] for row in rows} == {os.getpid()}, rows
