# SPDX-License-Identifier: MIT
"""The module while somebody attacks: bounds hold, and a process that talks keeps its name.

PACKET_HUNTER_LONG=1 plays each attack in full (attribution/c/attack.c). The kernel's watchdogs of
stalls and lockups are read after each test, as everything that it says.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from attribution.recorder import Recorder
from attribution.workers import BINARIES, compile_workers
from sockets import LOOPBACK, insert, reasons, udp_receiver
from test_table import _own_objects

from nlproto.kernel.netlink import Sniffer

pytestmark = pytest.mark.usefixtures("loopback_is_up")

LONG = bool(os.environ.get("PACKET_HUNTER_LONG"))
# Attack and how often, with PACKET_HUNTER_LONG and without.
ATTACKS = {
    "syn": (200_000, 4_000),
    "scan": (130_000, 3_000),
    "fragments": (200_000, 4_000),
    "namespaces": (10_000, 30),
    "forks": (20_000, 300),
    "churn": (1_000_000, 4_000),
}
SOCKETS, PROCESSES = 2048, 512
STEADY = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
peer, _ = server.accept()
print(server.getsockname()[1], client.getsockname()[1], flush=True)
while True:
    client.sendall(b"x" * 100)
    peer.recv(1000)
    peer.sendall(b"y" * 100)
    client.recv(1000)
    time.sleep(0.02)
"""
compile_workers(BINARIES)


@contextmanager
def steady() -> Iterator[tuple[int, set[int]]]:
    """A process that talks to itself all the while: its pid and the two ports."""
    talker = subprocess.Popen([sys.executable, "-c", STEADY], stdout=subprocess.PIPE)
    try:
        assert talker.stdout is not None
        yield talker.pid, set(map(int, talker.stdout.readline().split()))
    finally:
        talker.kill()
        talker.wait()


def attack(kind: str, port: int) -> subprocess.Popen[bytes]:
    count = str(ATTACKS[kind][0 if LONG else 1])
    if kind == "churn":
        return subprocess.Popen([BINARIES / "churn", "0", count])
    return subprocess.Popen([BINARIES / "attack", kind, count, str(port)])


@pytest.mark.patience(7200 if LONG else 600)
@pytest.mark.parametrize("tables", ["roomy", "full"])
@pytest.mark.parametrize("kind", ATTACKS)
def test_who_talks_keeps_his_name_while_somebody_attacks(
    module_file: Path, unloaded: None, kind: str, tables: str
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    room = 64 if tables == "full" else SOCKETS
    insert(module_file, f"max_sockets={room}", f"max_processes={PROCESSES}")
    with ExitStack() as ends:
        talker, ports = ends.enter_context(steady())
        server = ends.enter_context(socket.create_server((LOOPBACK, 0), backlog=16))
        sniffer = ends.enter_context(Sniffer())
        if tables == "full":
            fill = [ends.enter_context(udp_receiver()) for _ in range(room + 10)]
            assert int(sniffer.info()["sockets"]) == room <= len(fill)
        objects, most = _own_objects(), 0
        with Recorder("module") as recorder:
            attacker = attack(kind, server.getsockname()[1])
            while attacker.poll() is None:
                recorder.read(0.2)
                info = sniffer.info()
                most = max(most, int(info["sockets"]))
                assert int(info["sockets"]) <= room
                assert int(info["processes"]) <= PROCESSES
            assert attacker.returncode == 0
            time.sleep(0.1)
            records = recorder.finish()
            faults = recorder.faults(records, lossy=True)
        grown = _own_objects() - objects
    ours = records[np.isin(records["sport"], list(ports)) & np.isin(records["dport"], list(ports))]
    print(f"{len(records)} records, {len(ours)} of who talked; {most} sockets, {grown:+} objects")
    assert len(ours) > 20
    assert set(ours["tgid"]) == {talker}
    assert [fault for fault in faults if "nothing was lost" not in fault] == []
    assert grown <= 3 * (room + PROCESSES)
    if tables == "full":
        assert "socket_gone" not in reasons(records)


def _seconds(children: int) -> float:
    begun = time.monotonic()
    subprocess.run([BINARIES / "attack", "forks", str(children)], check=True)
    return time.monotonic() - begun


@pytest.mark.patience(3600 if LONG else 600)
def test_a_storm_of_forks_takes_no_longer(module_file: Path, unloaded: None) -> None:
    """Children of one with 200 sockets, each of which uses one; the fastest of some rounds."""
    rounds, children = (12, 400) if LONG else (5, 150)
    without, loaded = [], []
    for _ in range(rounds):
        without.append(_seconds(children))
        insert(module_file)
        loaded.append(_seconds(children))
        subprocess.run(["rmmod", "sniffer"], check=True)
    cost = min(loaded) / min(without) - 1
    print(f"{min(without):.2f} s without, {min(loaded):.2f} s with the module: {cost:+.1%}")
    assert cost < 0.10
