# SPDX-License-Identifier: MIT
"""-i follows a name: an interface that goes and comes back has another index (root)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

HUNTER = [sys.executable, "-m", "hunter"]
SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"usb9")
    for _ in range(5):
        peer.sendto(b"x" * 10, ("10.99.0.2", int(sys.argv[1])))
"""


@pytest.fixture
def place() -> Iterator[list[Any]]:
    name = f"usb-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "del", name], check=True)


def plug(place: Any) -> None:
    for command in (
        "link add usb9 type veth peer name peer9",
        "addr add 10.99.0.1/24 dev usb9",
        "link set usb9 up",
        "link set peer9 up",
        "neigh add 10.99.0.2 lladdr 02:00:00:00:00:09 dev usb9",
    ):
        subprocess.run([*place, "ip", *command.split()], check=True)


def send(place: Any, port: int) -> None:
    subprocess.run([*place, sys.executable, "-c", SEND, str(port)], check=True)


def told(hunter: Any, words: Any) -> Any:
    lines: list[Any] = []
    while not lines or words not in lines[-1]:
        line = hunter.stderr.readline()
        assert line, lines
        lines.append(line)
    return lines


def count(path: Any, port: int) -> Any:
    return path.read_text().count(f",10.99.0.2,{port},")


@pytest.mark.parametrize("way", ["alone", "daemon"])
def test_an_interface_that_comes_back_is_followed(
    way: str, place: list[Any], tmp_path: Path
) -> None:
    plug(place)
    path = tmp_path / "x.csv"
    daemon = None
    source = ["--engine", "packet"]
    if way == "daemon":
        socket = str(tmp_path / "d.sock")
        command = [sys.executable, "-m", "daemon", "--engine", "packet", "--socket", socket]
        daemon = subprocess.Popen([*place, *command], stderr=subprocess.PIPE, text=True)
        told(daemon, "serving")
        source = ["--socket", socket]
    hunter = subprocess.Popen(
        [*place, *HUNTER, *source, "-i", "usb9", "--save", path], stderr=subprocess.PIPE, text=True
    )
    try:
        told(hunter, "Ctrl-C ends")
        send(place, 1001)
        until(lambda: count(path, 1001) == 5, 60)
        subprocess.run([*place, "ip", "link", "del", "usb9"], check=True)
        told(hunter, "interface usb9 is gone; waiting for it to come back")
        plug(place)
        told(hunter, "interface usb9 is back")
        send(place, 1002)
        until(lambda: count(path, 1002) == 5, 60)
        hunter.send_signal(signal.SIGTERM)
        _, rest = hunter.communicate(timeout=60)
        assert hunter.returncode == 0 and "Traceback" not in rest
        assert "does not close" not in rest
    finally:
        hunter.kill()
        hunter.wait()
        if daemon is not None:
            daemon.terminate()
            daemon.communicate(timeout=60)
