# SPDX-License-Identifier: MIT
"""The module itself: it loads, says what it is, and leaves without a trace."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nlproto.engine_module import ModuleEngine


def test_module_loads_on_a_kernel_that_has_not_loaded_nf_socket(
    module_file: Path, unloaded: None
) -> None:
    subprocess.run(["insmod", str(module_file)], check=True)
    assert Path("/sys/module/sniffer").exists()


def test_modinfo_describes_every_parameter(module_file: Path) -> None:
    text = subprocess.run(
        ["modinfo", str(module_file)], check=True, capture_output=True, text=True
    ).stdout
    assert "license:" in text and "GPL" in text
    parameters = [line for line in text.splitlines() if line.startswith("parm:")]
    assert parameters
    for line in parameters:
        name, _, description = line.removeprefix("parm:").strip().partition(":")
        assert len(description) > 10, f"{name} is not described"


@pytest.mark.boot("ipv6.disable=1")
def test_module_loads_where_ipv6_is_disabled(module_file: Path, unloaded: None) -> None:
    subprocess.run(["insmod", str(module_file)], check=True)


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


def test_load_and_unload_under_traffic_with_a_reader_leaves_no_trace(
    module_file: Path, unloaded: None
) -> None:
    """The kernel log is read after each test: any warning there fails it."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    traffic = [
        subprocess.Popen(
            [sys.executable, "-c", TRAFFIC], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    named = 0
    for _ in range(6):
        subprocess.run(["insmod", str(module_file)], check=True)
        with ModuleEngine(("packets",)) as engine:
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                for batch in engine.read(0.05):
                    named += int(np.count_nonzero(batch.records["tgid"]))
            # with the reader still there: it must not keep the module, nor crash it
            subprocess.run(["rmmod", "sniffer"], check=True)
    for process in traffic:
        rounds, _ = process.communicate()
        assert process.returncode == 0, "traffic suffered"
        assert int(rounds) > 0
    assert named > 0
