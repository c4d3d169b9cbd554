# SPDX-License-Identifier: MIT
"""Sealed hours survive any crash, a full disk, damaged files and files of others."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from daemon.history.memory import Question
from daemon.history.sealed import Broken, Sealed
from daemon.history.sealing import shorten
from daemon.history.store import Store
from daemon.system.directory import HeldDirectory
from nlproto.errors import Error
from nlproto.tables.processes import Process
from remembering import FOREVER, QUESTIONS, Clocks, changes, files, fill, ids, seal, some_rows

pytestmark = pytest.mark.usefixtures("small_groups")


# Crashes


def _at_step(store: Any, step: Any) -> None:
    """Kill this process when the store does its `step`-th thing."""
    left = [step]

    def happens() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    last = [""]

    def statement(text: Any) -> None:
        if text[:12] != last[0]:
            last[0] = text[:12]
            happens()

    store._writer.set_trace_callback(statement)
    for owner, name in (
        *((HeldDirectory, one) for one in ("open_file", "move", "remove", "open_old")),
        *((os, one) for one in ("fsync", "write", "truncate")),
    ):
        real = getattr(owner, name)

        def around(*words: Any, real: Any = real, **more: Any) -> Any:
            happens()
            found = real(*words, **more)
            happens()
            return found

        setattr(owner, name, around)


def _killed(path: Any, clocks: Any, step: Any, act: Any) -> Any:
    """Whether `act` was killed at `step`, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            store = Store(path, moment=clocks)
            _at_step(store, step)
            act(store)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _whole(path: Any, clocks: Any) -> tuple[Any, ...]:
    """Everything that the history tells, as one value."""
    store = Store(path, moment=clocks)
    assert store.set_aside is None
    found = store.ask(Question(limit=10_000), FOREVER)
    owners = {tuple(flow[["tgid", "start_ns"]].tolist()) for _, flow in found}
    told = {key: store.process(*key) for key in owners if key[0]}
    rows = sorted((number, flow.tobytes()) for number, flow in found)
    last = store.last_id()
    store.close()
    return rows, told, last


