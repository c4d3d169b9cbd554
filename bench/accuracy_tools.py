# SPDX-License-Identifier: MIT
"""Other tools that say whose a connection is, each run as its users run it.

Each yields sightings: (protocol, local port, remote port or 0, pid). All that a tool said during
the run counts for it, also about packets from before it said so: a generous reading. nethogs says
bytes by process and nothing of connections, so it is judged by bytes only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

Sighting = tuple[str, int, int, int]
Key = tuple[str, int, int]
POLL_SECONDS = 0.1


class Missing(Exception):
    """The tool cannot run here; the message says why."""


def ss_sightings(text: str) -> Iterator[Sighting]:
    """Sightings in the output of `ss -tunapH`."""
    for row in text.splitlines():
        fields = row.split()
        if len(fields) < 6:
            continue
        for pid in re.findall(r"pid=(\d+)", row):
            local, remote = fields[4].rpartition(":")[2], fields[5].rpartition(":")[2]
            yield fields[0], int(local), 0 if remote == "*" else int(remote), int(pid)


def poll_ss() -> list[Sighting]:
    done = subprocess.run(["ss", "-tunapH"], capture_output=True, text=True, timeout=30)
    return list(ss_sightings(done.stdout))


def poll_psutil() -> list[Sighting]:
    found = []
    for one in psutil.net_connections("inet"):
        if one.pid and one.laddr:
            proto = "tcp" if one.type == 1 else "udp"
            found.append((proto, one.laddr.port, one.raddr.port if one.raddr else 0, one.pid))
    return found


@contextlib.contextmanager
def polled(name: str, output: Path) -> Iterator[None]:
    """`ss` or psutil, asked ten times a second by a process of its own; sightings go to a file.

    (A thread would not do: the workload forks, and its workers would hold the pipes of `ss`.)
    """
    ask = {"ss": poll_ss, "psutil": poll_psutil}[name]
    pid = os.fork()
    if pid == 0:
        seen: set[Sighting] = set()
        with output.open("w") as file:
            while True:
                started = time.monotonic()
                with contextlib.suppress(psutil.Error, OSError, subprocess.SubprocessError):
                    for one in set(ask()) - seen:
                        seen.add(one)
                        print(*one, file=file, flush=True)
                time.sleep(max(0.0, POLL_SECONDS - (time.monotonic() - started)))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def polled_sightings(text: str) -> Iterator[Sighting]:
    """Sightings that polled() wrote."""
    for row in text.splitlines():
        proto, lport, rport, pid = row.split()
        yield proto, int(lport), int(rport), int(pid)


@contextlib.contextmanager
def running(command: list[str], output: Path, warm_up: float, ready: str = "") -> Iterator[None]:
    """A tool that runs beside the workload, ended by SIGINT.

    It has ``warm_up`` seconds, or, with ``ready``, as many at most until it has printed that.
    """
    if shutil.which(command[0]) is None:
        raise Missing(f"{command[0]} is not installed")
    with output.open("w") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment
        )
        deadline = time.monotonic() + warm_up
        while time.monotonic() < deadline and process.poll() is None:
            if ready and ready in output.read_text():
                break
            time.sleep(0.1)
        try:
            if process.poll() is not None:
                words = output.read_text().strip().splitlines()
                error = [word for word in words if "error:" in word] or words or ["no output"]
                raise Missing(f"{command[0]} stopped: {error[0]}")
            if ready and ready not in output.read_text():
                raise Missing(f"{command[0]} was not ready within {warm_up:.0f} s")
            yield
        finally:
            if process.poll() is None:
                time.sleep(1.5)
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def tcplife_sightings(text: str) -> Iterator[Sighting]:
    """Sightings of tcplife: PID COMM LADDR LPORT RADDR RPORT ..."""
    for row in text.splitlines():
        fields = row.split()
        if len(fields) >= 9 and fields[0].isdigit():
            yield "tcp", int(fields[-6]), int(fields[-4]), int(fields[0])


def tcpconnect_sightings(text: str) -> Iterator[Sighting]:
    """Sightings of tcpconnect -s (libbpf-tools): PID COMM IP SADDR DADDR SPORT DPORT."""
    for row in text.splitlines():
        fields = row.split()
        if len(fields) >= 7 and fields[0].isdigit():
            yield "tcp", int(fields[-2]), int(fields[-1]), int(fields[0])


def nethogs_bytes(text: str) -> dict[int, int]:
    """Bytes by pid (0: unknown) at the end of `nethogs -t -v 2`."""
    totals: dict[int, int] = {}
    for row in text.splitlines():
        match = re.match(r"(.*)/(\d+)/(\d+)\t([\d.e+]+)\t([\d.e+]+)$", row)
        if match:
            pid = int(match[2])
            # Totals since the start: the largest is the last; unknown rows are several.
            key = pid if pid else -(hash(match[1]) & 0xFFFF) - 1
            totals[key] = max(totals.get(key, 0), int(float(match[4]) + float(match[5])))
    unknown = sum(size for pid, size in totals.items() if pid < 0)
    return {**{pid: size for pid, size in totals.items() if pid > 0}, 0: unknown}
