# SPDX-License-Identifier: MIT
"""The daemon's history on a real full disk, with clocks that jump, under a real flood. Root."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.client.client import DaemonClient
from waiting import there, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")

YEARS = 20 * 365 * 86400
# Users of this run's own.
BOB = 60000 + os.getpid() % 2000
CAROL = BOB + 2000


@pytest.fixture(name="disk")
def _disk(directory: Path) -> Iterator[Any]:
    """A file system of 8 MiB."""
    disk = directory / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "ph", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


class Daemon(subprocess.Popen[bytes]):
    """A daemon that writes to `log` and serves at `socket`."""

    def __init__(self, log: Path, socket: str, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        self.text = log.read_text
        self._socket = socket

    def client(self) -> DaemonClient:
        return DaemonClient(self._socket)


@pytest.fixture(name="start")
def _start(directory: Path) -> Iterator[Any]:
    started: list[Any] = []

    def start(config: Any, environment: Any = None, ready: str = "serving") -> Any:
        (directory / "daemon.yaml").write_text(config)
        log = directory / f"log{len(started)}"
        command = [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--foreground"]
        command += ["--socket", f"{directory}/daemon.sock", "--config", f"{directory}/daemon.yaml"]
        with open(log, "wb") as out:
            daemon = Daemon(
                log,
                f"{directory}/daemon.sock",
                command,
                stderr=out,
                cwd="/",
                env=os.environ | (environment or {}),
            )
        started.append(daemon)
        until(lambda: ready in log.read_text() or daemon.poll() is not None)
        return daemon

    yield start
    for daemon in started:
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture(name="port")
def _port() -> Iterator[Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        yield receiver.getsockname()[1]


_SENDER = """
import os, select, socket, sys
port, uid, sockets = map(int, sys.argv[1:4])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(sockets)]
while not select.select([0], [], [], 0.2)[0]:
    for sender in senders:
        sender.sendto(b"x", ("127.0.0.1", port))
"""


def _send(daemon: Any, port: int, processes: int = 1, uid: int = 0) -> Any:
    """Processes that send until the daemon has named all of them; their pids."""
    command = [sys.executable, "-I", "-c", _SENDER, str(port), str(uid), "1"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(processes)]
    pids = {one.pid for one in running}

    def named() -> bool:
        with daemon.client() as client:
            flows = client.who(port=port, limit=10_000)["flows"]
        return pids <= {flow["pid"] for flow in flows}

    until(named)
    for one in running:
        one.communicate(timeout=60)
    return pids


def _flood(port: int, processes: Any, uid: int, sockets: Any) -> None:
    """Processes with long arguments that send from many ports, for two seconds."""
    command = [sys.executable, "-I", "-c", _SENDER, str(port), str(uid), str(sockets)]
    command.append("a" * 100_000)
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(processes)]
    time.sleep(2)
    for one in running:
        one.communicate(timeout=60)


def _owners(path: Any, port: int) -> tuple[Any, ...]:
    """(pids of the flows to `port` in the file, those of them that have details there)."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
        flows = file.execute(
            "SELECT DISTINCT f.tgid, p.tgid FROM flows f LEFT JOIN processes p"
            " ON p.tgid = f.tgid AND p.start_ns = f.start_ns WHERE f.rport = ? AND f.tgid <> 0",
            (port,),
        ).fetchall()
    file.close()
    return {pid for pid, _ in flows}, {pid for _, pid in flows if pid is not None}


def _store(daemon: Any) -> Any:
    with daemon.client() as client:
        return client.stats()["history"]["store"]


def _written(daemon: Any) -> Any:
    store = _store(daemon)
    return not (store["waiting_flows"] or store["waiting_processes"] or store["error"])


def _fill(disk: Any) -> None:
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            pass


def test_a_full_disk_loses_neither_flows_nor_processes(start: Any, disk: Any, port: int) -> None:
    path = disk / "history.db"
    daemon = start(f"history: {path}\nflush_interval: 100ms\n")
    before = _send(daemon, port, 5)
    until(lambda: _owners(path, port)[0] >= before)
    _fill(disk)
    during = _send(daemon, port, 40)
    store = until(lambda: (found := _store(daemon))["error"] and found)
    assert "full" in store["error"] and store["waiting_processes"] > 0
    assert "history not written" in daemon.text()
    with daemon.client() as client:
        assert {flow["pid"] for flow in client.who(port=port)["flows"]} >= before | during
    (disk / "filler").unlink()
    until(lambda: _written(daemon))
    flows, detailed = _owners(path, port)
    assert flows >= before | during
    assert detailed == flows


def test_a_daemon_that_starts_on_a_full_disk_serves_and_writes_when_there_is_room(
    start: Any, disk: Any, port: Any
) -> None:
    path = disk / "history.db"
    _fill(disk)
    daemon = start(f"history: {path}\nflush_interval: 100ms\n")
    assert daemon.poll() is None
    assert daemon.text().count("history not opened") == 1
    sent = _send(daemon, port, 10)
    with daemon.client() as client:
        until(lambda: {flow["pid"] for flow in client.who(port=port)["flows"]} >= sent)
    assert _store(daemon)["open"] is False
    (disk / "filler").unlink()
    until(lambda: _store(daemon)["open"] and _written(daemon))
    flows, detailed = _owners(path, port)
    assert flows >= sent and detailed == flows
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0


