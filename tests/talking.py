# SPDX-License-Identifier: MIT
"""Two processes that talk, a hunter that looks on, and what tshark reads of its capture."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from waiting import patient, there, until

__all__ = ["HUNTER", "hunting", "looking", "peers", "stop", "talk", "tshark"]

HUNTER = [sys.executable, "-m", "hunter"]

PEERS = """
import os, socket, sys, time
with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(
    socket.AF_INET6, socket.SOCK_DGRAM
) as udp:
    udp.bind(("::1", 0))
    print(os.getpid(), server.getsockname()[1], udp.getsockname()[1], flush=True)
    peer, _ = server.accept()
    while data := peer.recv(100):
        peer.sendall(data)
        data, sender = udp.recvfrom(100)
        udp.sendto(data, sender)
"""


@contextlib.contextmanager
def peers() -> Iterator[tuple[int, int, int]]:
    """(pid, TCP port, UDP port) of a process that sends back what it gets."""
    process = subprocess.Popen([sys.executable, "-c", PEERS], stdout=subprocess.PIPE, text=True)
    try:
        pid, tcp, udp = map(int, there(process.stdout).readline().split())
        yield pid, tcp, udp
    finally:
        process.kill()
        process.communicate()


def talk(
    tcp: int,
    udp: int,
    times: int = 10,
    pause: float = 0.01,
    seen: Callable[[], object] | None = None,
) -> None:
    """Ask and answer over both. The sockets stay until `seen()`, else for a while.

    Engine packet names nobody whose socket is gone before it has asked.
    """
    with (
        socket.create_connection(("127.0.0.1", tcp)) as one,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other,
    ):
        other.connect(("::1", udp))
        time.sleep(patient(0.1))
        for _ in range(times):
            one.sendall(b"x" * 50)
            one.recv(50)
            other.send(b"y" * 30)
            other.recv(50)
            time.sleep(pause)
        if seen is None:
            time.sleep(patient(0.2))
        else:
            until(seen, 60)


def hunting(*arguments: object) -> subprocess.Popen[str]:
    """A hunter that has begun; stop() ends it and gives its stderr."""
    process = subprocess.Popen(
        [*HUNTER, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = there(process.stderr).readline()
    while "Ctrl-C ends" not in line:
        assert line, "the hunter ended at once"
        line = there(process.stderr).readline()
    return process


def stop(process: subprocess.Popen[str]) -> str:
    """End a hunter; what it said."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=patient(30))
    assert process.returncode == 0, err
    return str(err)


def looking(path: str, *words: str) -> tuple[subprocess.Popen[str], Callable[[], str]]:
    """A hunter at the daemon of socket `path`, and what ends it and gives what it showed."""
    process = hunting("--socket", path, "-n", *words)

    def end() -> str:
        process.send_signal(signal.SIGINT)
        return str(process.communicate(timeout=patient(30))[0])

    return process, end


def tshark(path: Path, *fields: str) -> list[list[str]]:
    """`fields` of each packet."""
    arguments = [part for field in fields for part in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", str(path), "-n", "-T", "fields", "-E", "separator=|", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=patient(60),
    )
    return [line.split("|") for line in done.stdout.splitlines()]
