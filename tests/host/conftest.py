# SPDX-License-Identifier: MIT
"""Daemons, engines, workers; room for 1,000 sockets where a login allows 1,024 files."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from capturing import COMMON, Run, StartRun, StartWorker
from daemons import Daemon, StartDaemon, senders
from hunting import echo
from places import open_to_all
from waiting import there

FILES = 8192

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if soft != resource.RLIM_INFINITY and soft < FILES:
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.fixture(name="directory")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_to_all(tmp_path_factory.mktemp("daemon"))


@pytest.fixture(name="start")
def _start(directory: Path) -> Iterator[StartDaemon]:
    started = []

    def start(*arguments: str, config: str = "") -> Daemon:
        daemon = Daemon(directory, *arguments, config=config)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.process.send_signal(signal.SIGCONT) if daemon.process.poll() is None else None
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


@pytest.fixture(name="daemon")
def _daemon(start: StartDaemon) -> Daemon:
    return start()


@pytest.fixture(name="receiver")
def _receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        yield receiver


@pytest.fixture(autouse=True)
def _senders_stay_until_the_test_ends() -> Iterator[None]:
    """Engine packet names by a socket that is still there."""
    yield
    while senders:
        senders.pop().close()


@pytest.fixture(name="server")
def _server() -> Iterator[tuple[int, int]]:
    with echo() as found:
        yield found


@pytest.fixture(name="no_daemon")
def _no_daemon(tmp_path: Path) -> list[str]:
    return ["--socket", str(tmp_path / "none.sock"), "--engine", "packet"]


@pytest.fixture(name="run")
def _run() -> Iterator[StartRun]:
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Run:
            made = Run(**options)
            stack.callback(made.engine.close)
            stack.callback(made.stop)
            return made

        yield start


@pytest.fixture(name="worker")
def _worker() -> Iterator[StartWorker]:
    running = []

    def start(code: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [*prefix, sys.executable, "-c", COMMON + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        return child

    yield start
    for child in running:
        child.kill()
        child.wait()
        there(child.stdin).close()
        there(child.stdout).close()
