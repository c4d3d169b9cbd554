# SPDX-License-Identifier: MIT
"""A daemon of a test's own, and traffic for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from nlproto.client.client import ClientEvent, DaemonClient, StreamBatch
from nlproto.errors import NoDaemon
from waiting import patient, until

# A user of this run's own: what others on this machine do as nobody is not ours.
NOBODY = 60000 + os.getpid() % 5000


class Daemon:
    """One daemon process and its log."""

    def __init__(self, directory: Path, *arguments: str, config: str = "") -> None:
        self.path = str(directory / "daemon.sock")
        self.config = directory / "daemon.yaml"
        self.config.write_text(config)
        self.log = directory / "log"
        command = [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--foreground"]
        command += ["--socket", self.path, "--config", str(self.config), *arguments]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, cwd="/")
        self.wait_for("serving")

    def wait_for(self, text: str, seconds: float = 30) -> None:
        until(lambda: text in self.text() or self._ended(), seconds, f"{text!r} in {self.log}")

    def _ended(self) -> bool:
        assert self.process.poll() is None, self.text()
        return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(patient(20))

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


def scrape(path: Path | str) -> str:
    """The metrics at a UNIX socket."""
    command = ["curl", "-s", "--max-time", "20", "--unix-socket", str(path), "http://x/metrics"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


senders: list[socket.socket] = []


class StartDaemon(Protocol):
    """The fixture `start`: starts a daemon with these arguments and this configuration."""

    def __call__(self, *arguments: str, config: str = "") -> Daemon: ...


def send(port: int, count: int = 1, pause: float = 0.0, size: int = 20) -> None:
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    senders.append(sender)
    for _ in range(count):
        sender.sendto(b"x" * size, ("127.0.0.1", port))
        if pause:
            time.sleep(pause)


def records_of(events: Iterable[ClientEvent]) -> list[np.void]:
    return [r for e in events if isinstance(e, StreamBatch) for r in e.batch.records]


def drain(client: DaemonClient) -> list[ClientEvent]:
    events: list[ClientEvent] = []
    try:
        while found := client.read(5):
            events += found
    except NoDaemon:
        pass
    return events


def send_burst(port: int, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))
        time.sleep(0.02)
