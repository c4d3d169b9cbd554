# SPDX-License-Identifier: MIT
"""Our network namespace and root's are read first; users, who can have many, take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlproto.host import netns
from nlproto.host.namespace_sockets import NamespaceSockets
from nlproto.host.sockdiag import HOST_SOCKET
from waiting import until

OWN, ROOTS = 1, [2, 3]
MANY, OTHER = 1000, 1001
BUDGET_NS, COST_NS = 50_000_000, 10_000_000
SECOND = 1_000_000_000


class Machine:
    """Some namespaces of root, 60 of one user, one of another. Each access takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = SECOND
        self.owners = dict.fromkeys(ROOTS, 0) | dict.fromkeys(range(100, 160), MANY) | {500: OTHER}
        self.opened: list[int] = []
        self.read: list[int] = []
        inside: list[int] = []

        def run_inside(path: Path, number: int, work: Callable[[], Any]) -> Any:
            self.now_ns += COST_NS
            inside.append(number)
            self.opened.append(inside[-1])
            return work()

        class Diag:
            def __init__(diag) -> None:
                diag.number = inside.pop() if inside else OWN

            def dump(diag) -> np.ndarray:
                self.now_ns += COST_NS
                self.read.append(diag.number)
                found = np.zeros(1, HOST_SOCKET)
                found["cookie"] = self.now_ns
                return found

            def close(diag) -> None:
                pass

        monkeypatch.setattr("nlproto.host.namespace_sockets.SockDiag", Diag)
        monkeypatch.setattr(netns, "own", lambda: OWN)
        monkeypatch.setattr(netns, "room", lambda: 255)
        monkeypatch.setattr(netns, "run_inside", run_inside)
        monkeypatch.setattr(
            netns.Finder, "paths", lambda _: {one: Path(f"/{one}") for one in self.owners}
        )
        monkeypatch.setattr(
            netns, "owner_or_unknown", lambda path, inode: self.owners[inode] or None
        )

    def sockets(self, others_ns: int | None = BUDGET_NS) -> NamespaceSockets:
        return NamespaceSockets(lambda: self.now_ns, others_ns=others_ns)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_look_enters_roots_namespaces_first_and_users_as_far_as_there_is_time(
    machine: Machine,
) -> None:
    with machine.sockets() as sockets:
        sockets.look()
        assert machine.opened[: len(ROOTS)] == ROOTS
        assert len(ROOTS) < len(machine.opened) <= len(ROOTS) + 6
        for _ in range(20):
            machine.now_ns += SECOND
            sockets.look()
        assert sorted(machine.opened) == sorted(machine.owners)  # each of them once


def test_users_take_turns_behind_our_namespace_and_roots(machine: Machine) -> None:
    with machine.sockets() as sockets:
        while len(machine.opened) < len(machine.owners):
            machine.now_ns += SECOND
            sockets.look()
        turns = []
        for _ in range(12):
            machine.read.clear()
            sockets.tables()
            assert machine.read[:3] == [OWN, *ROOTS]
            turns.append(machine.read[3:])
            assert len(turns[-1]) <= BUDGET_NS // COST_NS + 1
        assert all(OTHER in map(machine.owners.get, turn) for turn in turns)
        first = [one for turn in turns for one in turn if one != 500]
        assert len(set(first)) == len(first)  # the longest unread first


def test_what_was_read_of_others_before_stays_and_counts_as_behind(machine: Machine) -> None:
    with machine.sockets() as sockets:
        for _ in range(30):
            machine.now_ns += SECOND // 4
            tables = sockets.tables()
        assert tables.keys() == {OWN, *machine.owners} and not sockets.behind()
        before = machine.now_ns
        tables = sockets.tables()
        assert tables.keys() == {OWN, *machine.owners}
        assert len([one for one in tables.values() if one["cookie"][0] > before]) <= 10
        machine.now_ns += 10 * SECOND
        sockets.tables()
        assert sockets.behind() == {MANY}
        del machine.owners[500]
        machine.now_ns += 10 * SECOND
        assert 500 not in sockets.tables()


def test_who_asks_once_gets_all(machine: Machine) -> None:
    machine.owners = {number: uid for number, uid in machine.owners.items() if uid != MANY}
    machine.owners |= dict.fromkeys(range(100, 104), MANY)
    with machine.sockets(None) as sockets:
        assert sockets.tables().keys() == {OWN, *machine.owners} and not sockets.behind()


def test_a_look_that_takes_long_is_not_waited_for(machine: Machine) -> None:
    """A user's namespaces can make it so. What it finds is there when it is over."""
    going_on = threading.Event()

    class Slow:
        def paths(self) -> dict[int, Path]:
            assert going_on.wait(60)
            return dict.fromkeys([OWN, *machine.owners], Path("/proc/1/ns/net"))

        def close(self) -> None:
            going_on.set()

    finder: Any = Slow()
    with NamespaceSockets(lambda: machine.now_ns, finder=finder, wait_s=0.01) as sockets:
        assert sockets.tables().keys() == {OWN} and sockets.behind() is None
        assert sockets.get(ROOTS[0]) is None
        going_on.set()
        until(lambda: sockets.get(ROOTS[0]) is not None, 30, "the look's end")
        assert sockets.tables().keys() == {OWN, *machine.owners} and sockets.behind() == set()


def test_the_end_does_not_wait_for_a_look_that_hangs(machine: Machine) -> None:
    going_on = threading.Event()

    class Hanging:
        def paths(self) -> dict[int, Path]:
            assert going_on.wait(60)
            return {}

    finder: Any = Hanging()
    sockets = NamespaceSockets(lambda: machine.now_ns, finder=finder, wait_s=0.01)
    sockets.tables()
    ending = threading.Thread(target=sockets.close, daemon=True)
    ending.start()
    ending.join(30)
    there = ending.is_alive()
    going_on.set()
    assert not there
