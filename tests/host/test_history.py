# SPDX-License-Identifier: MIT
"""The daemon's history on a real full disk, with clocks that jump, under a real flood. Root."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest

from nlproto.client.client import DaemonClient

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")

YEARS = 20 * 365 * 86400
# Users of this run's own.
BOB = 60000 + os.getpid() % 2000
CAROL = BOB + 2000


def _until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@pytest.fixture(name="directory")
def _directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("history")
    for part in (directory, directory.parent, directory.parent.parent):
        part.chmod(0o755)
    return directory


@pytest.fixture(name="disk")
def _disk(directory):
    """A file system of 8 MiB."""
    disk = directory / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "ph", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(name="start")
def _start(directory):
    started = []

    def start(config, environment=None, ready="serving"):
        (directory / "daemon.yaml").write_text(config)
        log = directory / f"log{len(started)}"
        command = [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--foreground"]
        command += ["--socket", f"{directory}/daemon.sock", "--config", f"{directory}/daemon.yaml"]
        with open(log, "wb") as out:
            daemon = subprocess.Popen(
                command, stderr=out, cwd="/", env=os.environ | (environment or {})
            )
        started.append(daemon)
        daemon.text = log.read_text
        daemon.client = lambda: DaemonClient(f"{directory}/daemon.sock")
        _until(lambda: ready in log.read_text() or daemon.poll() is not None)
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
def _port():
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


def _send(daemon, port, processes=1, uid=0):
    """Processes that send until the daemon has named all of them; their pids."""
    command = [sys.executable, "-I", "-c", _SENDER, str(port), str(uid), "1"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(processes)]
    pids = {one.pid for one in running}

    def named():
        with daemon.client() as client:
            flows = client.who(port=port, limit=10_000)["flows"]
        return pids <= {flow["pid"] for flow in flows}

    _until(named)
    for one in running:
        one.communicate(timeout=60)
    return pids


def _flood(port, processes, uid, sockets):
    """Processes with long arguments that send from many ports, for two seconds."""
    command = [sys.executable, "-I", "-c", _SENDER, str(port), str(uid), str(sockets)]
    command.append("a" * 100_000)
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(processes)]
    time.sleep(2)
    for one in running:
        one.communicate(timeout=60)


def _owners(path, port):
    """(pids of the flows to `port` in the file, those of them that have details there)."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
        flows = file.execute(
            "SELECT DISTINCT f.tgid, p.tgid FROM flows f LEFT JOIN processes p"
            " ON p.tgid = f.tgid AND p.start_ns = f.start_ns WHERE f.rport = ? AND f.tgid <> 0",
            (port,),
        ).fetchall()
    file.close()
    return {pid for pid, _ in flows}, {pid for _, pid in flows if pid is not None}


def _store(daemon):
    with daemon.client() as client:
        return client.stats()["history"]["store"]


def _written(daemon):
    store = _store(daemon)
    return not (store["waiting_flows"] or store["waiting_processes"] or store["error"])


def _fill(disk):
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            pass


def test_a_full_disk_loses_neither_flows_nor_processes(start, disk, port):
    path = disk / "history.db"
    daemon = start(f"history: {path}\nflush_interval: 100ms\n")
    before = _send(daemon, port, 5)
    _until(lambda: _owners(path, port)[0] >= before)
    _fill(disk)
    during = _send(daemon, port, 40)
    store = _until(lambda: (found := _store(daemon))["error"] and found)
    assert "full" in store["error"] and store["waiting_processes"] > 0
    assert "history not written" in daemon.text()
    with daemon.client() as client:
        assert {flow["pid"] for flow in client.who(port=port)["flows"]} >= before | during
    (disk / "filler").unlink()
    _until(lambda: _written(daemon))
    flows, detailed = _owners(path, port)
    assert flows >= before | during
    assert detailed == flows


def test_a_daemon_that_starts_on_a_full_disk_serves_and_writes_when_there_is_room(
    start, disk, port
):
    path = disk / "history.db"
    _fill(disk)
    daemon = start(f"history: {path}\nflush_interval: 100ms\n")
    assert daemon.poll() is None
    assert daemon.text().count("history not opened") == 1
    sent = _send(daemon, port, 10)
    with daemon.client() as client:
        _until(lambda: {flow["pid"] for flow in client.who(port=port)["flows"]} >= sent)
    assert _store(daemon)["open"] is False
    (disk / "filler").unlink()
    _until(lambda: _store(daemon)["open"] and _written(daemon))
    flows, detailed = _owners(path, port)
    assert flows >= sent and detailed == flows
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0


