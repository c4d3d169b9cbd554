# SPDX-License-Identifier: MIT
"""Whoever reads packets waits for no other thread that reads /proc."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nlproto.errors import UsageError
from nlproto.host import procfs
from nlproto.host.holders import Holders
from waiting import until

NOBODYS = 4_000_000_000  # an inode that no socket has


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(holders, begin): begin(work) runs work in a thread, which then waits for a slow /proc."""
    go_on, reading = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []
    ended_early: list[bool] = []
    real = procfs.held_sockets
    slow: set[str] = set()

    def read(pids: Any, *rest: Any) -> Any:
        if threading.current_thread().name in slow and len(pids):
            reading.set()
            ended_early.append(not go_on.wait(20))
        return real(pids, *rest)

    def begin(work: Any, name: str = "slow") -> None:
        slow.add(name)
        threads.append(threading.Thread(target=work, name="slow", daemon=True))
        threads[-1].start()
        assert reading.wait(60)

    monkeypatch.setattr(procfs, "held_sockets", read)
    yield Holders(), begin
    assert not any(ended_early), "what was asked waited for the slow reading"
    go_on.set()
    for one in threads:
        one.join()


def test_answers_come_while_another_thread_asks_processes(stuck: Any) -> None:
    holders, begin = stuck
    with socket.socket() as sock:
        inode = os.fstat(sock.fileno()).st_ino
        assert holders.find(inode)
        begin(lambda: holders.find_soon(NOBODYS, 0, (os.getpid(),)))
        assert [one.identity.tgid for one in holders.known(inode)] == [os.getpid()]
        assert [one.identity.tgid for one in holders.peek(inode)] == [os.getpid()]
        assert [one.identity.tgid for one in holders.find_soon(inode, 0)] == [os.getpid()]
        holders.may_be_inherited(inode, 0)  # answers at once


def test_who_needs_a_walk_waits_a_moment_for_it(
    stuck: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders, begin = stuck
    monkeypatch.setattr("nlproto.host.holders._BESIDE_S", 0.01)
    found: list[Any] = []
    answered = threading.Event()

    def look() -> None:
        found.append((holders.find_anywhere(NOBODYS), holders.exhaustive))
        answered.set()

    begin(look, "walk")
    assert answered.wait(60)
    assert found == [((), False)]  # nobody, as far as is known


def test_who_has_no_time_left_asks_nobody_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user can have hundreds of processes that could have the socket."""
    asked: set[int] = set()
    real, reader = procfs.held_sockets, threading.current_thread()
    go_on = threading.Event()

    def read(pids: Any, *rest: Any) -> Any:
        if threading.current_thread() is reader:
            asked.update(pids)
        else:
            go_on.wait(60)  # the walk beside it
        return real(pids, *rest)

    monkeypatch.setattr(procfs, "held_sockets", read)
    holders = Holders()
    with socket.socket():
        holders.walk()
        asked.clear()
        older = set(holders._talkers)
        assert os.getpid() in older
        with holders.beside.waiting_until(lambda: True):
            assert holders.find_soon(NOBODYS, 0) == ()
            assert holders.find_anywhere(NOBODYS) == () and not holders.exhaustive
        assert not asked & older
        go_on.set()
        until(lambda: holders.find_soon(NOBODYS, 0) == () and bool(asked & older))


def test_a_walk_beside_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise UsageError("no")

    monkeypatch.setattr(procfs, "pids", fail)
    with pytest.raises(UsageError):
        Holders().walk_beside(60)


def test_holders_are_asked_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call gives Python's lock away; with hundreds of holders that was a second."""
    name = procfs.owner(os.getpid())
    assert name is not None
    assert procfs.owners((os.getpid(), 2**31, os.getpid())) == [name, name]
    assert procfs.owners(()) == []
    with socket.socket() as sock:
        inode, held = os.fstat(sock.fileno()).st_ino, {os.getpid(): sock.fileno(), 1: 0}
        assert procfs.still_held(inode, held) == {os.getpid(): sock.fileno()}
        assert procfs.still_held(inode + 1, held) == {}
        assert procfs.still_held(inode, {}) == {}
