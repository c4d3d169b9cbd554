# SPDX-License-Identifier: MIT
"""Whose a captured packet is: by namespace, tuple and time, or said not to be certain."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from daemon.history.memory import FlowMemory
from daemon.serve.answers import Answers
from daemon.serve.requests import parse_request
from hunter.commands import past_owners as owners
from hunter.commands.past_owners import PastOwners
from nlproto import UsageError
from nlproto.host.netns import Namespace, find
from nlproto.records.clock import Clock
from nlproto.records.wire import lib
from nlproto.tables.flows import summarize
from nlproto.tables.processes import Processes
from recording import make_records
from waiting import stand_in

A, B = 4026532000, 4026533000
CLIENT, SERVER = ("127.0.0.1", 40000), ("127.0.0.1", 8080)
FLOW = ("tcp", CLIENT, SERVER)
ENDS = {"saddr": "127.0.0.1", "daddr": "127.0.0.1", "sport": 40000, "dport": 8080, "proto": 6}
NOBODY = {"tgid": 0, "start_ns": 0, "how": 17}


class Daemon:
    """The daemon's own answers, without its socket."""

    def __init__(self, records: Any) -> None:
        self.processes, self.portmap = Processes(), None
        history = FlowMemory(10_000)
        history.update(summarize(records, 1), Clock(0, 0))
        self.answers = Answers(stand_in(self), history)
        self.asked = 0

    def pipeline(self, requests: Any) -> Any:
        replies = []
        for op, fields in requests:
            message = msgspec.json.encode({"id": 1, "op": op, **fields})
            answer = self.answers.who(stand_in(parse_request(message)), None)
            replies.append(msgspec.json.decode(msgspec.json.encode(answer)))
            self.asked += 1
        return replies


def packet(tgid: int, time_s: Any, netns: Any = A, **more: Any) -> Any:
    """A record of the client's; `tgid` 0: of nobody known."""
    record = {"tgid": tgid, "time_ns": int(time_s * 1e9), "netns": netns, "cookie": tgid}
    return ENDS | record | ({} if tgid else NOBODY) | more


@pytest.fixture(name="ask")
def _ask() -> Any:
    def ask(records: Any, time_s: Any, begun_s: Any = None, at: Any = None) -> tuple[Any, ...]:
        found = PastOwners(Daemon(make_records(*records)), at)
        found.learn([FLOW])
        if begun_s is not None:
            found.begin(FLOW, 1, begun_s)
        answer = found.at(FLOW, 1, time_s)
        return [one["pid"] for one in answer.entries], answer.certain

    return ask


@pytest.mark.parametrize(
    ("records", "at", "answer"),
    [
        ([packet(1, 10, A)], None, ([1], True)),
        ([packet(1, 10, A), packet(2, 10, B)], None, ([1, 2], False)),
        ([packet(1, 10, A), packet(2, 10, B)], A, ([1], True)),
        ([packet(1, 10, A), packet(2, 10, B)], B, ([2], True)),
        # at another time it is no candidate
        ([packet(1, 10, A), packet(2, 20, B)], None, ([1], True)),
        # nobody is known in A, where the capture may have been made
        ([packet(0, 10, A), packet(2, 10, B)], None, ([2], False)),
        ([packet(0, 10, A), packet(2, 10, B)], A, ([], False)),
        ([packet(2, 10, B)], A, ([], False)),
        # a router's namespace has no end of its own
        ([packet(0, 10, A, dir=3), packet(2, 10, B)], A, ([2], True)),
        ([packet(0, 10, A, dir=3), packet(2, 10, B)], None, ([2], True)),
        # one process with a socket in either
        ([packet(1, 10, A), packet(1, 10, B)], None, ([1], True)),
        ([packet(1, 10, A, flags=lib.SNIFFER_F_AMBIGUOUS)], None, ([1], False)),
    ],
)
def test_namespaces_are_kept_apart(
    ask: Any, records: list[Any], at: Any, answer: tuple[Any, ...]
) -> None:
    pids, certain = ask(records, 10.0, at=None if at is None else Namespace(at))
    assert sorted(pids) == answer[0]
    if pids:
        assert certain == answer[1]


