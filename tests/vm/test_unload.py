# SPDX-License-Identifier: MIT
"""The module comes and goes while traffic flows and readers listen, and nothing of it stays.

The kernel log is read after each test: any warning there fails it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from stress import stress

from nlproto.engines.module import ModuleEngine
from nlproto.errors import NoModule
from nlproto.kernel.netlink import Sniffer
from nlproto.records.wire import Batch

CYCLES = int(os.environ.get("PACKET_HUNTER_CYCLES", "4"))
"""Loads and unloads under churn; a cycle takes an emulated guest some ten seconds."""
GROUPS = ("packets", "processes", "snaps")
KPROBES = Path("/sys/kernel/debug/kprobes/list")
OURS = ("security_socket_", "security_sock_graft", "security_sk_free", "locks_remove_posix")
TRAFFIC = """
import select, socket, sys, threading
server = socket.create_server(("127.0.0.1", 0), backlog=64)
receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
receiver.bind(("::1", 0))

def serve():
    while True:
        peer, _ = server.accept()
        peer.sendall(peer.recv(1000))
        peer.close()

threading.Thread(target=serve, daemon=True).start()
count = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", receiver.getsockname())
        receiver.recv(10)
    with socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x" * 500)
        assert client.recv(1000)
    count += 1
print(count)
"""


def test_the_module_comes_and_goes_under_traffic_and_leaves_nothing(
    module_file: Path, unloaded: None
) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    command = [sys.executable, "-c", TRAFFIC]
    traffic = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for _ in range(6):
        subprocess.run(["insmod", str(module_file)], check=True)
        with ModuleEngine(GROUPS) as engine:
            named = 0
            while not named:
                batches = (event for event in engine.read(0.5) if isinstance(event, Batch))
                named += sum(int(np.count_nonzero(batch.records["tgid"])) for batch in batches)
            # with the reader still there: it must not keep the module, nor crash it
            subprocess.run(["rmmod", "sniffer"], check=True)
            with pytest.raises(NoModule):
                while True:
                    list(engine.read(0.5))
        with pytest.raises(NoModule), Sniffer() as sniffer:
            sniffer.info()
    for process in traffic:
        rounds, _ = process.communicate()
        assert process.returncode == 0, "traffic suffered"
        assert int(rounds) > 0
    assert not Path("/sys/module/sniffer").exists()
    assert "[sniffer]" not in Path("/proc/kallsyms").read_text()
    if not KPROBES.exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    probes = KPROBES.read_text()
    assert [line for line in probes.splitlines() if any(name in line for name in OURS)] == []


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _end(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@contextmanager
def churn() -> Iterator[None]:
    """TCP, UDP, descriptors, network namespaces and the second CPU come and go."""
    jobs = (
        *(stress.tcp_server, stress.tcp_client, stress.tcp_client, stress.udp),
        *(stress.passing, stress.namespaces, stress.hotplug),
    )
    pids = [_fork(job) for job in jobs if job is not stress.hotplug or stress.SECOND_CPU.exists()]
    try:
        yield
    finally:
        for pid in pids:
            _end(pid)
        if stress.SECOND_CPU.exists():
            stress.SECOND_CPU.write_text("1")


def _reader(joined: int) -> None:
    """Reads until the module is gone."""
    with ModuleEngine(GROUPS) as engine:
        os.write(joined, b"x")
        try:
            while True:
                list(engine.read(0.5))
        except NoModule:
            return


def _cycle(module_file: Path) -> None:
    """Load and unload with three readers: one that reads, one that has stopped, one that dies."""
    subprocess.run(["insmod", str(module_file)], check=True)
    ready, joined = os.pipe()
    reading, stopped, dying = (_fork(lambda: _reader(joined)) for _ in range(3))
    count = 0
    while count < 3:
        count += len(os.read(ready, 3))
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.2)  # so that batches wait for it
    unload = subprocess.Popen(["rmmod", "sniffer"])
    _end(dying)
    assert unload.wait() == 0
    assert os.waitpid(reading, 0)[1] == 0
    _end(stopped)
    os.close(ready)
    os.close(joined)


def _objects() -> int:
    """Objects in the kernel's caches for kmalloc (slabinfo(5)), once all that waits is freed."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    rows = Path("/proc/slabinfo").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("kmalloc-"))


def _kib(field: str) -> int:
    """A line of /proc/meminfo."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition(f"{field}:")[2].split()[0])


@pytest.mark.patience(600 + 60 * CYCLES)
def test_it_comes_and_goes_under_churn_and_leaves_no_memory(
    module_file: Path, unloaded: None
) -> None:
    """PACKET_HUNTER_CYCLES times. What stays a process or socket that came would be hundreds."""
    subprocess.run(["ip", "link", "set", "lo", "up", "multicast", "on"], check=True)
    subprocess.run(["ip", "route", "add", "239.0.0.0/8", "dev", "lo"], check=False)
    with churn():
        _cycle(module_file)
    before, percpu = _objects(), _kib("Percpu")
    with churn():
        for _ in range(CYCLES):
            _cycle(module_file)
    grown, percpu = _objects() - before, _kib("Percpu") - percpu
    print(f"{CYCLES} cycles, {grown:+} objects, per-CPU memory {percpu:+} KiB")
    assert grown < 2000 + 20 * CYCLES
    # namespaces that wait for their end; what the module has, left each time, would be 40 KiB
    assert percpu < 1000 + CYCLES
    assert "[sniffer]" not in Path("/proc/kallsyms").read_text()
