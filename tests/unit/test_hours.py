# SPDX-License-Identifier: MIT
"""Sealed hours answer as the database does, before and after a restart."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.history.memory import Question
from daemon.history.recorder import Recorder
from daemon.history.sealing import _entering, shorten
from daemon.history.store import Store
from daemon.system.config import Config
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import summarize
from nlproto.tables.processes import Process, Processes
from recording import make_records
from remembering import FOREVER, QUESTIONS, Clocks, changes, files, fill, ids, seal, some_rows
from waiting import there

pytestmark = pytest.mark.usefixtures("small_groups")


def test_sealed_flows_answer_as_those_of_the_database(tmp_path: Path) -> None:
    rows = list(some_rows(400))
    stores = [Store(str(tmp_path / name)) for name in ("plain", "sealed")]
    for store in stores:
        fill(store, rows)
    assert stores[1].seal(changes, 150) == 150 and stores[1].seal(changes, 150) == 150
    assert len(stores[1].hours.pieces) == 2
    for conditions in QUESTIONS:
        for until in (FOREVER, 10**18 + 3 * 10**11):
            plain, other = (one.ask(Question(**conditions), until) for one in stores)
            assert [number for number, _ in other] == [number for number, _ in plain], conditions
            for (_, one), (_, same) in zip(plain, other, strict=True):
                assert one.tobytes() == same.tobytes()
    assert stores[0].last_id() == stores[1].last_id() == 400
    assert stores[0].last_seen_ns() == stores[1].last_seen_ns()
    assert stores[0].first_seen_ns() == stores[1].first_seen_ns()


def test_what_is_written_while_an_hour_is_sealed_is_there_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.history.sealing._PIECE", 50)
    fill(store, some_rows(300))
    before = ids(store, limit=1000)
    later = iter(range(1001, 2000))
    seen: list[int] = []

    def write() -> None:
        number = next(later)
        fill(store, some_rows(1, number), number)
        seen.append(number)

    assert store.seal(lambda some: some > 300, 300, write) == 300
    assert len(seen) >= 6
    assert sorted(ids(store, limit=2000)) == sorted([*before, *seen])
    with store.transaction() as writer:
        assert writer.execute("SELECT count(*) FROM flows").fetchone() == (len(seen),)


def test_what_may_still_change_is_not_sealed(store: Store, clocks: Clocks) -> None:
    fill(store, some_rows(200))
    assert store.seal(lambda ids: ids % 2 == 0, 100) == 100
    assert sorted(store._one_row("SELECT min(id), count(*) FROM flows")) == [2, 100]
    assert sorted(ids(store, limit=1000)) == list(range(1, 201))


def test_a_file_is_made_when_there_is_an_hour_of_rows(
    store: Store, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.history.sealing.LEAST", 100)
    monkeypatch.setattr("daemon.history.store.LEAST", 100)
    fill(store, some_rows(150))
    assert store.seal(changes) == 0
    clocks.run(3700)
    assert store.seal(lambda ids: ids > 60) == 0
    assert store.seal(changes) == 150


def test_processes_come_back_from_the_file_of_their_flows(
    path: str, store: Store, clocks: Clocks
) -> None:
    known = [Process(12, 7, "dig", exe="/bin/dig", unit="a.service"), Process(11, 7, "curl")]
    rows = [{"tgid": 12, "start_ns": 7, "comm": b"dig", "sport": n} for n in range(100)]
    flows = np.concatenate([summarize(make_records(row), 1) for row in rows])
    flows["domain"] = 77 << 40
    numbers = np.arange(1, 101, dtype=np.uint64)
    names = {77 << 40: "example.org"}
    store.write(numbers, flows, known, text_of=lambda number: names.get(number, ""))
    fill(store, [{"tgid": 11, "start_ns": 7, "sport": 1}], first_id=101)
    assert store.seal(lambda ids: ids > 100, 100) == 100
    assert store._one("SELECT count(*) FROM processes") == 1
    store.trim(1e9, 1 << 30)
    assert store._one("SELECT count(*) FROM names") == 0
    store.close()
    again = Store(path, moment=clocks)
    assert ids(again, pid=12, limit=5)
    assert [again.process(*one.key) for one in known] == known
    assert again.process(12, 8) is None
    assert again.name(77 << 40) == "example.org" and again.name(78 << 40) == ""
    again.close()


def test_the_files_are_private(path: str, store: Store) -> None:
    fill(store, some_rows(100))
    seal(store)
    (name,) = files(path)
    found = os.stat(os.path.join(os.path.dirname(path), name))
    assert found.st_mode & 0o777 == 0o640 and name.endswith(".hour")


def test_questions_find_all_while_rows_move(path: str, store: Store) -> None:
    """Ask without a pause while hours are sealed and written again."""
    fill(store, some_rows(600))
    whole, wrong, ended = list(range(1, 601)), [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            found = sorted(ids(store, limit=1000))
            if found != whole:
                wrong.append(len(found))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        assert store.seal(changes, 100) == 100
    for piece in store.hours.pieces:  # written again with all that is in it
        contents = store.hours.without(piece, set())
        new = store.hours.write(there(contents))
        with _entering(store, [new], [piece.number]):
            pass
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


# Leaving


def test_files_leave_when_nothing_in_them_was_seen_for_the_age(
    store: Store, clocks: Clocks
) -> None:
    fill(store, some_rows(100))
    seal(store)
    clocks.run(400)
    fill(store, some_rows(100), first_id=101)
    seal(store)
    clocks.run(101)
    assert store.trim(age=500, size=1 << 30) == 100
    assert ids(store, limit=1000) and min(ids(store, limit=1000)) == 101
    assert len(store.hours.pieces) == 1


def test_one_users_flood_deletes_that_users_files_alone(store: Store, clocks: Clocks) -> None:
    def rows(uid: int, comm: Any, count: int, at: Any) -> Iterator[Any]:
        for n in range(count):
            yield {
                "uid": uid, "comm": comm, "tgid": 5, "start_ns": uid + 1,
                "sport": n, "cookie": at * 1000 + n, "time_ns": at,
                "daddr": f"10.{n % 200}.{at % 200}.{n * 7 % 200}",
            }  # fmt: skip

    first = 1
    for at in range(12):
        some = [
            *rows(0, b"sshd", 20, at),
            *rows(0, b"nginx", 60 if at < 6 else 10, at),
            *rows(1001, b"vim", 15, at),
            *rows(1000, b"bomb", 300, at),
        ]
        fill(store, some, first_id=first)
        first += len(some)
        assert store.seal(changes, len(some)) == len(some)
    size = store.hours.size
    assert shorten(store, size // 2) > 0
    assert store.hours.size <= size // 2 * 1.15
    left = Counter(
        (int(flow["uid"]), bytes(flow["comm"]))
        for _, flow in store.ask(Question(limit=10_000), FOREVER)
    )
    assert left[0, b"sshd"] == 240 and left[1001, b"vim"] == 180 and left[0, b"nginx"] == 420
    assert 0 < left[1000, b"bomb"] < 12 * 300
    # of the flood the newest is left
    newest = [
        int(flow["last_ns"]) for _, flow in store.ask(Question(pname="bomb", limit=10_000), FOREVER)
    ]
    assert max(newest) == 11 and min(newest) > 0


def test_an_unprivileged_asker_sees_only_his_own(store: Store) -> None:
    fill(store, some_rows(200))
    seal(store)
    found = store.ask(Question(uid=5, limit=1000), FOREVER)
    assert found and all(int(flow["uid"]) == 5 and int(flow["tgid"]) for _, flow in found)


# Migration and restarts


def test_a_history_of_today_goes_on_and_is_sealed(path: str, store: Store, clocks: Clocks) -> None:
    fill(store, some_rows(150), processes=[Process(11, 7, "curl")])
    whole = ids(store, limit=1000)
    store.close()
    with sqlite3.connect(path) as old:  # as the version before had it
        old.execute("DROP TABLE hours")
        old.execute("DROP TABLE names")
        old.execute("DROP INDEX flows_nat")
        for name in (
            *("domain", "rtt_us", "retransmits", "tcp_in", "tcp_out"),
            "nat_laddr",
            "nat_raddr",
            "nat_lport",
            "nat_rport",
        ):
            old.execute(f"ALTER TABLE flows DROP COLUMN {name}")
        old.execute("CREATE INDEX flows_comm ON flows (comm, last_ns)")
        old.execute("PRAGMA user_version = 2")
    old.close()
    again = Store(path, moment=clocks)
    assert again.set_aside is None and ids(again, limit=1000) == whole
    assert seal(again, 150) == 150 and ids(again, limit=1000) == whole
    assert again.process(11, 7) == Process(11, 7, "curl")
    again.close()


def test_the_recorder_seals_what_memory_no_longer_has(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.history.sealing.LEAST", 50)
    monkeypatch.setattr("daemon.history.store.LEAST", 50)
    monkeypatch.setattr("daemon.history.sealing._HOUR", 0)
    config = Config(history=path, history_flows=64)
    recorder = Recorder(config, Processes())
    for number in range(200):
        records = make_records({"sport": number, "time_ns": 1000 + number, "tgid": 5})
        recorder.take(NamedBatch(np.zeros(1)[0], records, Clock(0, 0), summarize(records, 1)))
        if number % 8 == 0:
            recorder._flush()
    recorder._flush()
    recorder._trim()
    figures = recorder.store_figures()
    assert there(figures)["sealed_files"] == 1 and there(figures)["damaged_files"] == 0

    def asked() -> list[Any]:
        question = Question(limit=1000)
        _, now = recorder.history.ask(question)
        _, past = recorder.past(question)
        return sorted(int(flow["lport"]) for _, flow in now + past)

    assert asked() == list(range(200))
    with recorder:
        pass
    recorder = Recorder(config, Processes())
    assert asked() == list(range(200)) and there(recorder._store).last_id() == 200
    recorder._trim()
    assert asked() == list(range(200)) and len(there(recorder._store).hours.pieces) == 2
    with recorder:
        pass


def test_a_wrong_year_widens_a_file_and_hides_nothing(store: Store) -> None:
    year = 365 * 86400 * 10**9
    rows = [{"sport": n, "time_ns": 10**18 + n + (20 * year if n == 7 else 0)} for n in range(100)]
    fill(store, rows)
    seal(store)
    fill(store, [{"sport": 999, "time_ns": 10**18 + 10**9}], first_id=101)
    assert ids(store, limit=2)[:2] == [8, 101]
    assert len(ids(store, limit=1000, since_ns=10**18)) == 101
    assert len(ids(store, limit=1000, at_ns=10**18 + 50)) == 1


def test_a_reader_of_another_program_does_not_stop_sealing(path: str, store: Store) -> None:
    fill(store, some_rows(100))
    other = sqlite3.connect(path)
    other.execute("BEGIN")
    assert other.execute("SELECT count(*) FROM flows").fetchone() == (100,)
    assert seal(store) == 100 and len(ids(store)) == 100
    assert other.execute("SELECT count(*) FROM flows").fetchone() == (100,)
    other.close()
    held = open(os.path.join(os.path.dirname(path), files(path)[0]), "rb")
    assert store.trim(age=1e9, size=1 << 20) == 0
    held.close()
