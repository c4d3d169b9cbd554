# SPDX-License-Identifier: MIT
"""Sealed hours: they answer as the database does, survive any crash, and cost nobody else."""

import ipaddress
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter

import numpy as np
import pytest

from daemon.history import sealed
from daemon.history.elapsed import Moment
from daemon.history.memory import Question
from daemon.history.recorder import Recorder
from daemon.history.sealed import Broken, Sealed
from daemon.history.sealing import _entering, shorten
from daemon.history.store import Store
from daemon.serve.answers import Answers
from daemon.serve.requests import Usage
from daemon.system.config import Config
from daemon.system.directory import HeldDirectory
from nlproto.errors import Error
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import FLOW, pack_address, summarize
from nlproto.tables.processes import Process, Processes

FOREVER = 2**62
NOTHING = np.zeros(0, np.uint64), np.zeros(0, FLOW)
_IP = [pack_address(f"10.0.0.{number}")[1] for number in range(3)]


class Clocks:
    """A machine's clocks, which a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return Moment("boot", self.now, self.now, 1_800_000_000.0 + self.now)


@pytest.fixture(name="path")
def _path(tmp_path):
    return str(tmp_path / "history.db")


@pytest.fixture(name="clocks")
def _clocks():
    return Clocks()


@pytest.fixture(name="store")
def _store(path, clocks):
    store = Store(path, moment=clocks)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(sealed, "_GROUP", 16)


def changes(ids):
    """Nothing in memory: every row can be sealed."""
    return np.zeros(len(ids), bool)


def fill(store, make_records, rows, first_id=1, processes=()):
    """Write `rows`, each a flow of its own, in order of their ids."""
    flows = np.concatenate([summarize(make_records(row), 1) for row in rows])
    store.write(np.arange(first_id, first_id + len(flows), dtype=np.uint64), flows, processes)
    return flows


def seal(store, most=100):
    gone = 0
    while count := store.seal(changes, most):
        gone += count
    return gone


def files(path):
    folder, name = os.path.split(path)
    return sorted(one for one in os.listdir(folder) if one.startswith(f"{name}-0"))


def ids(store, **conditions):
    return [number for number, _ in store.ask(Question(**conditions), FOREVER)]


def some_rows(count, seed=1):
    chance = random.Random(seed)
    for number in range(count):
        v6 = chance.random() < 0.2
        host = chance.randrange(1, 6)
        yield {
            "sport": chance.choice([1, 2, 53, 443, 40_000 + number]),
            "dport": chance.choice([53, 80, 443]),
            "proto": chance.choice([6, 17]),
            "family": 10 if v6 else 2,
            "saddr": "fe80::1" if v6 else "10.0.0.1",
            "daddr": f"2001:db8::{host}" if v6 else f"10.9.{host}.7",
            "dir": chance.choice([1, 2, 3]),
            "time_ns": 10**18 + chance.randrange(10**12),
            "tgid": (pid := chance.choice([0, 11, 12, 13])),
            "start_ns": pid and chance.choice([7, 2**63 + 5]),
            "how": 3 if pid else 18,
            "uid": chance.choice([0, 5]) if pid else 0,
            "comm": chance.choice([b"curl", b"dig", b"\xff\x1b[31m", b""]) if pid else b"",
            "cookie": 2**64 - 2 - number,
            "netns": chance.choice([4026531840, 2**32 - 1]),
        }


QUESTIONS = [
    {},
    {"port": 53},
    {"port": 40_003},
    {"port": 9},
    {"proto": 6},
    {"pid": 12},
    {"pid": 99},
    {"pname": "dig"},
    {"pname": "nobody"},
    {"uid": 5},
    {"uid": 0},
    {"since_ns": 10**18 + 5 * 10**11},
    {"at_ns": 10**18},
    {"until_ns": 10**18 + 2 * 10**11},
    {"until_ns": 10**18 + 4 * 10**11, "since_ns": 10**18 + 2 * 10**11, "port": 53},
    {"netns": 2**32 - 1, "port": 443},
    {"host": ipaddress.ip_network("10.9.3.0/24")},
    {"host": ipaddress.ip_network("10.0.0.0/8")},
    {"host": ipaddress.ip_network("0.0.0.0/0")},
    {"host": ipaddress.ip_network("2001:db8::4/128")},
    {"host": ipaddress.ip_network("::/0")},
    {"port": 443, "uid": 5, "pname": "curl"},
    {"port": 53, "host": ipaddress.ip_network("2001:db8::/32"), "proto": 17},
    {"limit": 3},
    {"limit": 3, "port": 53},
    {"ends": ((2, _IP[1], 53), (2, pack_address("10.9.2.7")[1], 53))},
    {"ends": ((2, pack_address("10.9.2.7")[1], 80), (2, _IP[1], 443)), "port": 80},
]


def test_sealed_flows_answer_as_those_of_the_database(tmp_path, make_records):
    rows = list(some_rows(400))
    stores = [Store(str(tmp_path / name)) for name in ("plain", "sealed")]
    for store in stores:
        fill(store, make_records, rows)
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


def test_what_may_still_change_is_not_sealed(store, make_records, clocks):
    fill(store, make_records, some_rows(200))
    assert store.seal(lambda ids: ids % 2 == 0, 100) == 100
    assert sorted(store._one_row("SELECT min(id), count(*) FROM flows")) == [2, 100]
    assert sorted(ids(store, limit=1000)) == list(range(1, 201))


def test_a_file_is_made_when_there_is_an_hour_of_rows(store, make_records, clocks, monkeypatch):
    monkeypatch.setattr("daemon.history.sealing.LEAST", 100)
    monkeypatch.setattr("daemon.history.store.LEAST", 100)
    fill(store, make_records, some_rows(150))
    assert store.seal(changes) == 0
    clocks.now += 3700
    assert store.seal(lambda ids: ids > 60) == 0
    assert store.seal(changes) == 150


def test_processes_come_back_from_the_file_of_their_flows(path, store, make_records, clocks):
    known = [Process(12, 7, "dig", exe="/bin/dig", unit="a.service"), Process(11, 7, "curl")]
    rows = [{"tgid": 12, "start_ns": 7, "comm": b"dig", "sport": n} for n in range(100)]
    flows = np.concatenate([summarize(make_records(row), 1) for row in rows])
    flows["domain"] = 77 << 40
    numbers = np.arange(1, 101, dtype=np.uint64)
    names = {77 << 40: "example.org"}
    store.write(numbers, flows, known, text_of=lambda number: names.get(number, ""))
    fill(store, make_records, [{"tgid": 11, "start_ns": 7, "sport": 1}], first_id=101)
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


def test_the_files_are_private(path, store, make_records):
    fill(store, make_records, some_rows(100))
    seal(store)
    (name,) = files(path)
    found = os.stat(os.path.join(os.path.dirname(path), name))
    assert found.st_mode & 0o777 == 0o640 and name.endswith(".hour")


# Crashes


def _at_step(store, step):
    """Kill this process when the store does its `step`-th thing."""
    left = [step]

    def happens():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    last = [""]

    def statement(text):
        if text[:12] != last[0]:
            last[0] = text[:12]
            happens()

    store._writer.set_trace_callback(statement)
    for owner, name in (
        *((HeldDirectory, one) for one in ("open_file", "move", "remove", "open_old")),
        *((os, one) for one in ("fsync", "write", "truncate")),
    ):
        real = getattr(owner, name)

        def around(*words, real=real, **more):
            happens()
            found = real(*words, **more)
            happens()
            return found

        setattr(owner, name, around)


def _killed(path, clocks, step, act):
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


def _whole(path, clocks):
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
    path, make_records, clocks, monkeypatch
):
    store = Store(path, moment=clocks)
    known = [Process(pid, start, f"p{pid}") for pid in (11, 12, 13) for start in (7, 2**63 + 5)]
    fill(store, make_records, some_rows(120), processes=known)
    store.close()
    whole = _whole(path, clocks)
    assert len(whole[0]) == 120 and None not in whole[1].values()
    step = 0
    while _killed(path, clocks, step, lambda one: one.seal(changes, 30)):
        assert _whole(path, clocks) == whole, step
        step += 1
    assert step > 20 and _whole(path, clocks) == whole
    assert len(files(path)) >= 1


def test_a_crash_at_any_step_of_shortening_loses_only_what_was_to_go(path, make_records, clocks):
    def rows(uid, comm, count):
        return [
            {"uid": uid, "comm": comm, "tgid": 5, "start_ns": uid + 1, "sport": n, "time_ns": n}
            for n in range(count)
        ]

    store = Store(path, moment=clocks)
    fill(store, make_records, rows(7, b"bomb", 160) + rows(0, b"sshd", 40))
    assert store.seal(changes, 200) == 200
    size = store.hours.size
    store.close()

    def uids():
        again = Store(path, moment=clocks)
        found = again.ask(Question(limit=10_000), FOREVER)
        again.close()
        assert len({number for number, _ in found}) == len(found)
        return Counter(int(flow["uid"]) for _, flow in found)

    def shortening(one):
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
def test_a_full_disk_keeps_the_rows_and_leaves_no_file(act, path, store, make_records):
    fill(store, make_records, some_rows(300), processes=[Process(11, 7, "curl")])
    if act == "shorten":
        assert seal(store, 300) == 300
    before, there = ids(store, limit=1000), files(path)
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    real, full = store.hours.change, [True]

    def change(writer, *words):
        if full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        return real(writer, *words)

    store.hours.change = change

    def go():
        if act == "seal":
            return store.seal(changes, 300)
        return shorten(store, store.hours.size // 2)

    for _ in range(3):
        with pytest.raises(Error, match="disk is full"):
            go()
        assert ids(store, limit=1000) == before and files(path) == there
    full[0] = False
    assert go() > 0


def test_a_damaged_list_is_read_from_the_files(path, store, make_records, clocks):
    fill(store, make_records, some_rows(200))
    assert seal(store) == 200
    before = ids(store, limit=1000)
    store._writer.execute("UPDATE hours SET about = 'nonsense' WHERE number = 1")
    store.close()
    again = Store(path, moment=clocks)
    assert ids(again, limit=1000) == before and len(again.hours.pieces) == 2
    again.close()


def test_questions_find_all_while_rows_move(path, store, make_records):
    """Ask without a pause while hours are sealed and written anew."""
    fill(store, make_records, some_rows(600))
    whole, wrong, ended = list(range(1, 601)), [], threading.Event()

    def ask():
        while not ended.is_set():
            found = sorted(ids(store, limit=1000))
            if found != whole:
                wrong.append(len(found))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        assert store.seal(changes, 100) == 100
    for piece in store.hours.pieces:  # written anew with all that is in it
        contents = store.hours.without(piece, set())
        new = store.hours.write(contents)
        with _entering(store, [new], [piece.number]):
            pass
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def test_files_outlive_their_database(path, make_records, clocks, caplog):
    store = Store(path, moment=clocks)
    fill(store, make_records, some_rows(100))
    seal(store)
    fill(store, make_records, some_rows(5), first_id=101)
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
    damage, path, store, make_records, clocks, caplog
):
    fill(store, make_records, some_rows(200))
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


def test_nothing_but_broken_comes_out_of_damage(store, path, make_records, tmp_path):
    fill(store, make_records, some_rows(100))
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


def test_files_of_others_in_the_directory_are_left_alone(path, store, make_records, clocks):
    names = ("history.db-x.hour", "history.db-00000001.hour.bak", "other-00000001.hour")
    for name in names:
        with open(os.path.join(os.path.dirname(path), name), "w") as file:
            file.write("precious")
    store.close()
    Store(path, moment=clocks).close()
    for name in names:
        assert open(os.path.join(os.path.dirname(path), name)).read() == "precious"


def test_a_link_in_the_place_of_a_file_is_not_followed(path, store, make_records, tmp_path, caplog):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "history.db-00000001.hour-new").symlink_to(tmp_path / "precious")
    fill(store, make_records, some_rows(100))
    with pytest.raises(Exception, match="no hour is sealed"):
        seal(store)
    assert (tmp_path / "precious").read_text() == "precious" and len(ids(store)) == 100


# Leaving


def test_files_leave_when_nothing_in_them_was_seen_for_the_age(store, make_records, clocks):
    fill(store, make_records, some_rows(100))
    seal(store)
    clocks.now += 400
    fill(store, make_records, some_rows(100), first_id=101)
    seal(store)
    clocks.now += 101
    assert store.trim(age=500, size=1 << 30) == 100
    assert ids(store, limit=1000) and min(ids(store, limit=1000)) == 101
    assert len(store.hours.pieces) == 1


def test_one_users_flood_deletes_that_users_files_alone(store, make_records, clocks):
    def rows(uid, comm, count, at):
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
        fill(store, make_records, some, first_id=first)
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


def test_an_unprivileged_asker_sees_only_his_own(store, make_records):
    fill(store, make_records, some_rows(200))
    seal(store)
    found = store.ask(Question(uid=5, limit=1000), FOREVER)
    assert found and all(int(flow["uid"]) == 5 and int(flow["tgid"]) for _, flow in found)


# Migration and restarts


def test_a_history_of_today_goes_on_and_is_sealed(path, store, make_records, clocks):
    fill(store, make_records, some_rows(150), processes=[Process(11, 7, "curl")])
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


def test_the_recorder_seals_what_memory_no_longer_has(path, make_records, monkeypatch):
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
    assert figures["sealed_files"] == 1 and figures["damaged_files"] == 0

    def asked():
        question = Question(limit=1000)
        _, now = recorder.history.ask(question)
        _, past = recorder.past(question)
        return sorted(int(flow["lport"]) for _, flow in now + past)

    assert asked() == list(range(200))
    with recorder:
        pass
    recorder = Recorder(config, Processes())
    assert asked() == list(range(200)) and recorder._store.last_id() == 200
    recorder._trim()
    assert asked() == list(range(200)) and len(recorder._store.hours.pieces) == 2
    with recorder:
        pass


def _used(recorder, by="process", uid=None, since=10**9, names=None):
    answers = Answers(None, recorder.history, name_of=recorder.name_of, sums=recorder.usage)
    found = answers.usage(Usage(id=1, by=by, since=since), uid)
    assert found["total"] == len(found["usage"])
    return {
        one["name"]: (one["flows"], one["bytes_in"] + one["bytes_out"]) for one in found["usage"]
    }


def test_usage_counts_each_flow_once_wherever_it_is(path, make_records, monkeypatch):
    """In memory, in the database, sealed: at each moment the same sums, to the byte."""
    monkeypatch.setattr("daemon.history.sealing.LEAST", 50)
    monkeypatch.setattr("daemon.history.store.LEAST", 50)
    monkeypatch.setattr("daemon.history.sealing._HOUR", 0)
    now = time.time_ns()
    processes = Processes()
    recorder = Recorder(Config(history=path, history_flows=64), processes)
    names = {77 << 40: "example.org", (77 << 40) + 1: "resolved.org"}
    recorder.text_of = lambda number: names.get(number, "")
    processes.restore(
        [
            Process(11, 7, "curl", uid=5, unit="a.service"),
            Process(12, 7, "dig", uid=0, unit="b.service", container="docker:1", pod="ns/p"),
        ]
    )
    for number in range(200):
        pid = (11, 12, 0)[number % 3]
        values = {"sport": number, "time_ns": now + number, "tgid": pid, "len": 100 + number}
        values |= {"start_ns": 7, "uid": 5, "comm": b"curl"} if pid == 11 else {}
        values |= {"start_ns": 7, "uid": 0, "comm": b"dig"} if pid == 12 else {}
        records = make_records(values | ({} if pid else {"how": 18, "start_ns": 0, "comm": b""}))
        flows = summarize(records, 1)
        flows["domain"] = {11: 77 << 40, 12: (77 << 40) + 1, 0: 0}[pid]
        recorder.take(NamedBatch(np.zeros(1)[0], records, Clock(0, 0), flows))
        recorder._flush()
    sizes = [sum(100 + n for n in range(200) if n % 3 == part) for part in range(3)]
    program = {"curl": (67, sizes[0]), "dig": (67, sizes[1]), "": (66, sizes[2])}
    units = {"a.service": program["curl"], "b.service": program["dig"], "": program[""]}
    domains = {"example.org": program["curl"], "resolved.org": program["dig"], "": program[""]}

    def check():
        assert _used(recorder) == program
        assert _used(recorder, "unit") == units
        assert _used(recorder, "domain") == domains
        assert _used(recorder, "user") == {
            "5": program["curl"],
            "0": program["dig"],
            "": program[""],
        }
        assert _used(recorder, "container")["docker:1"] == program["dig"]
        # who sees only his own
        assert _used(recorder, uid=5) == {"curl": program["curl"]}
        assert _used(recorder, "unit", uid=5) == {"a.service": program["curl"]}
        assert _used(recorder, "domain", uid=0) == {"": program["dig"]}

    check()
    recorder._trim()
    assert recorder.store_figures()["sealed_files"] == 1
    check()
    with recorder:
        pass
    recorder = Recorder(Config(history=path, history_flows=64), Processes())
    check()
    recorder._trim()
    assert recorder.store_figures()["sealed_files"] == 2
    check()
    # a part of a file
    since = (time.time_ns() - now - 150) / 1e9
    assert sum(flows for flows, _ in _used(recorder, since=since).values()) <= 51
    with recorder:
        pass


def test_names_without_end_do_not_make_the_sums_long(monkeypatch):
    from daemon.history import details

    monkeypatch.setattr(details, "_GROUPS", 10)
    rows = {name: np.zeros(500, np.uint64) for name in ("domain", *details._SUMS)}
    rows["tgid"] = np.arange(500) + 1
    rows["start_ns"], rows["uid"] = np.full(500, 7), np.arange(500) % 2
    rows["comm"] = np.array([b"p%d" % n for n in range(500)], "S16")
    rows["bytes_in"] = np.arange(500, dtype=np.uint64)
    found = details.sums(rows, lambda key: details.NOWHERE)
    assert len(found) == 12 and found[0][0][0] == "p499"
    assert sum(values[0] for _, values in found) == 500
    assert sum(values[2] for _, values in found) == 499 * 250


def test_a_wrong_year_widens_a_file_and_hides_nothing(store, make_records):
    year = 365 * 86400 * 10**9
    rows = [{"sport": n, "time_ns": 10**18 + n + (20 * year if n == 7 else 0)} for n in range(100)]
    fill(store, make_records, rows)
    seal(store)
    fill(store, make_records, [{"sport": 999, "time_ns": 10**18 + 10**9}], first_id=101)
    assert ids(store, limit=2)[:2] == [8, 101]
    assert len(ids(store, limit=1000, since_ns=10**18)) == 101
    assert len(ids(store, limit=1000, at_ns=10**18 + 50)) == 1


def test_a_reader_of_another_program_does_not_stop_sealing(path, store, make_records):
    fill(store, make_records, some_rows(100))
    other = sqlite3.connect(path)
    other.execute("BEGIN")
    assert other.execute("SELECT count(*) FROM flows").fetchone() == (100,)
    assert seal(store) == 100 and len(ids(store)) == 100
    assert other.execute("SELECT count(*) FROM flows").fetchone() == (100,)
    other.close()
    held = open(os.path.join(os.path.dirname(path), files(path)[0]), "rb")
    assert store.trim(age=1e9, size=1 << 20) == 0
    held.close()
