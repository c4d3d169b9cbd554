# SPDX-License-Identifier: MIT
from __future__ import annotations

import functools
import ipaddress
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daemon.history.memory import Question
from daemon.history.recorder import Recorder
from daemon.history.store import Store
from daemon.serve.answers import Answers
from daemon.system.config import Config
from nlproto.errors import Error
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import FLOW, pack_address, summarize
from nlproto.tables.processes import Process, Processes
from recording import make_records
from remembering import Clocks
from waiting import stand_in, there, until

FOREVER = 2**62
NO_OFFSET = Clock(0, 0)
_IP = [pack_address(f"10.0.0.{number}")[1] for number in range(3)]


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> str:
    return str(tmp_path / "history.db")


def _write(store: Any, records: Any, first_id: int = 1, processes: Any = ()) -> Any:
    flows = summarize(records, 1)
    flows = flows[np.argsort(flows["lport"])]
    store.write(np.arange(first_id, first_id + len(flows), dtype=np.uint64), flows, processes)
    return flows


def _ports(store: Any, until: Any = FOREVER, **conditions: Any) -> list[int]:
    return [int(flow["lport"]) for _, flow in store.ask(Question(**conditions), until)]


def test_a_flow_comes_back_from_the_file_as_it_was(path: str) -> None:
    store = Store(path)
    big = {"cookie": 2**64 - 2, "start_ns": 2**63 + 5, "comm": b"\xff\x1b[31m", "netns": 2**32 - 1}
    flows = _write(store, make_records(big))
    store.close()
    ((number, found),) = Store(path).ask(Question(), FOREVER)
    assert number == 1
    for name in there(FLOW.names):
        if name not in ("hash", "opened"):
            assert np.array_equal(found[name], flows[0][name]), name


def test_writing_a_flow_again_updates_it(path: str) -> None:
    store = Store(path)
    _write(store, make_records({"time_ns": 5}))
    _write(store, make_records({"time_ns": 5}, {"time_ns": 9}))
    ((_, flow),) = store.ask(Question(), FOREVER)
    assert (int(flow["packets_out"]), int(flow["last_ns"])) == (2, 9)
    assert store.last_id() == 1


@pytest.mark.parametrize(
    ("conditions", "ports"),
    [
        ({}, [4, 3, 2, 1]),
        ({"port": 53}, [4, 3, 2]),
        ({"port": 3}, [3]),
        ({"proto": 6}, [1]),
        ({"pid": 12}, [2]),
        ({"pname": "dig"}, [3, 2]),
        ({"uid": 0}, [2]),
        ({"since_ns": 300}, [4, 3]),
        ({"at_ns": 200}, [2]),
        ({"host": ipaddress.ip_network("10.9.0.0/16")}, [3]),
        ({"host": ipaddress.ip_network("2001:db8::/32")}, []),
        ({"limit": 1}, [4, 3]),
        ({"ends": ((2, _IP[1], 1), (2, _IP[2], 80))}, [1]),
        ({"ends": ((2, _IP[2], 80), (2, _IP[1], 1))}, [1]),
        ({"ends": ((2, _IP[1], 80), (2, _IP[2], 1))}, []),
        ({"ends": ((2, _IP[1], 1), (2, _IP[2], 80)), "port": 80}, [1]),
        ({"ends": ((2, _IP[1], 1), (2, _IP[2], 80)), "port": 53}, []),
    ],
)
def test_the_file_answers_the_same_questions(
    path: str, conditions: dict[str, Any], ports: list[Any]
) -> None:
    store = Store(path)
    rows = (
        {"sport": 1, "time_ns": 100, "comm": b"curl", "tgid": 11, "dport": 80, "proto": 6},
        {"sport": 2, "time_ns": 200, "comm": b"dig", "tgid": 12, "uid": 0},
        {"sport": 3, "time_ns": 300, "comm": b"dig", "tgid": 13, "daddr": "10.9.0.7"},
        {"sport": 4, "time_ns": 400, "tgid": 0, "start_ns": 0, "uid": 0, "how": 18},
    )
    _write(store, make_records(*rows))
    assert _ports(store, **conditions) == ports
    assert _ports(store, until=50) == []


