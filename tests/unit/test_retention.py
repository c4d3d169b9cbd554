# SPDX-License-Identifier: MIT
"""What leaves the history's file, and what never does."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.history.memory import Question
from daemon.history.store import Store
from nlproto.tables.flows import FLOW, summarize
from nlproto.tables.processes import Process
from nlproto.tables.shares import Payers
from recording import make_records
from remembering import FOREVER, Clocks

AGE = 7 * 86400.0
SIZE = 1 << 30
YEARS = 20 * 365.25 * 86400
NO_FLOWS = np.zeros(0, np.uint64), np.zeros(0, FLOW)


class Filler:
    """Writes flows to a store, each with an id of its own."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._next = 1

    def __call__(self, count: int, processes: Any = (), **values: Any) -> None:
        rows = (
            {"sport": n % 60000, "start_ns": 1 + n // 60000} | values
            for n in range(self._next, self._next + count)
        )
        flows = summarize(make_records(*rows), 1)
        ids = np.arange(self._next, self._next + len(flows), dtype=np.uint64)
        self._store.write(ids, flows[np.argsort(flows["lport"])], processes)
        self._next += count


@pytest.fixture(name="fill")
def _fill(store: Store) -> Filler:
    return Filler(store)


def _count(store: Any, **conditions: Any) -> int:
    return len(store.ask(Question(limit=10**6, **conditions), FOREVER))


def _uids(store: Any) -> Counter[Any]:
    rows = store.ask(Question(limit=10**6), FOREVER)
    return Counter(int(flow["uid"]) if flow["tgid"] else None for _, flow in rows)


# Size


def test_one_users_flood_of_flows_deletes_that_users_alone(
    store: Store, fill: Filler, path: str
) -> None:
    fill(500, uid=0, comm=b"sshd")
    fill(300, uid=1001, comm=b"vim")
    fill(200, tgid=0, uid=0)
    fill(20_000, uid=1000, comm=b"bomb")
    fill(10, uid=0, comm=b"sshd")
    assert store.trim(AGE, 1 << 20) > 0
    left = _uids(store)
    assert (left[0], left[1001], left[None]) == (510, 300, 200)
    assert 0 < left[1000] < 5000
    assert os.stat(path).st_size <= 1.1 * (1 << 20)


def test_one_users_many_processes_with_long_arguments_delete_no_others(
    store: Store, fill: Filler, path: str
) -> None:
    rooted = [Process(n, 1, "sshd", uid=0, cmdline="/usr/sbin/sshd") for n in range(100, 150)]
    fill(500, rooted, uid=0, comm=b"sshd", tgid=100)
    for n in range(1000, 3000):
        bomb = Process(n, 1, "bomb", uid=1000, cmdline="a" * 130_000)
        fill(1, [bomb], tgid=n, uid=1000, comm=b"bomb")
    assert store.trim(AGE, 4 << 20) > 0
    assert _uids(store)[0] == 500
    assert store.process(100, 1) == rooted[0]
    assert 0 < _uids(store)[1000] < 2000
    assert os.stat(path).st_size <= 1.2 * (4 << 20)


def test_processes_that_never_had_a_packet_are_trimmed_too(
    store: Store, fill: Filler, path: str
) -> None:
    fill(500, [Process(100, 1, "sshd", uid=0)], uid=0, comm=b"sshd", tgid=100)
    bombs = (Process(n, 1, "bomb", uid=1000, exe="/" * 4000) for n in range(1000, 6000))
    store.write(*NO_FLOWS, list(bombs))
    before = os.stat(path).st_size
    assert store.trim(AGE, 1 << 20) == 0
    assert os.stat(path).st_size <= 1.2 * (1 << 20) < before
    assert store.process(100, 1) is not None
    assert store.process(1000, 1) is None
    assert store.process(5999, 1) is not None
    assert _uids(store) == {0: 500}


def test_a_process_goes_with_its_last_flow(store: Store, fill: Filler, clocks: Clocks) -> None:
    for n in range(1000, 1500):
        fill(1, [Process(n, 1, "x", uid=1000, exe="/" * 3000)], uid=1000, tgid=n)
        clocks.run(1)
    store.trim(AGE, 1 << 20)
    assert _count(store, pid=1000) == 0
    assert store.process(1000, 1) is None
    assert _count(store, pid=1499) == 1
    assert store.process(1499, 1) is not None


def test_a_flood_through_subordinate_uids_counts_as_one_users(
    path: str, clocks: Clocks, tmp_path: Path
) -> None:
    subuid = tmp_path / "subuid"
    subuid.write_text("1000:100000:65536\n")
    store = Store(path, Payers(str(subuid)), clocks)
    fill = Filler(store)
    fill(600, uid=0, comm=b"sshd")
    fill(600, uid=1001, comm=b"vim")
    for n in range(200):
        fill(50, uid=100_000 + n, comm=b"bomb%d" % n)
    store.trim(AGE, 1 << 20)
    left = _uids(store)
    assert left[0] == left[1001] == 600
    assert sum(left.values()) < 6000
    store.close()


def test_several_floods_share_what_is_left(store: Store, fill: Filler) -> None:
    fill(100, uid=0)
    for uid in (1000, 1001, 1002):
        fill(5000, uid=uid, comm=b"bomb")
    store.trim(AGE, 1 << 20)
    left = _uids(store)
    assert left[0] == 100
    assert max(left[1000], left[1001], left[1002]) - min(left[1000], left[1001], left[1002]) < 50


def test_a_flood_at_one_service_deletes_that_services_flows(store: Store, fill: Filler) -> None:
    fill(300, uid=0, comm=b"sshd")
    fill(10_000, uid=0, comm=b"dnsmasq")
    store.trim(AGE, 1 << 20)
    assert _count(store, pname="sshd") == 300


def test_a_flood_at_one_process_deletes_its_flows_and_not_its_namesakes(
    store: Store, fill: Filler
) -> None:
    fill(100, uid=0, comm=b"python3", tgid=7)
    fill(100, uid=0, comm=b"python3", tgid=8)
    fill(10_000, uid=0, comm=b"python3", tgid=99)
    store.trim(AGE, 1 << 20)
    assert _count(store, pid=7) == _count(store, pid=8) == 100
    assert _count(store) < 6000


def test_a_flow_whose_process_was_trimmed_gets_it_back(store: Store) -> None:
    process = Process(100, 1, "server", uid=1000)
    flows = summarize(make_records({"tgid": 100, "start_ns": 1}), 1)
    ids = np.array([1], np.uint64)
    store.write(ids, flows, [], lambda *key: process)
    assert store.process(100, 1) == process


# Age


def test_what_the_machine_lived_through_decides_not_the_date(
    store: Store, fill: Filler, clocks: Clocks
) -> None:
    fill(1, comm=b"old")
    clocks.run(AGE - 10)
    fill(1, comm=b"new")
    clocks.run(5)
    assert store.trim(AGE, SIZE) == 0
    clocks.run(AGE / 40)
    assert store.trim(AGE, SIZE) == 1
    assert (_count(store, pname="old"), _count(store, pname="new")) == (0, 1)


@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_a_jump_of_the_date_and_back_deletes_nothing(
    store: Store, fill: Filler, clocks: Clocks, jump: Any
) -> None:
    fill(10)
    store.trim(AGE, SIZE)
    for step in (jump, -jump):
        clocks.real += step
        for _ in range(200):
            clocks.run(30)
            fill(1, comm=b"meanwhile")
            assert store.trim(AGE, SIZE) == 0
    assert _count(store) == 410


@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_a_jump_while_no_daemon_runs_deletes_nothing(path: str, clocks: Clocks, jump: Any) -> None:
    for _ in range(3):
        store = Store(path, moment=clocks)
        Filler(store)(10)
        assert store.trim(AGE, SIZE) == 0
        store.close()
        clocks.run(60)
        clocks.real += jump
    clocks.real -= 3 * jump
    store = Store(path, moment=clocks)
    assert store.trim(AGE, SIZE) == 0
    assert _count(store) == 10
    store.close()


@pytest.mark.parametrize("jump", [0, YEARS, -YEARS])
def test_a_reboot_with_any_date_deletes_nothing(path: str, clocks: Clocks, jump: Any) -> None:
    store = Store(path, moment=clocks)
    Filler(store)(10)
    store.close()
    clocks.reboot()
    clocks.real += jump
    store = Store(path, moment=clocks)
    assert store.trim(AGE, SIZE) == 0
    clocks.run(AGE + AGE / 40)
    assert store.trim(AGE, SIZE) == 10
    store.close()


def test_time_without_a_daemon_counts_while_the_machine_runs(path: str, clocks: Clocks) -> None:
    store = Store(path, moment=clocks)
    Filler(store)(10)
    store.close()
    clocks.run(AGE + 1)
    store = Store(path, moment=clocks)
    assert store.trim(AGE, SIZE) == 10
    store.close()


def test_the_process_of_a_flow_that_goes_on_stays_however_old(store: Store, clocks: Clocks) -> None:
    process = Process(100, 1, "nginx", uid=33)
    flows = summarize(make_records({"tgid": 100, "start_ns": 1, "uid": 33}), 1)
    ids = np.array([1], np.uint64)
    store.write(ids, flows, [process])
    for _ in range(10):
        clocks.run(AGE / 2)
        store.write(ids, flows, [])
        store.trim(AGE, SIZE)
    assert store.process(100, 1) == process
    clocks.run(2 * AGE)
    store.trim(AGE, SIZE)
    assert store.process(100, 1) is None
