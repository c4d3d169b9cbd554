# SPDX-License-Identifier: MIT
"""One machine's own history: all of it, though a daemon tells 10,000 flows at once."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from daemon.history.memory import FlowMemory
from daemon.serve.answers import Answers
from daemon.serve.requests import Who
from fleet.ask.local import narrowed, tell
from fleet.ask.store import Range
from fleet.ask.wanted import Wanted
from nlproto.filters.parse import parse
from nlproto.tables.flows import FLOW, pack_address
from nlproto.tables.processes import Process, Processes
from waiting import stand_in

S = 10**9


class Pipeline:
    portmap = None

    def __init__(self) -> None:
        self.processes = Processes()


def ask_of(
    lasts: Any, processes: int = 0, asked: list[Any] | None = None, first: int | None = None
) -> tuple[Any, ...]:
    """What asks a daemon's own part, whose history has a flow for each of `lasts` (ns).

    Each of so many flows has a process of its own, with a long command line.
    """
    flows = np.zeros(len(lasts), FLOW)
    flows["cookie"] = np.arange(1, len(lasts) + 1)
    flows["tgid"], flows["start_ns"], flows["comm"], flows["how"] = 7, 5, b"x", 1
    flows["family"], flows["proto"], flows["lport"] = 2, 6, 40000
    for name in ("laddr", "raddr"):
        flows[name] = np.frombuffer(pack_address("10.0.0.1")[1], np.uint64)
    flows["tgid"][:processes] = np.arange(processes) + 1000
    flows["last_ns"] = lasts
    flows["first_ns"] = lasts if first is None else first
    memory = FlowMemory(len(flows) + 1)
    memory.update(flows, stand_in(SimpleNamespace(real_offset_ns=0)))
    pipeline = Pipeline()
    pipeline.processes.restore(
        [Process(1000 + number, 5, comm="x", cmdline="x" * 4000) for number in range(processes)]
    )
    answers = Answers(stand_in(pipeline), memory)
    asked = [] if asked is None else asked

    def ask(**words: Any) -> Any:
        asked.append(words)
        return msgspec.json.decode(msgspec.json.encode(answers.who(Who(1, **words), None)))

    return ask, asked


@pytest.fixture(name="now")
def _now() -> Any:
    return time.time_ns()


def told(ask: Any, range: Range) -> tuple[list[Any], dict[Any, Any], bool]:
    """All flows, processes by pid, and whether they are all."""
    found: list[Any] = []
    owners: dict[Any, Any] = {}

    def keep(flows: Any, processes: Any) -> None:
        found.extend(flows)
        owners.update((one["tgid"], one) for one in processes)

    return found, owners, tell(ask, range, keep)


def test_more_flows_than_are_told_at_once_are_all_told(now: Any) -> None:
    ask, asked = ask_of(now - np.arange(25_000) * S // 50)  # 500 s
    flows, _, whole = told(ask, Range(now - 600 * S, now))
    assert whole and sorted(one["cookie"] for one in flows) == list(range(1, 25_001))
    assert len(asked) <= 9  # seven pages or eight, and what came meanwhile


def test_a_page_does_not_have_all_older_flows_read_again(now: Any) -> None:
    """350,000 flows took 47 s: each page read all that were left."""
    lasts = now - np.concatenate((np.arange(20_000) // 50, np.arange(20_000) + 400)) * S
    asking, _ = ask_of(lasts)
    read: list[int] = []

    def ask(**words: Any) -> Any:
        answer = asking(**words)
        read.append(answer["total"])
        return answer

    flows, _, whole = told(ask, Range(now - 30_000 * S, now))
    assert whole and sorted(one["cookie"] for one in flows) == list(range(1, 40_001))
    assert sum(read) < 3 * len(lasts)


def test_no_flow_is_missed_that_goes_on_meanwhile(now: Any) -> None:
    """It is on a later page, and then it is newer than the first."""
    lasts = now - np.arange(10_000) * S // 50
    asked: list[Any] = []

    def going_on(**words: Any) -> Any:
        if len(asked) == 1:
            lasts[9_000:9_100] = time.time_ns()
        return ask_of(lasts, asked=asked, first=now - 600 * S)[0](**words)

    flows, _, whole = told(going_on, Range(now - 600 * S, now))
    assert whole and sorted(one["cookie"] for one in flows) == list(range(1, 10_001))


def test_all_processes_are_told_though_they_have_no_room_on_a_page(now: Any) -> None:
    ask, asked = ask_of(now - np.arange(3000) * S // 50, processes=3000)
    flows, owners, whole = told(ask, Range(now - 600 * S, now))
    assert whole and len(flows) == 3000
    assert len(owners) == 3000
    assert {words["limit"] for words in asked} == {4000, 2000, 1000}


def test_what_cannot_be_divided_is_said_to_be_cut(now: Any) -> None:
    """All at one moment."""
    ask, _ = ask_of(np.full(10_500, now - 100 * S))
    flows, _, whole = told(ask, Range(now - 600 * S, now))
    assert not whole and len(flows) == 4000


@pytest.mark.parametrize(
    ("filter", "conditions"),
    [
        ("", {}),
        ("port 443", {"port": 443}),
        ("dst portrange 1-443 and udp", {"proto": "udp"}),
        ("tcp and (pid 7 and netns 5)", {"proto": "tcp", "pid": 7, "netns": 5}),
        ("port 443 or udp", {}),
        ("port 443 or udp and pid 7", {"pid": 7}),
        ("not port 443", {}),
        ("pid 7 and (port 443 or port 80)", {"pid": 7}),
    ],
)
def test_the_daemon_is_asked_only_for_what_must_fit(
    filter: str, conditions: dict[str, Any]
) -> None:
    assert narrowed(Wanted(parse(filter, elsewhere=True))) == conditions
    assert narrowed(Wanted(parse(filter, elsewhere=True), host="10.0.0.0/8")) == conditions | {
        "host": "10.0.0.0/8"
    }