def test_a_process_comes_back_from_the_file(path: str) -> None:
    process = Process(5, 2**63 + 1, "x\x1b", exe="/bin/x", container="docker:abc")
    store = Store(path)
    store.write(np.zeros(0, np.uint64), np.zeros(0, FLOW), [process])
    assert store.process(5, 2**63 + 1) == process
    assert store.process(5, 1) is None


def test_the_file_can_be_read_by_its_group_and_by_nobody_else(path: str) -> None:
    Store(path).close()
    assert os.stat(path).st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xee" * 8000]
)
def test_a_corrupt_file_is_set_aside_with_a_message_and_a_new_one_begun(
    path: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with open(path, "wb") as file:
        file.write(content)
    store = Store(path)
    assert store.set_aside is not None
    with open(store.set_aside, "rb") as file:
        assert file.read() == content
    assert store.set_aside in caplog.text
    assert store.ask(Question(), FOREVER) == []


def test_a_file_damaged_in_the_middle_is_set_aside(path: str) -> None:
    store = Store(path)
    _write(store, make_records(*({"sport": n} for n in range(2000))))
    store.close()
    with open(path, "r+b") as file:
        file.seek(4096 * 8)
        file.write(b"\xa5" * 4096 * 8)
    assert Store(path).set_aside is not None


def test_a_file_of_another_schema_is_set_aside(path: str) -> None:
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 77")
    assert Store(path).set_aside is not None


def test_a_symlink_is_not_followed(path: str, tmp_path: Path) -> None:
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(Error, match="history"):
        Store(path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="configuration"):
        Store(str(tmp_path / "file" / "history.db"))


def test_old_flows_are_deleted(path: str) -> None:
    clocks = Clocks()
    store = Store(path, moment=clocks)
    _write(store, make_records({"sport": 1}))
    clocks.run(400)
    _write(store, make_records({"sport": 2}), first_id=2)
    clocks.run(101)
    assert store.trim(age=500, size=1 << 30) == 1
    assert _ports(store) == [2]


def test_the_oldest_flows_are_deleted_until_the_size_fits(path: str) -> None:
    store = Store(path)
    now = time.time_ns()
    rows = ({"sport": n, "time_ns": now + n} for n in range(5000))
    _write(store, make_records(*rows))
    assert store.trim(age=1000, size=1 << 30) == 0
    before = os.stat(path).st_size
    gone = store.trim(age=1000, size=400_000)
    assert 0 < gone < 5000
    assert os.stat(path).st_size <= 420_000 < before
    assert _ports(store, limit=1)[0] == 4999


def _batch(records: Any) -> NamedBatch:
    return NamedBatch(np.zeros(1)[0], records, NO_OFFSET, summarize(records, 1))


def _ask(recorder: Any, **conditions: Any) -> list[Any]:
    question = Question(**conditions)
    _, now = recorder.history.ask(question)
    _, past = recorder.past(question)
    return sorted(int(flow["lport"]) for _, flow in now + past)


def test_flows_evicted_from_memory_are_found_in_the_file_once(path: str) -> None:
    config = Config(history=path, history_flows=64, flush_interval=0.05)
    with Recorder(config, Processes()) as recorder:
        for n in range(200):
            recorder.take(_batch(make_records({"sport": n, "time_ns": 1000 + n})))
            if n % 16 == 0:
                until(
                    functools.partial(lambda last: last in _ports(recorder._store, limit=1000), n)
                )
        until(lambda: 199 in _ports(recorder._store, limit=1000))
        assert recorder.history.evicted > 0
        assert recorder.history.unstored == 0
        assert _ask(recorder, limit=1000) == list(range(200))
        assert recorder.past(Question(since_ns=1199)) == (0, [])


def test_pages_of_a_long_answer_have_each_flow_though_the_file_is_behind_the_memory(
    path: str,
) -> None:
    recorder = Recorder(Config(history=path, history_flows=64), Processes())
    for n in range(200):
        few = n in range(50, 70)  # of a user who has few, which stay in memory
        some = {"sport": n, "time_ns": 1000 + n, "uid": 7 if few else 1000}
        recorder.take(_batch(make_records(some)))
        recorder._flush()
    for n in range(50, 70):  # the file does not know yet that these went on
        recorder.take(_batch(make_records({"sport": n, "time_ns": 5000 + n, "uid": 7})))
    assert recorder.history.horizon_ns > 1100
    answers = Answers(stand_in(SimpleNamespace()), recorder.history, recorder.past)
    found: list[int] = []
    seen_until_ns, total = 10_000, 200
    while total > 5:
        question = Question(limit=5, seen_until_ns=seen_until_ns)
        total, rows = answers._ask(question, lambda: None)
        found += [int(flow["lport"]) for _, flow in rows]
        seen_until_ns = int(rows[-1][1]["last_ns"]) - 1
    assert found == [*range(69, 49, -1), *range(199, 69, -1), *range(49, -1, -1)]
    recorder.__exit__()


def test_a_new_daemon_finds_what_the_last_one_wrote_and_goes_on_counting(path: str) -> None:
    config = Config(history=path)
    process = Process(100, 5_000_000_000, "client", exe="/usr/bin/client")
    processes = Processes()
    with Recorder(config, processes) as recorder:
        recorder.take(_batch(make_records({"sport": 1, "time_ns": 100})))
        processes.restore([process])
    with Recorder(config, Processes()) as recorder:
        recorder.take(_batch(make_records({"sport": 2, "time_ns": 200})))
        assert _ask(recorder) == [1, 2]
        assert recorder.past_process(100, 5_000_000_000) == process
    assert Store(path).last_id() == 2


_KILLED = """
import sys, time
import numpy as np
from daemon.system.config import Config
from nlproto.records.elapsed import Moment
from daemon.history.recorder import Recorder
from nlproto.records import wire
from nlproto.records.clock import Clock
from nlproto.tables.flows import summarize
from nlproto.records.batch import NamedBatch
from nlproto.tables.processes import Processes

class Telling(Recorder):
    # says after each flush what had been taken before it began

    last = 0

    def _flush(self):
        before = self.last
        more = super()._flush()
        print(before, flush=True)
        return more

with Telling(Config(history=sys.argv[1], flush_interval=0.1), Processes()) as recorder:
    for n in range(1, 60000):
        records = np.zeros(1, wire.RECORD)
        records["sport"], records["time_ns"], records["family"] = n, n, 2
        recorder.take(NamedBatch(np.zeros(1)[0], records, Clock(0, 0), summarize(records, 1)))
        recorder.last = n
        time.sleep(0.001)
"""


def test_kill_9_loses_at_most_what_came_since_the_last_flush(path: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", _KILLED, path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    flushed = [int(child.stdout.readline()) for _ in range(8)]
    child.send_signal(signal.SIGKILL)
    flushed += [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    store = Store(path)
    assert store.set_aside is None
    assert flushed[-1] > flushed[0]
    assert set(range(1, flushed[-1] + 1)) <= set(_ports(store, limit=60000))


def test_a_full_disk_is_counted_and_writing_goes_on_afterwards(path: str) -> None:
    config = Config(history=path, flush_interval=0.05)
    with Recorder(config, Processes()) as recorder:
        there(recorder._store)._writer.execute("PRAGMA max_page_count = 1")
        recorder.take(_batch(make_records(*({"sport": n, "time_ns": n + 1} for n in range(3000)))))
        until(lambda: recorder.failures > 0)
        there(recorder._store)._writer.execute("PRAGMA max_page_count = 100000")
    assert len(_ports(Store(path), limit=9999)) == 3000


def test_a_question_that_nobody_waits_for_ends_within_the_search(path: str) -> None:
    store = Store(path)
    rows = [{"sport": 1 + n % 60000, "dport": 1 + n // 60000} for n in range(3000)]
    _write(store, make_records(*rows))
    calls = []

    def stop() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    host = ipaddress.ip_network("203.0.113.0/24")
    with pytest.raises(KeyboardInterrupt):
        store.ask(Question(host=host), FOREVER, stop)
    assert calls == [1]
    assert store.ask(Question(host=host), FOREVER) == []