def test_a_read_only_file_system_is_one_line_and_no_obstacle(start, disk, port):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    daemon = start(f"history: {disk}/history.db\nflush_interval: 100ms\n")
    sent = _send(daemon, port, 2)
    with daemon.client() as client:
        _until(lambda: {flow["pid"] for flow in client.who(port=port)["flows"]} >= sent)
    assert "Read-only" in _store(daemon)["error"]
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    _until(lambda: _store(daemon)["open"] and _written(daemon))
    assert _owners(disk / "history.db", port)[1] >= sent


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("engine: packet\nhistory: DIRECTORY/none/h.db\n", "there is no directory"),
        ("engine: packet\ngroup: no-such-group-here\n", "daemon.yaml:2: group: there is no group"),
        ("max_processes: 4294967295\n", "daemon.yaml:1: max_processes"),
    ],
)
def test_a_mistake_of_the_configuration_is_one_line(start, directory, config, words):
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


@pytest.fixture(name="clocks")
def _clocks(directory):
    """Environment of a process whose clocks `clocks.set(seconds)` sets."""
    (directory / "clocks.c").write_text(_CLOCKS)
    library = directory / "clocks.so"
    command = ["gcc", "-shared", "-fPIC", "-o", library, directory / "clocks.c", "-ldl"]
    subprocess.run(command, check=True)

    class Clocks:
        environment = {"LD_PRELOAD": str(library), "CLOCKS_OFFSET": str(directory / "offset")}

        def set(self, seconds):
            (directory / "offset.new").write_text(str(seconds))
            (directory / "offset.new").rename(directory / "offset")

    clocks = Clocks()
    clocks.set(0)
    return clocks


def _stamp(path):
    """When the file was last written or trimmed, by the daemon's clock."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
        ((stamp,),) = file.execute("SELECT real FROM elapsed").fetchall()
    file.close()
    return stamp


def test_clocks_that_jump_twenty_years_and_back_delete_nothing(start, directory, port, clocks):
    """Also CLOCK_BOOTTIME, as faketime(1) does it. Every 30 s the file is trimmed."""
    path = directory / "history.db"
    config = f"history: {path}\nflush_interval: 100ms\nhistory_age: 1d\n"
    daemon = start(config, clocks.environment)
    sent = _send(daemon, port, 3)
    _until(lambda: _owners(path, port)[1] >= sent)
    command = [sys.executable, "-I", "-c", _SENDER, str(port), "0", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as meanwhile:
        for years in (YEARS, 0):
            clocks.set(years)
            jumped = time.time() + years
            trimmed = (jumped + 31, jumped + YEARS / 2)
            _until(lambda trimmed=trimmed: trimmed[0] < _stamp(path) < trimmed[1], 120)
            assert _owners(path, port)[1] >= sent | {meanwhile.pid}
        meanwhile.stdin.close()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0
    assert _owners(path, port)[1] >= sent


@pytest.mark.parametrize("years", [YEARS, -YEARS])
def test_a_clock_that_jumps_while_no_daemon_runs_deletes_nothing(
    start, directory, port, clocks, years
):
    path = directory / "history.db"
    config = f"history: {path}\nflush_interval: 100ms\nhistory_age: 1d\n"
    sent = set()
    for offset in (0, years, 0, years):
        clocks.set(offset)
        daemon = start(config, clocks.environment)
        sent |= _send(daemon, port, 2)
        _until(lambda sent=sent: _owners(path, port)[1] >= sent)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    assert _owners(path, port)[1] >= sent


def test_one_users_flood_leaves_others_their_history(start, directory, port):
    path = directory / "history.db"
    config = f"history: {path}\nhistory_size: 1MiB\nhistory_flows: 2000\nmax_processes: 200\n"
    daemon = start(config + "flush_interval: 100ms\n")
    roots = _send(daemon, port, 3)
    carols = _send(daemon, port, 3, uid=CAROL)
    _until(lambda: _owners(path, port)[1] >= roots | carols)
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
    _until(lambda: path.stat().st_size < 3 << 20, 120)