def test_a_read_only_file_system_is_one_line_and_no_obstacle(
    start: Any, disk: Any, port: Any
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    daemon = start(f"history: {disk}/history.db\nflush_interval: 100ms\n")
    sent = _send(daemon, port, 2)
    with daemon.client() as client:
        until(lambda: {flow["pid"] for flow in client.who(port=port)["flows"]} >= sent)
    assert "Read-only" in _store(daemon)["error"]
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    until(lambda: _store(daemon)["open"] and _written(daemon))
    assert _owners(disk / "history.db", port)[1] >= sent


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("engine: packet\nhistory: DIRECTORY/none/h.db\n", "there is no directory"),
        ("engine: packet\ngroup: no-such-group-here\n", "daemon.yaml:2: group: there is no group"),
        ("max_processes: 4294967295\n", "daemon.yaml:1: max_processes"),
    ],
)
def test_a_mistake_of_the_configuration_is_one_line(
    start: Any, directory: Path, config: str, words: str
) -> None:
    daemon = start(config.replace("DIRECTORY", str(directory)))
    assert daemon.wait(30) == 2
    assert words in daemon.text() and daemon.text().count("\n") == 1
    assert not (directory / "none").exists()


_CLOCKS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* What can jump for a process is off by as many seconds as the file says. */
int clock_gettime(clockid_t id, struct timespec *ts)
{
	static int (*real)(clockid_t, struct timespec *);
	long offset = 0;
	FILE *file;
	int err;

	if (!real)
		real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
	err = real(id, ts);
	if (id != CLOCK_REALTIME && id != CLOCK_BOOTTIME)
		return err;
	file = fopen(getenv("CLOCKS_OFFSET"), "r");
	if (file) {
		if (fscanf(file, "%ld", &offset) != 1)
			offset = 0;
		fclose(file);
	}
	if (id == CLOCK_REALTIME || offset > 0)
		ts->tv_sec += offset;
	return err;
}
"""


class MachineClocks:
    """`environment` of a process whose clocks set() sets."""

    def __init__(self, directory: Path, library: Path) -> None:
        self._offset = directory / "offset"
        self.environment = {"LD_PRELOAD": str(library), "CLOCKS_OFFSET": str(self._offset)}
        self.set(0)

    def set(self, seconds: float) -> None:
        new = self._offset.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self._offset)


@pytest.fixture(name="clocks")
def _clocks(directory: Path) -> MachineClocks:
    (directory / "clocks.c").write_text(_CLOCKS)
    library = directory / "clocks.so"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(directory / "clocks.c"), "-ldl"]
    subprocess.run(command, check=True)

    return MachineClocks(directory, library)


def _stamp(path: Any) -> Any:
    """When the file was last written or trimmed, by the daemon's clock."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
        ((stamp,),) = file.execute("SELECT real FROM elapsed").fetchall()
    file.close()
    return stamp


def test_clocks_that_jump_twenty_years_and_back_delete_nothing(
    start: Any, directory: Path, port: int, clocks: MachineClocks
) -> None:
    """Also CLOCK_BOOTTIME, as faketime(1) does it. Every 30 s the file is trimmed."""
    path = directory / "history.db"
    config = f"history: {path}\nflush_interval: 100ms\nhistory_age: 1d\n"
    daemon = start(config, clocks.environment)
    sent = _send(daemon, port, 3)
    until(lambda: _owners(path, port)[1] >= sent)
    command = [sys.executable, "-I", "-c", _SENDER, str(port), "0", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as meanwhile:
        for years in (YEARS, 0):
            clocks.set(years)
            jumped = time.time() + years
            trimmed = (jumped + 31, jumped + YEARS / 2)
            until(functools.partial(lambda low, high: low < _stamp(path) < high, *trimmed), 120)
            assert _owners(path, port)[1] >= sent | {meanwhile.pid}
        there(meanwhile.stdin).close()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0
    assert _owners(path, port)[1] >= sent


@pytest.mark.parametrize("years", [YEARS, -YEARS])
def test_a_clock_that_jumps_while_no_daemon_runs_deletes_nothing(
    start: Any, directory: Path, port: int, clocks: MachineClocks, years: Any
) -> None:
    path = directory / "history.db"
    config = f"history: {path}\nflush_interval: 100ms\nhistory_age: 1d\n"
    sent = set()
    for offset in (0, years, 0, years):
        clocks.set(offset)
        daemon = start(config, clocks.environment)
        sent |= _send(daemon, port, 2)
        until(functools.partial(lambda least: _owners(path, port)[1] >= least, sent))
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    assert _owners(path, port)[1] >= sent


def test_one_users_flood_leaves_others_their_history(
    start: Any, directory: Path, port: Any
) -> None:
    path = directory / "history.db"
    config = f"history: {path}\nhistory_size: 1MiB\nhistory_flows: 2000\nmax_processes: 200\n"
    daemon = start(config + "flush_interval: 100ms\n")
    roots = _send(daemon, port, 3)
    carols = _send(daemon, port, 3, uid=CAROL)
    until(lambda: _owners(path, port)[1] >= roots | carols)
    while "were too old or too many" not in daemon.text():
        assert daemon.poll() is None
        _flood(port, 5, BOB, sockets=200)
    assert _owners(path, port)[1] >= roots | carols
    with daemon.client() as client:
        # one by one: the flood may be larger than any answer
        replies = [client.who(pid=pid, port=port) for pid in roots | carols]
        assert {flow["pid"] for reply in replies for flow in reply["flows"]} == roots | carols
        known = {one["tgid"] for reply in replies for one in reply["processes"]}
        assert known >= roots | carols
    until(lambda: path.stat().st_size < 3 << 20, 120)
