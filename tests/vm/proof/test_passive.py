# SPDX-License-Identifier: MIT
"""The module only looks: traffic stays the same to the byte; a stopped reader costs a bound."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

import pytest
from sockets import LOOPBACK, insert, udp_receiver

from nlproto.engines.module import ModuleEngine
from nlproto.kernel.netlink import Sniffer

pytestmark = pytest.mark.usefixtures("loopback_is_up")

LONG = bool(os.environ.get("PACKET_HUNTER_LONG"))
ETH_P_ALL = 3
PORT = 7321
ROOM = 1 << 19  # bytes of the socket that is not read; the engine's own is 16 MiB
STREAM = """
import hashlib, os, random, socket, sys
data = random.Random(7).randbytes(int(sys.argv[1]))
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
peer, _ = server.accept()
if not os.fork():
    peer.close()
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    back = hashlib.sha256()
    while some := client.recv(65536):
        back.update(some)
    os._exit(back.digest() != hashlib.sha256(data).digest())
client.close()
there = b""
while some := peer.recv(65536):
    there += some
peer.sendall(there)
peer.close()
_, status = os.wait()
print(hashlib.sha256(there).hexdigest(), status)
"""


def packets(count: int) -> str:
    """Hash of `count` UDP packets as the loopback device has them, but for the IP header's id."""
    generator = random.Random(7)
    seen = hashlib.sha256()
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(capture), closing(sender), closing(receiver):
        capture.bind(("lo", ETH_P_ALL))
        sender.bind((LOOPBACK, PORT))
        receiver.bind((LOOPBACK, PORT + 1))
        for number in range(count):
            data = generator.randbytes(generator.choice((0, 1, 100, 1400, 9000)))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1 + number % 255)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 4 * (number % 64))
            sender.sendto(data, receiver.getsockname())
            assert receiver.recv(10000) == data
            for _ in range(2):  # it goes out and comes in
                packet = bytearray(capture.recv(20000))
                while packet[9] != 17 or struct.unpack_from(">H", packet, 20)[0] != PORT:
                    packet = bytearray(capture.recv(20000))
                packet[4:6] = packet[10:12] = b"\0\0"
                seen.update(packet)
    return seen.hexdigest()


def stream(size: int) -> str:
    command = [sys.executable, "-c", STREAM, str(size)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.patience(1800)
def test_traffic_is_the_same_to_the_byte(module_file: Path, unloaded: None) -> None:
    """Packets with every TTL and TOS, and a stream there and back: without, loaded, and read."""
    size, count = (50 << 20, 5000) if LONG else (2 << 20, 300)
    found = {"without": (packets(count), stream(size))}
    insert(module_file)
    found["loaded"] = (packets(count), stream(size))
    with ModuleEngine(("packets", "snaps", "processes", "flows")) as engine:
        found["read"] = (packets(count), stream(size))
        assert any(True for _ in engine.read(1))
    print(found["without"])
    assert len(set(found.values())) == 1, found
    assert found["read"][1].endswith(" 0")


def _latencies(rounds: int) -> list[float]:
    """Seconds of each of so many requests with their answers, over one connection, sorted."""
    server = socket.create_server((LOOPBACK, 0))
    client = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    server.close()
    pid = os.fork()
    if pid == 0:
        client.close()
        while some := peer.recv(100):
            peer.sendall(some)
        os._exit(0)
    peer.close()
    taken = []
    with closing(client):
        for _ in range(rounds):
            begun = time.perf_counter()
            client.sendall(b"x" * 50)
            client.recv(100)
            taken.append(time.perf_counter() - begun)
    os.waitpid(pid, 0)
    return sorted(taken)


@pytest.mark.patience(1800)
def test_answers_come_as_soon_as_without(module_file: Path, unloaded: None) -> None:
    """Percentiles of request and answer, in turns: without, and loaded while nobody listens."""
    rounds, turns = (3000, 10) if LONG else (500, 4)
    without: list[float] = []
    loaded: list[float] = []
    for _ in range(turns):
        without += _latencies(rounds)
        insert(module_file)
        loaded += _latencies(rounds)
        subprocess.run(["rmmod", "sniffer"], check=True)
    for taken in (without, loaded):
        taken.sort()
    ratios = []
    for percent in (10, 50, 90, 99):
        before, after = (one[len(one) * percent // 100] * 1e6 for one in (without, loaded))
        ratios.append(after / before)
        print(
            f"p{percent}: {before:.0f} us without, {after:.0f} us loaded, {after / before - 1:+.1%}"
        )
    assert min(ratios[:2]) < 1.15


def _memory() -> int:
    """KiB of slab and of pages that sockets hold (meminfo(5), sockstat)."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    text = Path("/proc/meminfo").read_text()
    return sum(int(text.partition(f"\n{f}:")[2].split()[0]) for f in ("Slab", "Percpu"))


def _send(count: int) -> float:
    begun = time.process_time()
    with closing(udp_receiver()) as receiver, socket.socket(2, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x" * 100, receiver.getsockname())
            receiver.recv(100)
    return time.process_time() - begun


@pytest.mark.patience(3600)
def test_a_reader_that_has_stopped_costs_nothing_that_grows(
    module_file: Path, unloaded: None
) -> None:
    """It keeps what its socket has room for; memory and the time of a packet stay as they are."""
    rounds, count = (20, 20_000) if LONG else (6, 1_000)
    insert(module_file)
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with ModuleEngine(("packets", "snaps", "processes")) as engine:
            with socket.socket(fileno=os.dup(engine._listener.fileno())) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)
            os.write(told, b"x")
            while True:
                list(engine.read(1))
    os.read(ready, 1)
    with ExitStack() as ends:
        ends.callback(os.waitpid, pid, 0)
        ends.callback(os.kill, pid, signal.SIGKILL)
        os.kill(pid, signal.SIGSTOP)
        sniffer = ends.enter_context(Sniffer())
        while int(sniffer.counters()["lost_batch"]) == 0:
            _send(count)
        first, memory, times = int(sniffer.counters()["lost_batch"]), _memory(), []
        for _ in range(rounds):
            times.append(_send(count))
        grown = _memory() - memory
        lost = int(sniffer.counters()["lost_batch"]) - first
    print(f"room {ROOM} B, then {lost} records lost, memory {grown:+} KiB, CPU {times}")
    assert lost > rounds * count
    assert grown < 4096
    half = rounds // 2
    assert median(times[half:]) < 2 * median(times[:half])
