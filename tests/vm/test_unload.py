# SPDX-License-Identifier: MIT
"""The module comes and goes while traffic flows and readers listen, and nothing of it stays.

The kernel log is read after each test: any warning there fails it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nlproto.engines.module import ModuleEngine
from nlproto.errors import NoModule
from nlproto.kernel.netlink import Sniffer
from nlproto.records.wire import Batch

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
        with ModuleEngine(("packets", "processes", "snaps")) as engine:
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
