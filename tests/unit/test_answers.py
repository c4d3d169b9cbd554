# SPDX-License-Identifier: MIT
"""Answers have a size, and say when something has no room; equal questions are worked out once."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import daemon.serve.answers
from daemon.history.memory import FlowMemory
from daemon.serve import now
from daemon.serve.answers import Answers, Room
from daemon.serve.requests import Lookup, LookupKey, OwnerOf, Who
from nlproto import Error
from nlproto.client.client import DaemonClient
from nlproto.host.kernel_sockets import BoundSocket
from nlproto.host.procfs import Identity, Owner
from nlproto.host.sockdiag import HOST_SOCKET, TcpState
from nlproto.records.ends import Translated, Way
from nlproto.tables.flows import pack_address
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from nlproto.tables.shares import Payers
from waiting import noting, stand_in


class Pipeline:
    def __init__(self) -> None:
        self.portmap = PortMap()
        self.processes = Processes()


class Kernel:
    """Listeners at port 80, each with the same holders, of which `peeked` were looked at."""

    looked_ns = 1
    late: frozenset[int] = frozenset()

    def __init__(self, holders: Any, sockets: int = 1) -> None:
        rows = np.zeros(sockets, HOST_SOCKET)
        rows["family"], rows["proto"] = socket.AF_INET, socket.IPPROTO_TCP
        rows["state"], rows["sport"], rows["uid"] = TcpState.LISTEN, 80, 1000
        rows["saddr"][:, :4] = (127, 0, 0, 1)
        rows["cookie"] = rows["inode"] = np.arange(7, 7 + sockets)
        self.tables = {1: rows}
        self.holders, self.peeked = holders, 0

    def holders_of(self, inode: int) -> Iterator[Any]:
        for number in self.holders:
            self.peeked += 1
            yield Owner(Identity(100 + number, 0), b"holder", 1000 * (number > 4))

    def is_behind(self, uid: int | None) -> bool:
        return bool(self.late) if uid is None else uid in self.late


@pytest.fixture(name="answers")
def _answers() -> Answers:
    """Port 80: one socket (cookie 7) with 300 holders; of uid 1000, but 5 of uid 0."""
    pipeline = Pipeline()
    family, raw = pack_address("127.0.0.1")
    pipeline.portmap.replace_bound(
        [
            BoundSocket((1, 6, family, raw, 80), 100 + n, 5, 1000 * (n > 4), f"holder{n}", 7)
            for n in range(300)
        ],
        10,
    )
    return Answers(stand_in(pipeline), FlowMemory(16), kernel=stand_in(Kernel(range(300))))


def _decoded(fields: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(fields))


def test_equal_keys_are_looked_up_once(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    grouped = Answers._grouped
    monkeypatch.setattr(Answers, "_grouped", noting(made, grouped))
    answer = _decoded(answers.lookup(Lookup(1, keys=[LookupKey(cookie=7)] * 100), None))
    assert len(made) == 1
    assert {len(owner["holders"]) for owner in answer["owners"]} == {300}
    assert answer["truncated"] is False


def test_a_lookup_without_room_says_so_and_keeps_the_place_of_each_key(answers: Answers) -> None:
    room = Room(200_000)
    answer = answers.lookup(Lookup(1, keys=[LookupKey(cookie=7)] * 1000), None, room=room)
    assert len(msgspec.json.encode(answer)) < 210_000
    owners = _decoded(answer)["owners"]
    assert len(owners) == 1000 and owners[0]["cookie"] == 7 and owners[-1] is None
    assert answer["truncated"] is True


class Client(DaemonClient):
    """Asks `answers` directly, with little room for each answer."""

    def __init__(self, answers: Answers, size: int) -> None:
        self._answers, self._size, self.asked = answers, size, 0

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        self.asked += 1
        request = msgspec.convert({"id": 1, "op": op} | fields, Lookup)
        reply = self._answers.lookup(request, None, room=Room(self._size))
        answered: dict[str, Any] = _decoded(reply)
        return answered


def test_the_client_asks_again_for_what_had_no_room(answers: Answers) -> None:
    keys = [{"cookie": 7}, {"cookie": 8}] * 50
    client = Client(answers, 200_000)
    owners = client.lookup(keys)
    assert [owner and len(owner["holders"]) for owner in owners] == [300, None] * 50
    assert client.asked < 20


def test_an_owner_without_all_its_holders_says_so(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.serve.answers, "_MAX_HOLDERS", 50)
    client = Client(answers, 200_000)
    (one, nobody) = client.lookup([{"cookie": 7}, {"cookie": 8}])
    assert one and nobody is None and len(one["holders"]) == 50 and one["holders_cut"] is True
    with pytest.raises(Error, match="no room"):
        Client(answers, 100).lookup([{"cookie": 7}])


class Published:
    """Each connection of port 80 to port 4000 has come to another one's port 8080."""

    cut = False

    def maybe(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.ones(len(one), bool)

    def find_now(self, way: Way) -> Translated | None:
        return way[3], 8080, way[5], way[6]


def test_a_published_port_is_found_behind_any_number_of_other_connections(
    answers: Answers,
) -> None:
    rows = Kernel(range(1), sockets=6000)
    rows.tables[1]["state"], rows.tables[1]["dport"] = TcpState.ESTABLISHED, 4000
    answers.kernel = stand_in(rows)
    answers.translations = stand_in(Published())
    assert answers.who(Who(1, port=8080, limit=1), None)["owners_total"] == 6000


def test_an_owner_answer_is_cut_to_its_room(answers: Answers) -> None:
    answer = _decoded(answers.owner(OwnerOf(1, port=80), None, room=Room(100)))
    assert answer == {"owners": [], "truncated": True}


def test_holders_of_others_are_not_even_looked_at(answers: Answers) -> None:
    (owner,) = _decoded(answers.owner(OwnerOf(1, port=80), 0))["owners"]
    assert len(owner["holders"]) == 5


def test_a_user_gets_no_answer_the_faster_the_fewer_others_have_a_port(
    answers: Answers,
) -> None:
    asked = [OwnerOf(1, port=port) for port in (80, 81)]
    assert [answers.is_cheap(one, None) for one in asked] == [False, True]
    assert [answers.is_cheap(one, 1000) for one in asked] == [False, True]
    assert [answers.is_cheap(one, 1001) for one in asked] == [True, True]


def test_a_user_is_shown_own_holders_of_a_socket_and_no_socket_without(answers: Answers) -> None:
    shown = _decoded(answers.who(Who(1, port=80), 1000))
    (owner,) = shown["owners"]
    assert {holder["uid"] for holder in owner["holders"]} == {1000} and owner["uid"] == 1000
    assert len(owner["holders"]) == 295
    for uid in (0, 1001):
        nobody = answers.who(Who(1, port=80), uid)
        shared = uid == 0  # by the port map, who uses the socket
        assert (len(nobody["owners"]), nobody["owners_total"]) == (shared, shared)


def test_an_answer_reads_about_roots_holders_that_were_only_met(answers: Answers) -> None:
    """What is in /proc about a user's process may hang: a thread that nobody waits for reads it."""
    read = []

    def details(pid: int, start_ns: int) -> Any:
        read.append(pid)

    processes = answers.pipeline.processes = Processes(details)
    for number in range(300):
        processes.meet(100 + number, 5, f"holder{number}", 1000 * (number > 4))
    answers.who(Who(1, port=80), None)
    assert sorted(read) == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("sockets", [1, 3])
def test_however_many_hold_a_socket_so_many_are_looked_at(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, sockets: int
) -> None:
    monkeypatch.setattr(now, "_HOLDERS", 50)
    answers.kernel = stand_in(Kernel(itertools.count(), sockets))
    answer = answers.who(Who(1, port=80), None)
    assert stand_in(answers.kernel).peeked <= 50 + sockets
    assert answer["truncated"] is True


def test_however_many_sockets_there_are_so_many_are_looked_at(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(now, "_LOOKED", 20)
    answers.kernel = stand_in(Kernel((), sockets=5000))
    stops = []
    answer = answers.who(Who(1, port=80), None, stop=lambda: stops.append(1))
    assert answer["truncated"] is True and len(stops) < 1000


def test_one_users_many_sockets_hide_none_of_others(answers: Answers, tmp_path: Path) -> None:
    subuid = tmp_path / "subuid"
    subuid.write_text("1000:100000:65536\n")
    stand_in(answers.pipeline).portmap = PortMap(payers=Payers(str(subuid)))
    kernel = Kernel(range(1), sockets=3000)
    (rows,) = kernel.tables.values()
    rows["uid"][1000:] = 100_000 + np.arange(2000)
    rows["uid"][[2500, 2999]] = 0, 1001
    answers.kernel = stand_in(kernel)
    answer = _decoded(answers.who(Who(1, port=80, limit=50), None))
    found = [one["cookie"] for one in answer["owners"]]
    assert len(found) == 50 and {7 + 2500, 7 + 2999} <= set(found) and found == sorted(found)
    assert answer["owners_total"] == 3000 and answer["truncated"] is True


def test_a_question_of_now_that_nobody_waits_for_ends_in_the_middle(answers: Answers) -> None:
    answers.kernel = stand_in(Kernel(itertools.count()))

    def stop() -> None:
        if stand_in(answers.kernel).peeked > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.who(Who(1, port=80), None, stop=stop)
    assert stand_in(answers.kernel).peeked == 101


def test_an_answer_over_a_frame_is_cut_not_refused(answers: Answers) -> None:
    for number in range(300):
        answers.pipeline.processes.add(100 + number, 0, "x" * 1000, 1000)
    answer = answers.who(Who(1, port=80), None, room=Room(100_000))
    assert len(msgspec.json.encode(answer)) < 101_000
    assert answer["truncated"] is True
    shown = _decoded(answer)
    assert shown["owners"] and 0 < len(shown["processes"]) < 300


def test_a_question_that_nobody_waits_for_ends_in_the_middle(answers: Answers) -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.owner(OwnerOf(1, port=80), None, stop)
    assert len(calls) == 11


def test_an_answer_from_older_sockets_of_some_namespaces_says_so(answers: Answers) -> None:
    """Of a user without rights, only for that user's own: it would tell what others do."""
    asked = Who(1, port=80, limit=1000)
    assert not any(answers.who(asked, uid)["truncated"] for uid in (None, 1000, 1001))
    stand_in(answers.kernel).late = {1001}
    told = {uid: answers.who(asked, uid)["truncated"] for uid in (None, 1000, 1001)}
    assert told == {None: True, 1000: False, 1001: True}
    cut = {uid: answers.owner(OwnerOf(1, port=81), uid)["truncated"] for uid in (None, 1000, 1001)}
    assert cut == told


def test_drops_of_unknown_sockets_are_nobodys(answers: Answers) -> None:
    """Without sock_diag no socket has a cookie. The others' drops would be shown with each."""
    stand_in(answers.kernel).tables[1]["cookie"] = 0
    answers.dropped = lambda: {0: {"NETFILTER_DROP": 7}}
    owners = _decoded(answers.who(Who(1, port=80), 1000))["owners"]
    assert owners and all(one["drop_reasons"] == {} for one in owners)
