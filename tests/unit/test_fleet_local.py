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
from fleet.ask.local import told
from fleet.ask.store import Range
from nlproto.tables.flows import FLOW, pack_address
from nlproto.tables.processes import Processes
from waiting import stand_in

S = 10**9


class Pipeline:
    portmap = None

    def __init__(self) -> None:
        self.processes = Processes()


def ask_of(lasts: Any) -> tuple[Any, ...]:
    """What asks a daemon's own part, whose history has a flow for each of `lasts` (ns)."""
    flows = np.zeros(len(lasts), FLOW)
    flows["cookie"] = np.arange(1, len(lasts) + 1)
    flows["tgid"], flows["start_ns"], flows["comm"], flows["how"] = 7, 5, b"x", 1
    flows["family"], flows["proto"], flows["lport"] = 2, 6, 40000
    for name in ("laddr", "raddr"):
        flows[name] = np.frombuffer(pack_address("10.0.0.1")[1], np.uint64)
    flows["first_ns"] = flows["last_ns"] = lasts
    memory = FlowMemory(len(flows) + 1)
    memory.update(flows, stand_in(SimpleNamespace(real_offset_ns=0)))
    answers = Answers(stand_in(Pipeline()), memory)
    asked = []

    def ask(**words: Any) -> Any:
        asked.append(words)
        return msgspec.json.decode(msgspec.json.encode(answers.who(Who(1, **words), None)))

    return ask, asked


@pytest.fixture(name="now")
def _now() -> Any:
    return time.time_ns()


def test_more_flows_than_are_told_at_once_are_all_told(now: Any) -> None:
    ask, asked = ask_of(now - np.arange(25_000) * S // 50)  # 500 s
    flows, _, whole = told(ask, Range(now - 600 * S, now))
    assert whole and len(flows) == len({one["cookie"] for one in flows}) == 25_000
    assert 2 < len(asked) < 20


def test_what_cannot_be_divided_is_said_to_be_cut(now: Any) -> None:
    """All at one moment."""
    ask, _ = ask_of(np.full(10_500, now - 100 * S))
    flows, _, whole = told(ask, Range(now - 600 * S, now))
    assert not whole and len(flows) >= 10_000