@pytest.mark.parametrize(
    ("records", "time_s", "begun_s", "answer"),
    [
        # one after the other
        ([packet(1, 10), packet(1, 11), packet(2, 12), packet(2, 13)], 10.5, None, ([1], True)),
        ([packet(1, 10), packet(1, 11), packet(2, 12), packet(2, 13)], 12.5, None, ([2], True)),
        # and so soon that the clocks do not tell
        ([packet(1, 10), packet(1, 11), packet(2, 11.02)], 11.01, None, ([1, 2], False)),
        ([packet(1, 10), packet(1, 11), packet(2, 11.02)], 11.02, 11.02, ([2], True)),
        # both at once: a socket that two use
        ([packet(1, 10), packet(1, 12), packet(2, 11), packet(2, 13)], 11.5, None, ([1, 2], False)),
        # the second was gone before it could be asked
        ([packet(1, 10), packet(1, 11), packet(0, 11.03)], 11.03, None, ([1], False)),
        ([packet(1, 10), packet(1, 11), packet(0, 11.03)], 11.03, 11.03, ([], False)),
        # or it was the same connection, which the SYN tells
        ([packet(1, 10), packet(1, 11), packet(0, 11.03)], 11.03, 10.0, ([1], True)),
        # the first was, the second is not
        ([packet(0, 10), packet(2, 10.03), packet(2, 11)], 10.0, 10.0, ([2], False)),
        # nothing was recorded of this packet
        ([packet(1, 10)], 10.3, None, ([1], False)),
        ([packet(1, 10)], 12.0, None, ([], True)),
        ([packet(1, 10)], None, None, ([1], True)),
        ([packet(1, 10), packet(2, 20)], None, None, ([1, 2], False)),
    ],
)
def test_a_tuple_that_changes_hands_is_told_by_time_or_said_to_be_uncertain(
    ask: Any,
    records: list[Any],
    time_s: float | None,
    begun_s: float | None,
    answer: tuple[Any, ...],
) -> None:
    pids, certain = ask(records, time_s, begun_s)
    assert sorted(pids) == answer[0]
    if pids:
        assert certain == answer[1]


def test_a_namespace_that_is_younger_than_the_packet_may_not_be_where_it_was(ask: Any) -> None:
    records = [packet(1, 10)]
    assert ask(records, 10.0, at=Namespace(A, since_s=9.0)) == ([1], True)
    assert ask(records, 10.0, at=Namespace(A, since_s=20.0)) == ([1], False)


def test_an_answer_that_was_cut_is_asked_for_again_and_never_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = Daemon(make_records(*(packet(pid, pid) for pid in range(1, 301))))
    found = PastOwners(daemon)
    found.learn([FLOW])
    answer = found.at(FLOW, 1, 2.0)
    assert ([one["pid"] for one in answer.entries], answer.certain) == ([2], True)
    assert (daemon.asked, found.cut) == (2, 0)
    monkeypatch.setattr(owners, "_MAX_LIMIT", 200)
    found = PastOwners(daemon)
    found.learn([FLOW])
    assert found.cut == 1 and not found.at(FLOW, 1, 290.0).certain


def test_both_directions_are_one_question() -> None:
    daemon = Daemon(make_records(packet(1, 10)))
    found = PastOwners(daemon)
    found.learn([FLOW, (FLOW[0], FLOW[2], FLOW[1])])
    assert daemon.asked == 1
    answer = found.at((FLOW[0], FLOW[2], FLOW[1]), 2, 10.0)
    assert [one["pid"] for one in answer.entries] == [1]


def test_a_place_is_a_name_a_pid_or_an_inode() -> None:
    own = os.stat("/proc/self/ns/net").st_ino
    assert find(str(own)) == Namespace(own)
    assert find("/proc/self/ns/net").netns == own
    mine = find(str(os.getpid()))
    assert mine.netns == own and mine.since_s > 0
    for wrong in ("nowhere", "4194303", str(1 << 32), "a\0b", "", "-1"):
        with pytest.raises(UsageError):
            find(wrong)
