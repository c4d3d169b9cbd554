# SPDX-License-Identifier: MIT
"""Metrics over a real socket: clients that do not read, or send nothing, are no burden."""

import socket
import threading
import time

import pytest

pytest.importorskip("prometheus_client")

from daemon.system.config import Config  # noqa: E402
from daemon.system.metrics import Metrics  # noqa: E402

FIGURES = {
    "account": {
        **dict.fromkeys(("packets", "skipped", "records", "delivered", "named"), 1),
        "lost": {f"place{n}": 0 for n in range(50_000)},  # an answer that fills every buffer
        "unnamed": {},
    },
    "queue": {"bytes": 0},
    "clients": {"connected": 0, "queued_bytes": 0},
    "history": {"flows": 0},
    "processes": {"known": 0},
    "ports": {"known": 0},
}


@pytest.fixture(name="path")
def _path(tmp_path):
    path = str(tmp_path / "m")
    with Metrics(Config(metrics=path), lambda: FIGURES):
        yield path


def _connect(path, send=b""):
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.connect(path)  # waits its turn, as it would not with a timeout
    one.settimeout(30)
    one.sendall(send)
    return one


def _until(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def _threads():
    return sum("process_request" in thread.name for thread in threading.enumerate())


def test_a_client_that_does_not_read_writes_nothing_to_stderr(path, monkeypatch, capfd):
    monkeypatch.setattr("daemon.system.scrapes._Quiet.timeout", 0.2)
    held = [_connect(path, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(3)]
    _until(_threads)
    _until(lambda: not _threads())
    assert capfd.readouterr().err == ""
    for one in held:
        one.close()


def test_clients_that_send_nothing_hold_few_threads_and_others_are_answered(path, monkeypatch):
    monkeypatch.setattr("daemon.system.scrapes._Quiet.timeout", 60)
    held = [_connect(path) for _ in range(40)]
    one = _connect(path, b"GET /metrics HTTP/1.0\r\n\r\n")
    assert b"200 OK" in one.recv(100)
    _until(lambda: _threads() <= 8)
    for each in (*held, one):
        each.close()
