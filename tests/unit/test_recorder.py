# SPDX-License-Identifier: MIT
"""The history's file when something is wrong with it: memory goes on, and nothing is lost."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.history import recorder as recorder_module
from daemon.history.memory import Question
from daemon.history.recorder import Recorder
from daemon.history.store import Store
from daemon.system.config import Config
from nlproto.errors import UsageError
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import summarize
from nlproto.tables.processes import Process, Processes
from recording import make_records
from waiting import stand_in, until

FOREVER = 2**62


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> str:
    return str(tmp_path / "history.db")


@pytest.fixture(name="processes")
def _processes() -> Processes:
    return Processes()


@pytest.fixture(autouse=True)
def _opened_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_REOPEN", 0.05)


@pytest.fixture(name="record")
def _record(path: str, processes: Processes) -> Any:
    """Starts a Recorder on `path`; its `play` makes a flow and its process, by number."""

    class Playing(Recorder):
        def play(self, *numbers: Any) -> None:
            rows = [
                {"sport": n, "tgid": 1000 + n, "start_ns": 1, "time_ns": 1 + n} for n in numbers
            ]
            for n in numbers:
                processes.add(1000 + n, 1, f"p{n}", uid=1000)
            records = make_records(*rows)
            self.take(NamedBatch(np.zeros(1)[0], records, Clock(0, 0), summarize(records, 1)))

    def record(**fields: Any) -> Playing:
        return Playing(
            Config(**(dict[str, Any](history=path, flush_interval=0.05) | fields)), processes
        )

    return record


def _until_written(recorder: Any) -> None:
    def written() -> Any:
        figures = recorder.store_figures()
        waiting = figures["waiting_flows"] + figures["waiting_processes"]
        return not waiting and not figures["error"]

    until(written)


def _stored(path: Any) -> Any:
    """The flows in the file that have details of their process there."""
    store = Store(path)
    flows = [flow for _, flow in store.ask(Question(limit=10**6), FOREVER)]
    found = {
        int(flow["lport"])
        for flow in flows
        if store.process(int(flow["tgid"]), int(flow["start_ns"])) is not None
    }
    store.close()
    assert len(found) == len(flows)
    return found


def _fill_up(recorder: Any) -> None:
    """From now on the file has no room, as on a full disk (SQLITE_FULL)."""
    recorder._store._writer.execute("PRAGMA max_page_count = 1")


def test_on_a_full_disk_flows_and_processes_wait_and_are_written_when_there_is_room(
    record: Any, path: str
) -> None:
    with record() as recorder:
        recorder.play(*range(20))
        _until_written(recorder)
        _fill_up(recorder)
        recorder.play(*range(20, 2000))
        figures = until(lambda: (found := recorder.store_figures())["failures"] > 3 and found)
        assert figures["waiting_flows"] == 1980
        assert figures["waiting_processes"] == 1980
        assert "full" in figures["error"]
        recorder._store._writer.execute("PRAGMA max_page_count = 1000000")
        _until_written(recorder)
        assert recorder.store_figures()["unstored_processes"] == 0
    assert _stored(path) == set(range(2000))


def test_what_memory_no_longer_holds_is_counted(
    record: Any, path: str, processes: Processes
) -> None:
    processes.limit = 100
    with record(history_flows=100) as recorder:
        recorder.play(1)
        _until_written(recorder)
        _fill_up(recorder)
        for n in range(2, 1002):
            recorder.play(n)
        until(lambda: recorder.store_figures()["failures"] > 0)
        assert len(recorder._changed) <= 200
        recorder._store._writer.execute("PRAGMA max_page_count = 1000000")
        _until_written(recorder)
        figures = recorder.store_figures()
        kept = _ports(recorder)
        assert len(kept) + recorder.history.unstored == 1001
        assert 0 < figures["unstored_processes"] <= 1001 - 94


def test_what_waits_is_bounded_when_a_write_fails_while_more_comes(
    record: Any, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.limit = 100
    recorder = record(history_flows=100)
    recorder.play(1)
    recorder._flush()
    _fill_up(recorder)
    recorder.play(*range(2, 190))
    write = recorder._store.write

    def write_meanwhile(*arguments: Any) -> None:
        recorder.play(*range(300, 490))
        write(*arguments)

    monkeypatch.setattr(recorder._store, "write", write_meanwhile)
    recorder._flush()
    assert recorder.store_figures()["failures"] == 1
    assert len(recorder._changed) <= 200
    recorder.__exit__()


def _ports(recorder: Any) -> set[int]:
    question = Question(limit=10**6)
    _, now = recorder.history.ask(question)
    _, past = recorder.past(question)
    return {int(flow["lport"]) for _, flow in now + past}


def _obstacles(path: Any) -> list[Any]:
    def link() -> None:
        os.symlink("/nonexistent/elsewhere", path)

    def directory() -> None:
        os.mkdir(path)

    def fifo() -> None:
        os.mkfifo(path)

    def foreign() -> None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE bookmarks (url)")
            other.execute("INSERT INTO bookmarks VALUES ('precious')")
        other.close()

    def second_name() -> None:
        with open(path + ".other", "w"):
            os.link(path + ".other", path)

    def busy() -> None:
        stand_in(busy).store = Store(path)

    return [link, directory, fifo, foreign, second_name, busy]


@pytest.mark.parametrize("number", range(6))
def test_a_daemon_serves_without_a_file_that_it_cannot_have_and_writes_it_later(
    number: int, path: str, record: Any, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = _obstacles(path)[number]
    obstacle()
    with record() as recorder:
        assert caplog.text.count("history not opened") == 1
        assert recorder.store_figures()["open"] is False
        assert recorder.store_figures()["error"]
        recorder.play(1, 2, 3)
        assert _ports(recorder) == {1, 2, 3}
        assert recorder.past_process(1001, 1) is None
        if hasattr(obstacle, "store"):
            obstacle.store.close()
        elif os.path.isdir(path):
            os.rmdir(path)
        else:
            os.rename(path, path + ".kept")
        until(lambda: recorder.store_figures()["open"])
        _until_written(recorder)
        assert recorder.store_figures()["error"] == ""
        assert _ports(recorder) == {1, 2, 3}
    assert _stored(path) == {1, 2, 3}


def test_another_programs_database_is_left_as_it_is(path: str, record: Any) -> None:
    _obstacles(path)[3]()
    before = open(path, "rb").read()
    with record() as recorder:
        recorder.play(1)
    assert open(path, "rb").read() == before
    assert os.listdir(os.path.dirname(path)) == ["history.db"]


def test_what_came_before_the_file_could_be_opened_is_not_mixed_up_with_what_is_in_it(
    path: str, record: Any
) -> None:
    with record() as recorder:
        recorder.play(*range(1, 50))
    os.rename(path, path + ".away")
    os.mkdir(path)
    with record() as recorder:
        recorder.play(*range(100, 120))
        os.rmdir(path)
        os.rename(path + ".away", path)
        until(lambda: recorder.store_figures()["open"])
        recorder.play(*range(110, 130))
        assert _ports(recorder) == {*range(1, 50), *range(100, 130)}
    assert _stored(path) == {*range(1, 50), *range(100, 130)}


def _shorten(path: Any) -> None:
    os.truncate(path, os.stat(path).st_size * 2 // 3)


def _shorten_to_a_bit(path: Any) -> None:
    os.truncate(path, 50)


def _zeroes(path: Any) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(4096))


def _noise(path: Any) -> None:
    with open(path, "r+b") as file:
        file.seek(8192)
        file.write(os.urandom(os.stat(path).st_size - 8192))


@pytest.mark.parametrize("damage", [_shorten, _shorten_to_a_bit, _zeroes, _noise])
def test_a_damaged_file_is_kept_and_a_new_one_begun(
    damage: Any, path: str, record: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with record() as recorder:
        recorder.play(*range(3000))
    for _ in range(3):
        damage(path)
        damaged = open(path, "rb").read()
        with record() as recorder:
            recorder.play(*range(2000))
        assert _stored(path) == set(range(2000))
    kept = [name for name in os.listdir(os.path.dirname(path)) if ".corrupt-" in name]
    assert len(kept) == 3
    assert any(open(os.path.join(os.path.dirname(path), n), "rb").read() == damaged for n in kept)
    assert caplog.text.count("a new one begins") == 3


def test_an_empty_file_is_a_new_one(path: str, record: Any) -> None:
    open(path, "w").close()
    with record() as recorder:
        recorder.play(1)
    assert _stored(path) == {1}


def test_a_file_damaged_while_it_is_written_is_set_aside_and_memory_is_written_anew(
    path: str, record: Any
) -> None:
    with record(history_flows=5000) as recorder:
        recorder.play(*range(3000))
        _until_written(recorder)
        recorder._store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        recorder._store._writer.execute("PRAGMA cache_size = 0")
        recorder._store._writer.execute("PRAGMA shrink_memory")
        _noise(path)
        recorder.play(*range(2000, 4000))
        until(lambda: any(".corrupt-" in name for name in os.listdir(os.path.dirname(path))))
        _until_written(recorder)
    assert _stored(path) == set(range(4000))


def test_a_file_that_was_removed_is_begun_anew_with_what_memory_holds(
    path: str, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.history.recorder._RETENTION", 0.1)
    with record() as recorder:
        recorder.play(*range(10))
        _until_written(recorder)
        for suffix in ("", "-wal", "-shm"):
            os.unlink(path + suffix)
        until(lambda: os.path.exists(path))
        recorder.play(*range(5, 15))
    assert _stored(path) == set(range(15))


def test_a_file_that_was_removed_just_before_the_end_is_written_anew(
    path: str, record: Any
) -> None:
    with record() as recorder:
        recorder.play(*range(10))
        _until_written(recorder)
        for suffix in ("", "-wal", "-shm"):
            os.unlink(path + suffix)
        recorder.play(*range(5, 15))
    assert _stored(path) == set(range(15))


def test_a_history_of_the_first_schema_goes_on(path: str, record: Any) -> None:
    with record() as recorder:
        recorder.play(1, 2)
    with sqlite3.connect(path) as old:
        old.executescript(
            "DROP TABLE elapsed; DROP TABLE identity; DROP TABLE names;"
            "ALTER TABLE flows DROP COLUMN domain; DROP INDEX flows_nat;"
            "ALTER TABLE flows DROP COLUMN nat_laddr; ALTER TABLE flows DROP COLUMN nat_raddr;"
            "ALTER TABLE flows DROP COLUMN nat_lport; ALTER TABLE flows DROP COLUMN nat_rport;"
            "ALTER TABLE flows DROP COLUMN rtt_us; ALTER TABLE flows DROP COLUMN retransmits;"
            "ALTER TABLE flows DROP COLUMN tcp_in; ALTER TABLE flows DROP COLUMN tcp_out;"
            "DROP INDEX flows_payer; DROP INDEX processes_payer;"
            "ALTER TABLE flows DROP COLUMN payer; ALTER TABLE flows DROP COLUMN seen;"
            "ALTER TABLE processes DROP COLUMN payer; ALTER TABLE processes DROP COLUMN size;"
            "CREATE INDEX processes_seen ON processes (seen);"
            "UPDATE processes SET seen = 1700000000.5;"
            "PRAGMA application_id = 0; PRAGMA user_version = 1"
        )
    old.close()
    with record() as recorder:
        recorder.play(3)
        recorder._trim()
    assert _stored(path) == {1, 2, 3}
    with sqlite3.connect(path) as new:
        assert new.execute("SELECT DISTINCT payer FROM flows").fetchall() == [(1000,)]
        assert new.execute("SELECT DISTINCT payer FROM processes").fetchall() == [(1000,)]
    new.close()


def test_a_directory_that_is_not_there_is_a_mistake_of_the_configuration(
    tmp_path: Path, record: Any
) -> None:
    path = tmp_path / "none" / "history.db"
    with pytest.raises(UsageError, match="there is no directory") as raised:
        record(history=str(path))
    assert "\n" not in str(raised.value)
    assert not path.parent.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="changes owners: needs root")
def test_a_file_that_another_user_put_there_is_not_used(path: str, record: Any) -> None:
    with open(path, "w"):
        os.chown(path, 65534, 65534)
    with record() as recorder:
        assert recorder.store_figures()["open"] is False
        assert "foreign owner" in recorder.store_figures()["error"]


@pytest.mark.parametrize(
    ("mode", "uid", "gid"),
    [(0o777, 0, 0), (0o1777, 0, 0), (0o755, 1234, 0), (0o775, 0, 1234)],
)
@pytest.mark.skipif(os.getuid() != 0, reason="changes owners: needs root")
def test_a_directory_where_others_can_replace_files_is_not_used(
    tmp_path: Path, record: Any, mode: int, uid: int, gid: int
) -> None:
    os.chown(tmp_path, uid, gid)
    tmp_path.chmod(mode)
    with record() as recorder:
        assert "others can replace" in recorder.store_figures()["error"]


def test_long_strings_of_a_process_are_cut_in_the_file(path: str) -> None:
    store = Store(path)
    long = Process(5, 1, "x", exe="\x01" * 100_000, cmdline="\N{CJK UNIFIED IDEOGRAPH-4E00}" * 9000)
    store.write(np.zeros(0, np.uint64), summarize(np.zeros(0), 0), [long])
    found = store.process(5, 1)
    assert found is not None and long.cmdline.startswith(found.cmdline)
    assert len(found.cmdline) < 9000 and found.comm == "x"
    store.close()


def test_the_history_leaves_room_on_the_disk_when_told_to(
    path: str, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with record(history=path) as recorder:
        store = recorder._store
        monkeypatch.setattr(store, "room", lambda: 5 << 20)
        monkeypatch.setattr(store, "size", lambda: 100 << 20)
        assert recorder._size(store) == recorder._config.history_size
        recorder.reconfigure(Config(history=path, history_free=25 << 20))
        assert recorder._size(store) == 80 << 20
        recorder.reconfigure(Config(history=path, history_free=1 << 40))
        assert recorder._size(store) == 1 << 20
