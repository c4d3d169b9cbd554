# SPDX-License-Identifier: MIT
"""Usage: sums of flows by process, unit, container, user and far end."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import pytest

from daemon.history import details
from daemon.history.memory import FlowMemory
from daemon.history.recorder import Recorder
from daemon.serve.answers import Answers, Room
from daemon.serve.requests import Usage
from daemon.system.config import Config
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import summarize
from nlproto.tables.processes import Process, Processes
from recording import make_records
from waiting import stand_in, there


def _used(
    recorder: Any,
    by: str = "process",
    uid: int | None = None,
    since: float = 10**9,
    names: Any = None,
) -> dict[Any, tuple[Any, ...]]:
    answers = Answers(
        stand_in(None), recorder.history, name_of=recorder.name_of, sums=recorder.usage
    )
    found = _decoded(answers.usage(Usage(id=1, by=stand_in(by), since=since), uid))
    assert found["total"] == len(found["usage"])
    return {
        one["name"]: (one["flows"], one["bytes_in"] + one["bytes_out"]) for one in found["usage"]
    }


def _decoded(answer: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(answer))


def test_an_answer_of_long_names_is_cut_not_refused() -> None:
    """A user's own runtime has names of 4 KiB."""
    sums: Any = {
        ("x", 5, "", f"podman:user@5/{n}", "n" * 4000, "", 0): [n] * 5 for n in range(1000)
    }
    answers = Answers(stand_in(None), FlowMemory(16), sums=lambda since_ns, stop: (sums, {}))
    asked = Usage(id=1, by="container", limit=1000)
    found = _decoded(answers.usage(asked, None, room=Room(100_000)))
    assert 10 < len(found["usage"]) < 25 and found["total"] == 1000
    assert found["usage"][0]["name"] == "podman:user@5/999"


def test_usage_counts_each_flow_once_wherever_it_is(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        values: dict[str, Any] = {
            "sport": number,
            "time_ns": now + number,
            "tgid": pid,
            "len": 100 + number,
        }
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

    def check() -> None:
        assert _used(recorder) == program
        assert _used(recorder, "unit") == units
        assert _used(recorder, "domain") == domains
        assert _used(recorder, "user") == {
            "5": program["curl"],
            "0": program["dig"],
            "": program[""],
        }
        assert _used(recorder, "container")["docker:1"] == program["dig"]
        # a user who sees only their own
        assert _used(recorder, uid=5) == {"curl": program["curl"]}
        assert _used(recorder, "unit", uid=5) == {"a.service": program["curl"]}
        assert _used(recorder, "domain", uid=0) == {"": program["dig"]}

    check()
    recorder._trim()
    assert there(recorder.store_figures())["sealed_files"] == 1
    check()
    with recorder:
        pass
    recorder = Recorder(Config(history=path, history_flows=64), Processes())
    check()
    recorder._trim()
    assert there(recorder.store_figures())["sealed_files"] == 2
    check()
    # a part of a file
    since = (time.time_ns() - now - 150) / 1e9
    assert sum(flows for flows, _ in _used(recorder, since=since).values()) <= 51
    with recorder:
        pass


def test_names_without_end_do_not_make_the_sums_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(details, "_GROUPS", 10)
    rows: dict[str, np.ndarray] = {
        name: np.zeros(500, np.uint64) for name in ("domain", "how", *details._SUMS)
    }
    rows["tgid"] = np.arange(500) + 1
    rows["start_ns"], rows["uid"] = np.full(500, 7), np.arange(500) % 2
    rows["comm"] = np.array([b"p%d" % n for n in range(500)], "S16")
    rows["bytes_in"] = np.arange(500, dtype=np.uint64)
    found = details.sums(rows, lambda key: details.NOWHERE)
    assert len(found) == 12 and found[0][0][0] == "p499"
    assert sum(values[0] for _, values in found) == 500
    assert sum(values[2] for _, values in found) == 499 * 250


def test_a_connection_is_one_flow_though_its_listener_has_its_first_packets() -> None:
    listener, socket = wire.lib.SNIFFER_HOW_LISTENER, wire.lib.SNIFFER_HOW_SOCKET
    rows: dict[str, np.ndarray] = {
        "how": np.array([listener, listener, socket, listener]),
        "packets_in": np.array([2, 0, 4, 3], np.uint64),
        "packets_out": np.array([0, 1, 5, 4], np.uint64),  # the last one is a flow of its own
        "comm": np.array([b"httpd"] * 4, "S16"),
    }
    for name in ("tgid", "start_ns", "uid", "domain", "bytes_in", "bytes_out"):
        rows[name] = np.ones(4, np.uint64)
    [(_, values)] = details.sums(rows, lambda key: details.NOWHERE)
    assert values == [2, 9, 4, 10, 4]
