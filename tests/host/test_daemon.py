# SPDX-License-Identifier: MIT
"""The daemon as a process of its own, engine packet, real sockets and users. Root."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon, StartDaemon, drain, records_of, send
from nlproto.client.client import DaemonClient, DaemonEvent
from nlproto.errors import NoDaemon
from waiting import patient, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")


def test_sigterm_ends_it_cleanly_and_the_account_is_logged(
    daemon: Daemon, receiver: socket.socket
) -> None:
    send(receiver.getsockname()[1], 3)
    with DaemonClient(daemon.path) as client:
        client.start("udp")
        assert daemon.stop(signal.SIGTERM) == 0
        events = drain(client)
    assert isinstance(events[-1], DaemonEvent) and events[-1].name == "bye"
    assert not os.path.exists(daemon.path)
    assert "packets seen =" in daemon.text()
    assert "does not close" not in daemon.text()


def test_sigint_ends_it_as_well(daemon: Daemon) -> None:
    assert daemon.stop(signal.SIGINT) == 0


def test_records_sent_just_before_sigterm_still_arrive(
    daemon: Daemon, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        client.start(f"udp dst port {port} and outbound")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(100):
                sender.sendto(b"x", ("127.0.0.1", port))
            daemon.process.send_signal(signal.SIGTERM)
            events = drain(client)
    assert len(records_of(events)) == 100


def test_a_live_daemon_is_not_displaced(daemon: Daemon) -> None:
    second = subprocess.run(
        [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--socket", daemon.path],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd="/",
    )
    assert second.returncode == 1
    assert f"pid {daemon.process.pid}" in second.stderr and len(second.stderr.splitlines()) == 1
    with DaemonClient(daemon.path) as client:
        assert client.daemon["pid"] == daemon.process.pid


def test_after_kill_9_the_socket_is_taken_over_and_owners_are_known_again(
    start: StartDaemon, directory: Path, receiver: socket.socket
) -> None:
    first = start()
    port = receiver.getsockname()[1]
    with DaemonClient(first.path) as client:
        until(lambda: client.owner(port)["owners"])
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(NoDaemon):
            client.stats()
    assert os.path.exists(first.path)
    second = start()
    with DaemonClient(second.path) as client:
        (owner,) = until(lambda: client.owner(port)["owners"])
        assert owner["pid"] == os.getpid()
    assert "stale" in second.text()


def test_a_file_that_is_no_socket_is_left_alone(directory: Path) -> None:
    path = directory / "daemon.sock"
    path.write_text("precious")
    done = subprocess.run(
        [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--socket", str(path)],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd="/",
    )
    assert done.returncode == 1 and "no socket" in done.stderr
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--engine", "bpf"], 2, "bpf"),
        (["--config", "/nonexistent.yaml"], 2, "nonexistent"),
        (["--socket", "/proc/daemon.sock"], 1, "--socket"),
    ],
)
def test_bad_usage_is_one_clear_line(arguments: list[str], code: int, word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "daemon", *arguments],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd="/",
    )
    assert done.returncode == code
    assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_root_does_not_start_where_others_can_write(directory: Path) -> None:
    directory.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-m", "daemon", "--engine", "packet"],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd=directory,
    )
    assert done.returncode == 1
    assert "others can write" in done.stderr


def test_sighup_reads_the_configuration_again_and_a_mistake_changes_nothing(
    start: StartDaemon,
) -> None:
    daemon = start(config="max_clients: 100\n")
    daemon.config.write_text("max_clients: many\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("daemon.yaml:1: max_clients")
    daemon.config.write_text("max_clients: 1\nqueue_size: 1MiB\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("configuration read again")
    assert "a restart is needed for: queue_size" in daemon.text()
    with DaemonClient(daemon.path), pytest.raises(NoDaemon):
        DaemonClient(daemon.path)


def _rows_in(path: Any) -> Any:
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT count(*) FROM flows").fetchone()[0]
    return 0


def test_history_survives_a_restart(
    start: StartDaemon, directory: Path, receiver: socket.socket
) -> None:
    config = f"history: {directory}/history.db\nflush_interval: 100ms\n"
    first = start(config=config)
    port = receiver.getsockname()[1]
    send(port, 3)
    until(lambda: _rows_in(directory / "history.db"))
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = start(config=config)
    with DaemonClient(second.path) as client:
        reply = client.who(port=port)
        assert {flow["pid"] for flow in reply["flows"]} == {os.getpid()}
        assert {p["tgid"] for p in reply["processes"]} == {os.getpid()}