def test_a_crash_at_any_step_of_sealing_loses_and_doubles_nothing(
    path: str, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(path, moment=clocks)
    known = [Process(pid, start, f"p{pid}") for pid in (11, 12, 13) for start in (7, 2**63 + 5)]
    fill(store, some_rows(120), processes=known)
    store.close()
    whole = _whole(path, clocks)
    assert len(whole[0]) == 120 and None not in whole[1].values()
    step = 0
    while _killed(path, clocks, step, lambda one: one.seal(changes, 30)):
        assert _whole(path, clocks) == whole, step
        step += 1
    assert step > 20 and _whole(path, clocks) == whole
    assert len(files(path)) >= 1


def test_a_crash_at_any_step_of_shortening_loses_only_what_was_to_go(
    path: str, clocks: Clocks
) -> None:
    def rows(uid: int, comm: Any, count: int) -> list[dict[str, Any]]:
        return [
            {"uid": uid, "comm": comm, "tgid": 5, "start_ns": uid + 1, "sport": n, "time_ns": n}
            for n in range(count)
        ]

    store = Store(path, moment=clocks)
    fill(store, rows(7, b"bomb", 160) + rows(0, b"sshd", 40))
    assert store.seal(changes, 200) == 200
    size = store.hours.size
    store.close()

    def uids() -> Counter[int]:
        again = Store(path, moment=clocks)
        found = again.ask(Question(limit=10_000), FOREVER)
        again.close()
        assert len({number for number, _ in found}) == len(found)
        return Counter(int(flow["uid"]) for _, flow in found)

    def shortening(one: Any) -> None:
        shorten(one, size * 3 // 4)

    step = 0
    while _killed(path, clocks, step, shortening):
        found = uids()
        assert found[0] == 40 and found[7] in (0, 160), step
        if not found[7]:
            break
        step += 1
    assert step > 5
    assert uids() in (Counter({0: 40}), Counter({0: 40, 7: 0}))


@pytest.mark.parametrize("act", ["seal", "shorten"])
def test_a_full_disk_keeps_the_rows_and_leaves_no_file(
    act: str, path: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, some_rows(300), processes=[Process(11, 7, "curl")])
    if act == "shorten":
        assert seal(store, 300) == 300
    before, there = ids(store, limit=1000), files(path)
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    real, full = store.hours.change, [True]

    def change(writer: Any, *words: Any) -> Any:
        if full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        return real(writer, *words)

    monkeypatch.setattr(store.hours, "change", change)

    def go() -> Any:
        if act == "seal":
            return store.seal(changes, 300)
        return shorten(store, store.hours.size // 2)

    for _ in range(3):
        with pytest.raises(Error, match="disk is full"):
            go()
        assert ids(store, limit=1000) == before and files(path) == there
    full[0] = False
    assert go() > 0


def test_a_damaged_list_is_read_from_the_files(path: str, store: Store, clocks: Clocks) -> None:
    fill(store, some_rows(200))
    assert seal(store) == 200
    before = ids(store, limit=1000)
    store._writer.execute("UPDATE hours SET about = 'nonsense' WHERE number = 1")
    store.close()
    again = Store(path, moment=clocks)
    assert ids(again, limit=1000) == before and len(again.hours.pieces) == 2
    again.close()


def test_files_outlive_their_database(
    path: str, clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(path, moment=clocks)
    fill(store, some_rows(100))
    seal(store)
    fill(store, some_rows(5), first_id=101)
    found = ids(store, limit=1000)
    store.close()
    with open(path, "r+b") as file:
        file.write(b"\xa5" * 4096)
    again = Store(path, moment=clocks)
    assert again.set_aside is not None
    assert ids(again, limit=1000) == [number for number in found if number <= 100]
    assert again.last_id() == 100
    again.close()


# Damage


@pytest.mark.parametrize("damage", ["cut", "head", "middle", "tail", "empty", "gone", "directory"])
def test_a_damaged_file_is_passed_over_in_one_line(
    damage: str, path: str, store: Store, clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, some_rows(200))
    assert seal(store) == 200
    one = os.path.join(os.path.dirname(path), files(path)[0])
    data = bytearray(open(one, "rb").read())
    os.unlink(one)
    if damage == "directory":
        os.mkdir(one)
    elif damage != "gone":
        middle = slice(20, len(data) // 2)
        if damage == "cut":
            del data[len(data) // 2 :]
        elif damage == "middle":
            data[middle] = bytes(len(data[middle]))
        elif damage == "tail":
            data[-40:-30] = bytes(10)
        elif damage == "head":
            data[8:12] = b"\xff" * 4
        else:
            data.clear()
        with open(one, "wb") as file:
            file.write(data)
    for _ in range(3):
        for conditions in QUESTIONS:
            found = ids(store, **conditions)
            assert set(found) <= set(range(1, 201))
    assert set(range(101, 201)) <= set(ids(store, limit=1000))
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and ".hour" in told[0] and "\n" not in told[0]
    assert store.hours.broken == 1
    assert store.process(11, 7) is None
    caplog.clear()
    store.close()
    again = Store(path, moment=clocks)
    assert set(range(101, 201)) <= set(ids(again, limit=1000)) and again.set_aside is None
    again.close()


def test_nothing_but_broken_comes_out_of_damage(store: Store, path: str, tmp_path: Path) -> None:
    fill(store, some_rows(100))
    seal(store)
    data = open(os.path.join(os.path.dirname(path), files(path)[0]), "rb").read()
    chance = random.Random(3)
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(bad))
            bad[at : at + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(0, 9))
        (tmp_path / "bad").write_bytes(bad)
        try:
            with Sealed(os.open(tmp_path / "bad", os.O_RDONLY)) as one:
                for conditions in QUESTIONS:
                    list(one.search(Question(**conditions), FOREVER, 10, lambda: None))
                one.processes(), one.usage()
        except Broken:
            pass


def test_files_of_others_in_the_directory_are_left_alone(
    path: str, store: Store, clocks: Clocks
) -> None:
    names = ("history.db-x.hour", "history.db-00000001.hour.bak", "other-00000001.hour")
    for name in names:
        with open(os.path.join(os.path.dirname(path), name), "w") as file:
            file.write("precious")
    store.close()
    Store(path, moment=clocks).close()
    for name in names:
        assert open(os.path.join(os.path.dirname(path), name)).read() == "precious"


def test_a_link_in_the_place_of_a_file_is_not_followed(
    path: str, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "history.db-00000001.hour-new").symlink_to(tmp_path / "precious")
    fill(store, some_rows(100))
    with pytest.raises(Exception, match="no hour is sealed"):
        seal(store)
    assert (tmp_path / "precious").read_text() == "precious" and len(ids(store)) == 100
