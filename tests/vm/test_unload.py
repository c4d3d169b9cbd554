# SPDX-License-Identifier: MIT
"""The module leaves while traffic flows and readers listen, and nothing of it stays."""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path

import pytest

from nlproto.engine_module import ModuleEngine
from nlproto.errors import NoModule
from nlproto.netlink import Sniffer

KPROBES = Path("/sys/kernel/debug/kprobes/list")
OURS = ("security_socket_", "security_sock_graft", "security_sk_free", "locks_remove_posix")


def send(stop: threading.Event) -> None:
    """Datagrams and connections over loopback until told to stop."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        while not stop.is_set():
            udp.sendto(b"x", ("127.0.0.1", 9))
            with socket.create_connection(server.getsockname()), server.accept()[0]:
                pass
        udp.close()


def test_the_module_unloads_under_traffic_and_leaves_nothing(
    module_file: Path, unloaded: None
) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    stop = threading.Event()
    traffic = threading.Thread(target=send, args=(stop,))
    traffic.start()
    try:
        for _ in range(5):
            subprocess.run(["insmod", str(module_file)], check=True)
            with ModuleEngine(("packets", "processes", "snaps")) as engine:
                while not list(engine.read(0.5)):
                    pass
                subprocess.run(["rmmod", "sniffer"], check=True)
                with pytest.raises(NoModule):
                    while True:
                        list(engine.read(0.5))
            with pytest.raises(NoModule), Sniffer() as sniffer:
                sniffer.info()
    finally:
        stop.set()
        traffic.join()
    assert not Path("/sys/module/sniffer").exists()
    assert "[sniffer]" not in Path("/proc/kallsyms").read_text()
    if not KPROBES.exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    probes = KPROBES.read_text()
    assert [line for line in probes.splitlines() if any(name in line for name in OURS)] == []
