# SPDX-License-Identifier: MIT
"""A socket's process leaves it, and within a moment another one has its port (root)."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet_names import PacketNames
from nlproto.host import netns
from nlproto.host.holders import Holders
from nlproto.host.sockdiag import SockDiag
from nlproto.records import wire

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="who holds a socket needs root")

DEAD, AMBIGUOUS = wire.lib.SNIFFER_F_DEAD, wire.lib.SNIFFER_F_AMBIGUOUS


@contextmanager
def user(port: int = 0) -> Iterator[tuple[int, int]]:
    """A process with a UDP socket: its pid and port."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", port))
        os.write(writing, str(sock.getsockname()[1]).encode())
        signal.pause()
        os._exit(0)
    try:
        yield pid, int(os.read(reading, 10))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


@pytest.fixture
def names() -> Iterator[PacketNames]:
    """For it no time passes: what it knows of a flow stays fresh."""
    now = time.monotonic_ns()
    with SockDiag() as diag:
        yield PacketNames(diag, Holders(now_ns=lambda: now), lambda *_: True, lambda: now)


def sent(port: int, time_ns: int) -> Any:
    record = np.zeros(1, wire.RECORD)
    record["family"], record["proto"] = socket.AF_INET, socket.IPPROTO_UDP
    record["netns"], record["time_ns"] = netns.own(), time_ns
    record["dir"] = wire.lib.SNIFFER_DIR_OUT
    record["saddr"][:, :4] = record["daddr"][:, :4] = (127, 0, 0, 1)
    record["sport"], record["dport"] = port, 9
    return record


def name(names: PacketNames, port: int, time_ns: int | None = None, hurried: bool = False) -> Any:
    record = sent(port, time_ns or time.monotonic_ns())
    return names.name(record, np.zeros(1, bool), over=lambda: hurried)[0]


def test_the_next_user_of_a_port_is_named(names: PacketNames) -> None:
    with user() as (first, port):
        assert int(name(names, port)["tgid"]) == first
    with user(port) as (second, _):
        assert int(name(names, port)["tgid"]) == second


@pytest.mark.parametrize("hurried", [False, True])
def test_who_has_left_is_named_with_doubt(names: PacketNames, hurried: bool) -> None:
    with user() as (pid, port):
        first = name(names, port)
        assert int(first["flags"]) == 0
    last = name(names, port, int(first["time_ns"]), hurried)
    assert int(last["tgid"]) == pid
    assert int(last["flags"]) & (DEAD | AMBIGUOUS) == DEAD | AMBIGUOUS


def test_who_stays_is_asked_once(names: PacketNames, monkeypatch: pytest.MonkeyPatch) -> None:
    with user() as (pid, port):
        assert int(name(names, port)["tgid"]) == pid
        monkeypatch.setattr(SockDiag, "find", lambda *_: pytest.fail("looked up again"))
        assert int(name(names, port)["tgid"]) == pid
