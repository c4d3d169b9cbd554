# SPDX-License-Identifier: MIT
"""How connections begin and end by their flags, and whose retransmits are whose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from daemon.history.memory import FlowMemory, Question, flow_fields
from nlproto.host.namespace_sockets import PerNamespace
from nlproto.host.netns import Finder
from nlproto.host.tcp_info import HOST_TCP
from nlproto.records.clock import Clock
from nlproto.tables.attempts import ANSWER_NS, Attempts
from nlproto.tables.flows import FLOW, summarize
from nlproto.tables.outcome import ACK, RST, SYN, outcome
from recording import make_records
from waiting import stand_in

FIN = 1
NOW = Clock(0, 0)


@pytest.mark.parametrize(
    ("came", "went", "expected"),
    [
        (SYN | ACK | FIN, SYN | ACK | FIN, None),
        (RST | ACK, SYN, "refused"),
        (0, SYN, "unanswered"),
        (SYN | ACK, SYN, None),  # on its way
        (SYN | ACK | RST, SYN | ACK, "reset"),
        (SYN | ACK, SYN | ACK | RST, "aborted"),
        (SYN, RST | ACK, "aborted"),  # nobody listened here
        (ACK, ACK, None),  # older than the daemon
        (0, 0, None),
    ],
)
def test_flags_tell_how_a_connection_went(came: Any, went: Any, expected: str | None) -> None:
    assert outcome(came, went) == expected


def flow(came: int = 0, went: int = 0, port: int = 1, netns: int = 1, tgid: int = 5) -> Any:
    found = np.zeros(1, FLOW)
    found["proto"], found["lport"], found["rport"], found["netns"] = 6, port, 80, netns
    found["tgid"], found["tcp_in"], found["tcp_out"] = tgid, came, went
    return found


def test_an_attempt_that_nobody_answers_is_counted_once() -> None:
    attempts = Attempts()
    seconds = 1_000_000_000
    failed = []
    for at in (0, 1, 3, 7, 15, 31, 63, 127):  # as the kernel repeats its SYN
        failed += attempts.take(flow(went=SYN), at * seconds)
    failed += attempts.take(flow(came=ACK, port=9), 400 * seconds)
    assert [one.why for one in failed] == ["unanswered"]
    assert attempts.take(flow(went=SYN), 401 * seconds) == []
    (again,) = attempts.take(flow(came=ACK, port=9), 401 * seconds + ANSWER_NS)
    assert again.why == "unanswered"


def test_a_refusal_in_a_later_batch_is_of_who_asked_in_that_namespace() -> None:
    attempts = Attempts()
    both = np.concatenate([flow(went=SYN), flow(went=SYN, netns=2, tgid=6)])
    assert attempts.take(both, 0) == []
    # nobody has the answer's socket: the refusal is still that of the process that asked
    (failed,) = attempts.take(flow(came=RST | ACK, netns=2, tgid=0), 1)
    assert (failed.tgid, failed.why) == (6, "refused")
    assert attempts.take(flow(came=SYN | ACK), 2) == []
    assert attempts.take(flow(), 10 * ANSWER_NS) == []


def _told(*found: Any) -> Any:
    told = np.zeros(len(found), HOST_TCP)
    for one, values in zip(told, found, strict=True):
        one["cookie"], one["netns"], one["rtt_us"], one["retransmits"] = values
    return told


def test_retransmits_are_of_the_last_owner_and_of_the_same_namespace() -> None:
    history = FlowMemory(100)
    base = {"cookie": 9, "proto": 6, "sport": 1, "dport": 2, "netns": 1}
    history.update(summarize(make_records({**base, "tgid": 1, "start_ns": 1, "time_ns": 10})), NOW)
    history.update(
        summarize(make_records({**base, "cookie": 8, "tgid": 7, "start_ns": 7, "time_ns": 11})), NOW
    )
    assert len(history.learn(_told((9, 2, 100, 4)))) == 0  # another namespace's cookie
    (first,) = history.learn(_told((9, 1, 100, 2), (77, 1, 5, 5)))
    assert (first["tgid"], first["retransmits"], first["rtt_us"]) == (1, 2, 100)
    history.update(summarize(make_records({**base, "tgid": 2, "start_ns": 2, "time_ns": 20})), NOW)
    (then,) = history.learn(_told((9, 1, 0, 5)))
    assert (then["tgid"], then["retransmits"]) == (2, 3)
    assert len(history.learn(np.zeros(0, HOST_TCP))) == 0
    found = {int(one["tgid"]): flow_fields(one) for _, one in history.ask(Question())[1]}
    assert {pid: one["retransmits"] for pid, one in found.items()} == {1: 2, 2: 3, 7: None}
    assert {pid: one["rtt"] for pid, one in found.items()} == {1: 100 / 1e6, 2: None, 7: None}


def test_a_costly_look_for_namespaces_comes_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0], []

    def paths(_: Finder) -> dict[str, Any]:
        looks.append(now[0])
        now[0] += 100_000_000  # what it takes with thousands of processes
        return {}

    monkeypatch.setattr(Finder, "paths", paths)
    with PerNamespace(lambda: stand_in(None), lambda: now[0], share=200) as namespaces:
        for _ in range(100):
            namespaces.there()
            now[0] += 500_000_000
    assert looks[1] - looks[0] >= 20_000_000_000 and 2 <= len(looks) <= 4
