# SPDX-License-Identifier: MIT
"""Runs the hunter as a program, beside a server that echoes."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from waiting import patient

HUNTER = [sys.executable, "-m", "hunter"]
DAEMON = [sys.executable, "-m", "daemon"]

ECHO = """
import os, socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(os.getpid(), server.getsockname()[1], flush=True)
    while True:
        peer, _ = server.accept()
        while data := peer.recv(65536):
            peer.sendall(data)
        peer.close()
"""

TALK = """
import socket, sys, time
time.sleep(float(sys.argv[3]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as peer:
    for _ in range(int(sys.argv[2])):
        peer.sendall(b"x" * 100)
        peer.recv(100, socket.MSG_WAITALL)
        time.sleep(0.01)
    time.sleep(float(sys.argv[4]))
"""


@contextlib.contextmanager
def echo() -> Iterator[tuple[int, int]]:
    process = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pid, port = map(int, process.stdout.readline().split())
        yield pid, port
    finally:
        process.kill()
        process.communicate()


def hunt(
    *arguments: object, timeout: float = 60, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HUNTER, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=patient(timeout),
        **options,
    )


# as nobody, who may still read this Python wherever it is installed
_SETPRIV = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all,+dac_read_search"
NOBODY = [
    *_SETPRIV.split(),
    "--ambient-caps=+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
]


def hunt_as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*NOBODY, *HUNTER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=patient(60))


def talk(port: int, times: int = 5, wait: float = 0.2) -> list[str]:
    """Engine packet can name nobody whose socket is gone before it has asked: it stays a while."""
    words = (TALK, port, times, patient(wait), patient(0.3))
    return ["--all", "--", sys.executable, "-c", *map(str, words)]


@contextlib.contextmanager
def traffic(port: int) -> Iterator[None]:
    """Echoes on one connection until the end of the context."""
    ended = threading.Event()

    def run() -> None:
        with socket.create_connection(("127.0.0.1", port)) as peer:
            while not ended.wait(0.005):
                peer.sendall(b"x" * 50)
                peer.recv(50, socket.MSG_WAITALL)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def begun(process: subprocess.Popen[str]) -> None:
    """Wait for the greeting on stderr."""
    assert process.stderr is not None
    line = process.stderr.readline()
    while "Ctrl-C ends" not in line:
        assert line, "the hunter ended at once"
        line = process.stderr.readline()


def account_of(stderr: str) -> dict[str, int]:
    """The figures of the closing account, checked to close."""
    seen = re.search(r"(\d+) packets seen", stderr)
    records = re.search(r"(\d+) records = (\d+) delivered \+ (\d+) lost", stderr)
    shown = re.search(r"(\d+) (?:shown|saved) = (\d+) named.*? \+ (\d+) unnamed", stderr)
    assert seen and records and shown, stderr
    assert int(records[1]) == int(records[2]) + int(records[3])
    assert int(shown[1]) == int(shown[2]) + int(shown[3])
    return {
        "seen": int(seen[1]),
        "delivered": int(records[2]),
        "lost": int(records[3]),
        "shown": int(shown[1]),
        "named": int(shown[2]),
    }


def owners(rows: Iterable[Mapping[str, Any]], port: int) -> tuple[set[Any], set[Any]]:
    """pid of the records of either end of connections to `port`: (server's, client's)."""
    server: set[Any] = set()
    client: set[Any] = set()
    for row in rows:
        own = row["sport"] if row["dir"] == "out" else row["dport"]
        (server if int(own) == port else client).add(row["pid"])
    return server, client
