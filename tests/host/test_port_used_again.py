# SPDX-License-Identifier: MIT
"""A socket's process leaves it, and within a moment another one has its port (root)."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet_names import PacketNames
from nlproto.host import netns, procfs
from nlproto.host.holders import Holders
from nlproto.host.sockdiag import SockDiag
from nlproto.records import wire
from waiting import noting

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="who holds a socket needs root")

DEAD, AMBIGUOUS = wire.lib.SNIFFER_F_DEAD, wire.lib.SNIFFER_F_AMBIGUOUS
SECOND = 1_000_000_000


@contextmanager
def user(port: int = 0) -> Iterator[tuple[int, int]]:
    """A process with a UDP socket: its pid and port."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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


class Moving:
    """A clock that can be set forward."""

    ahead_ns = 0

    def __call__(self) -> int:
        return time.monotonic_ns() + self.ahead_ns


@pytest.fixture
def clock() -> Moving:
    return Moving()


@pytest.fixture
def later_names(clock: Moving) -> Iterator[PacketNames]:
    with SockDiag() as diag, closing(Holders(now_ns=clock)) as holders:
        yield PacketNames(diag, holders, lambda *_: True, clock)


def sent(port: int, time_ns: int, to: int = 9) -> Any:
    record = np.zeros(1, wire.RECORD)
    record["family"], record["proto"] = socket.AF_INET, socket.IPPROTO_UDP
    record["netns"], record["time_ns"] = netns.own(), time_ns
    record["dir"] = wire.lib.SNIFFER_DIR_OUT
    record["saddr"][:, :4] = record["daddr"][:, :4] = (127, 0, 0, 1)
    record["sport"], record["dport"] = port, to
    return record


def name(
    names: PacketNames, port: int, time_ns: int | None = None, hurried: bool = False, to: int = 9
) -> Any:
    record = sent(port, time_ns or time.monotonic_ns(), to)
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


def test_who_shared_a_port_and_has_gone_may_be_the_one(
    later_names: PacketNames, clock: Moving
) -> None:
    with user() as (_, port):
        with user(port):
            name(later_names, port)
            between_ns = clock()
        clock.ahead_ns += SECOND // 10  # so that the port is looked at again
        doubted = name(later_names, port, between_ns, to=10)
        sure = name(later_names, port, clock(), to=11)
    assert int(doubted["tgid"]) and int(doubted["flags"]) == AMBIGUOUS
    assert int(sure["tgid"]) and int(sure["flags"]) == 0


def test_an_own_socket_that_was_at_the_port_leaves_no_doubt(
    later_names: PacketNames, clock: Moving
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first:
        first.bind(("127.0.0.1", 0))
        port = first.getsockname()[1]
        name(later_names, port)
    between_ns = clock()
    clock.ahead_ns += SECOND // 10
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as second:
        second.bind(("127.0.0.1", port))
        found = name(later_names, port, between_ns, to=10)
    assert (int(found["tgid"]), int(found["flags"])) == (os.getpid(), 0)


def test_who_shares_a_port_and_goes_while_holders_are_searched_may_be_the_one(
    later_names: PacketNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = later_names._holders.find_soon
    users: dict[int, ExitStack] = {}

    def find(inode: int, *rest: Any) -> Any:
        for pid, stack in users.items() if len(asked) == 1 else ():
            if inode not in (procfs.socket_inodes(pid) or {}):
                stack.close()
        return search(inode, *rest)

    asked: list[int] = []
    monkeypatch.setattr(later_names._holders, "find_soon", noting(asked, find))
    with ExitStack() as all_of_them:
        port = 0
        for _ in range(2):
            stack = all_of_them.enter_context(ExitStack())
            pid, port = stack.enter_context(user(port))
            users[pid] = stack
        found = name(later_names, port)
    assert int(found["tgid"]) in users and int(found["flags"]) == AMBIGUOUS


def test_who_held_a_socket_and_has_left_it_may_be_the_one(
    later_names: PacketNames, clock: Moving
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        try:
            assert int(name(later_names, port)["flags"]) & AMBIGUOUS  # they share it
            between_ns = clock()
            sock.close()
            doubted = name(later_names, port, between_ns, to=10)
            sure = name(later_names, port, clock(), to=11)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert (int(doubted["tgid"]), int(doubted["flags"])) == (child, AMBIGUOUS)
    assert (int(sure["tgid"]), int(sure["flags"])) == (child, 0)
