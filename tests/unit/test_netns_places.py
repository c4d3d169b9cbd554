# SPDX-License-Identifier: MIT
"""Network namespaces get places fairly, and neither start nor stop waits for many of them."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlproto.engines import namespaces
from nlproto.engines.namespaces import CapturedNamespaces
from nlproto.host import netns, procfs
from waiting import until

OWN = 1


class Opened:
    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def proc(tmp_path: Path) -> Any:
    """A /proc with a process in each namespace that is asked for."""

    def fill(inodes: Any) -> Any:
        for pid, inode in enumerate(inodes, start=1):
            (tmp_path / str(pid) / "ns").mkdir(parents=True)
            os.symlink(f"net:[{inode}]", tmp_path / str(pid) / "ns" / "net")
        return tmp_path

    return fill


def test_our_own_come_first_and_users_share_the_rest() -> None:
    owners: dict[int, int | None] = dict.fromkeys(range(300), 1000)
    owners |= dict.fromkeys(range(300, 310), 1001)
    owners |= {n: 0 if n % 2 == 0 else None for n in range(400, 500)}  # ours, and root's
    chosen = netns.choose(owners, (), 255)
    assert len(chosen) == 255
    assert {n for n in owners if not owners[n]} <= chosen
    assert {n for n in owners if owners[n] == 1001} <= chosen


def test_who_has_a_place_keeps_it_before_others_of_the_same_user() -> None:
    owners = dict.fromkeys(range(300), 1000)
    first = netns.choose(owners, (), 100)
    owners |= dict.fromkeys(range(-300, 0), 1000)
    assert netns.choose(owners, first, 100) == first


@given(
    st.dictionaries(st.integers(0, 500), st.sampled_from([None, 4, 1, 2, 3]), max_size=80),
    st.sets(st.integers(0, 500)),
    st.integers(0, 40),
)
def test_a_user_lacks_places_only_if_nobody_has_two_more(
    owners: Any, held: Any, limit: int
) -> None:
    chosen = netns.choose(owners, held, limit)
    assert len(chosen) == min(limit, len(owners))
    counts = {uid: sum(owners[n] == uid for n in chosen) for uid in owners.values()}
    lacking = {uid for n, uid in owners.items() if n not in chosen}
    if None in lacking:
        assert set(counts) - {uid for uid in counts if not counts[uid]} <= {None}
    for uid in lacking - {None}:
        assert all(counts[other] <= counts[uid] + 1 for other in counts if other is not None)


def test_places_leave_descriptors_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(soft: Any) -> Any:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
        return netns.room()

    assert limited(24) == 0
    assert 40 < limited(1024) < 200
    assert limited(16384) == limited(resource.RLIM_INFINITY) == netns.MAX_OTHERS


def test_a_start_does_not_wait_for_many_namespaces_nor_does_an_end(proc: Any) -> None:
    gate = threading.Event()
    opened: list[Any] = []

    def make(inode: int, path: Any, ours: Any) -> Any:
        if len(opened) == 2:
            gate.wait()
        opened.append(Opened(inode))
        return opened[-1]

    places = CapturedNamespaces(make, OWN, pytest.fail, proc(range(OWN, 30)))
    places.start()
    assert [inode for inode, _ in places.changes()] == [place.inode for place in opened[:2]]
    gate.set()
    until(lambda: len(opened) == 28)
    places.close()
    assert all(place.closed for place in opened)


def test_what_has_no_place_is_told_in_one_line(proc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "room", lambda: 5)
    told: list[Any] = []
    places = CapturedNamespaces(
        lambda inode, path, ours: Opened(inode), OWN, told.append, proc(range(1, 53))
    )
    places.start()
    assert len(list(places.changes())) == 5
    assert places.left_out == 46
    places.close()
    assert len(told) == 1
    assert "46 of 52 network namespaces are not captured" in told[0]


def test_namespaces_that_cannot_be_opened_are_told_in_one_line(proc: Any) -> None:
    told: list[Any] = []

    def make(inode: int, path: Any, ours: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    places = CapturedNamespaces(make, OWN, told.append, proc(range(1, 53)))
    places.start()
    places.close()
    assert len(told) == 1
    assert places.left_out == 51


def test_a_namespace_that_could_not_be_opened_is_tried_again(
    proc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory or descriptors lacked for a moment, and its packets were never seen."""
    monkeypatch.setattr(namespaces, "_AGAIN", 0.1)
    tries: list[int] = []

    def make(inode: int, path: Any, ours: Any) -> Any:
        tries.append(inode)
        if len(tries) < 3:
            raise OSError(12, "Cannot allocate memory")
        return Opened(inode)

    changed = threading.Event()
    places = CapturedNamespaces(make, OWN, lambda text: None, proc([OWN, 7]), changed=changed.set)
    places.start()
    try:
        assert changed.wait(20)
        assert [inode for inode, _ in places.changes()] == [7]
    finally:
        places.close()


@pytest.mark.parametrize(("owner", "at_once"), [(None, 4), (1000, 1)])
def test_roots_are_opened_at_the_same_time_and_users_one_by_one(
    proc: Any, monkeypatch: pytest.MonkeyPatch, owner: int | None, at_once: int
) -> None:
    """Each takes some 30 ms, because the kernel waits for all processors; users can make many."""
    together = threading.Barrier(at_once, timeout=10)
    busy = threading.Semaphore(at_once)
    monkeypatch.setattr(netns, "owner_or_unknown", lambda *_: owner)

    def make(inode: int, path: Path, ours: bool) -> Opened:
        assert busy.acquire(blocking=False)
        together.wait()
        busy.release()
        return Opened(inode)

    places: Any = CapturedNamespaces(make, OWN, lambda line: None, proc(range(2, 6)))
    places.start(patience=10)
    try:
        assert places.left_out == 0
    finally:
        places.close()


def test_a_new_process_is_found_by_its_number_without_a_list_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A list of 2,000 took 3 ms, four times a second, whenever any process came or went."""
    lists: list[Path] = []
    pids = procfs.pids

    def listed(proc: Path) -> list[int]:
        lists.append(proc)
        return pids(proc)

    monkeypatch.setattr(procfs, "pids", listed)
    finder = netns.Finder(now_ns=lambda: 1_000_000_000_000)
    finder.paths()
    with subprocess.Popen(["sleep", "60"]) as child:
        finder.paths()
        child.kill()
    finder.close()
    assert finder._of[child.pid] == netns.own()
    assert len(lists) == 1
