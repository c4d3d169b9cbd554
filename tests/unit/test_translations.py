# SPDX-License-Identifier: MIT
"""Both tuples of a translated connection, joined: by time, by namespace, in bounds; and kept."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.history import sealed
from daemon.history.memory import FlowMemory, Question, flow_fields
from daemon.history.store import Store
from nlproto.kernel.conntrack import ConntrackEvent
from nlproto.overheard.translations import Translations
from nlproto.records.clock import Clock
from nlproto.tables.flows import FLOW, pack_address, summarize
from recording import make_records
from waiting import there

SECOND = 1_000_000_000
HOST, BOX, OTHER = 11, 22, 33
FOREVER = 2**62


def end(address: Any, port: int) -> Any:
    return pack_address(address)[1] + port.to_bytes(2)


CLIENT, PUBLIC, SERVER = end("10.7.0.2", 4000), end("10.7.0.1", 8080), end("10.8.0.2", 80)


def event(
    original: Any, reply: Any, number: int = 1, ended: bool = False, zone: int = 0
) -> ConntrackEvent:
    return ConntrackEvent(ended, number, socket.AF_INET, 6, zone, original, reply)


def published(number: int = 1, ended: bool = False, server: Any = SERVER) -> Any:
    return event((CLIENT, PUBLIC), (server, CLIENT), number, ended)


def way(netns: Any, near: Any, far: Any) -> tuple[Any, ...]:
    near_port, far_port = int.from_bytes(near[16:]), int.from_bytes(far[16:])
    return (netns, 6, socket.AF_INET, near[:16], near_port, far[:16], far_port)


def ends(found: Any) -> Any:
    return None if found is None else (
        found[0] + found[1].to_bytes(2), found[2] + found[3].to_bytes(2)
    )  # fmt: skip


@pytest.fixture(name="owners")
def _owners() -> dict[Any, int]:
    return {HOST: 0, BOX: 0, OTHER: 0}


@pytest.fixture(name="known")
def _known(owners: dict[Any, int | None]) -> Translations:
    known = Translations(owners.get)
    for netns in owners:
        known.hear_until(netns, 100 * SECOND)
    return known


def test_each_side_is_told_the_other(known: Translations) -> None:
    known.add(HOST, published(), SECOND, SECOND)
    for netns in (HOST, BOX):
        for near, far, became in (
            (CLIENT, PUBLIC, (CLIENT, SERVER)),
            (SERVER, CLIENT, (PUBLIC, CLIENT)),
            (CLIENT, SERVER, (CLIENT, PUBLIC)),
        ):
            assert ends(known.find(way(netns, near, far), SECOND, SECOND)) == became
    assert known.find(way(HOST, SERVER, PUBLIC), SECOND, SECOND) is None


def test_between_two_changes_it_is_told_how_it_goes_on(known: Translations) -> None:
    gate = end("10.8.0.1", 5000)
    known.add(HOST, event((CLIENT, PUBLIC), (SERVER, gate)), SECOND, SECOND)
    assert ends(known.find(way(HOST, CLIENT, SERVER), SECOND, SECOND)) == (gate, SERVER)
    assert ends(known.find(way(BOX, SERVER, gate), SECOND, SECOND)) == (PUBLIC, CLIENT)


def test_ports_alone_may_change(known: Translations) -> None:
    changed = CLIENT[:16] + (9).to_bytes(2)
    known.add(HOST, event((CLIENT, SERVER), (SERVER, changed)), SECOND, SECOND)
    assert ends(known.find(way(BOX, SERVER, changed), SECOND, SECOND)) == (SERVER, CLIENT)


def test_who_comes_later_with_the_same_ends_has_nothing(known: Translations) -> None:
    known.add(HOST, published(), SECOND, 2 * SECOND)
    known.add(HOST, published(ended=True), 3 * SECOND, 4 * SECOND)
    here = way(BOX, SERVER, CLIENT)
    assert known.find(here, 2 * SECOND, 3 * SECOND) is not None
    assert known.find(here, 5 * SECOND, 5 * SECOND) is None
    assert known.find(here, 0, SECOND // 2) is None  # and who came before


def test_the_same_ends_used_again_are_told_apart_by_time(known: Translations) -> None:
    second = end("10.8.0.3", 80)
    known.add(HOST, published(1), SECOND, SECOND)
    known.add(HOST, published(1, ended=True), 2 * SECOND, 3 * SECOND)
    known.add(HOST, published(2, server=second), 2 * SECOND, 3 * SECOND)
    here = way(HOST, CLIENT, PUBLIC)
    assert ends(known.find(here, SECOND, SECOND)) == (CLIENT, SERVER)
    assert ends(known.find(here, 4 * SECOND, 4 * SECOND)) == (CLIENT, second)
    assert known.find(here, 2 * SECOND + 1, 3 * SECOND - 1) is None  # one of both


def opening(moment: Any) -> Any:
    row = {"saddr": "10.7.0.2", "sport": 4000, "daddr": "10.7.0.1", "dport": 8080, "netns": HOST,
           "dir": 2, "proto": 6, "tcp_flags": 2, "time_ns": moment}  # fmt: skip
    return summarize(make_records(row), 1)


def test_a_beginning_ends_what_had_the_tuple_where_no_end_is_told(known: Translations) -> None:
    second = end("10.8.0.3", 80)
    known.heard_ns.clear()
    known.add_known(HOST, [published()], False, SECOND, SECOND)
    known.hear_until(HOST, 100 * SECOND)
    known.add(HOST, published(server=second), 5 * SECOND, 6 * SECOND)  # its number is the same
    here = way(HOST, CLIENT, PUBLIC)
    assert ends(known.find(here, 4 * SECOND, 4 * SECOND)) == (CLIENT, SERVER)
    assert ends(known.find(here, 7 * SECOND, 7 * SECOND)) == (CLIENT, second)
    assert known.find(here, 5 * SECOND + 1, 6 * SECOND - 1) is None
    assert ends(known.find(here, 5 * SECOND + 1, 6 * SECOND - 1, opens=True)) == (CLIENT, second)
    known.add(HOST, published(ended=True, number=2), 8 * SECOND, 8 * SECOND)  # of an earlier one
    assert known.find(here, 9 * SECOND, 9 * SECOND) is not None


def test_a_later_look_ends_what_is_not_there(known: Translations) -> None:
    known.heard_ns.clear()
    known.add_known(HOST, [published()], False, SECOND, SECOND)
    known.hear_until(HOST, 100 * SECOND)
    assert known.any_older(HOST)
    known.add_known(HOST, [published()], False, 5 * SECOND, 5 * SECOND)
    known.add_known(HOST, [], False, 9 * SECOND, 9 * SECOND)
    here = way(HOST, CLIENT, PUBLIC)
    assert known.find(here, 4 * SECOND, 4 * SECOND) is not None
    assert known.find(here, 6 * SECOND, 6 * SECOND) is None
    assert not known.any_older(HOST)


@pytest.mark.parametrize("closing", [False, True])
def test_who_opens_a_connection_that_is_there_is_doubted(
    known: Translations, closing: bool
) -> None:
    """It is believed again when conntrack says that it goes on; not if that is closing."""
    known.add(HOST, published(), SECOND, SECOND)
    here = way(HOST, CLIENT, PUBLIC)
    assert known.doubt(opening(SECOND)) == set()
    assert known.find(here, 2 * SECOND, 2 * SECOND) is not None
    assert known.doubt(opening(3 * SECOND)) == {HOST}
    assert known.find(here, 4 * SECOND, 4 * SECOND) is None
    still = dataclasses.replace(published(), closing=closing)
    known.add_known(HOST, [still], False, 5 * SECOND, 5 * SECOND)
    assert (known.find(here, 6 * SECOND, 6 * SECOND) is None) == closing


def test_an_end_that_nothing_follows_may_be_before_the_packets(known: Translations) -> None:
    known.add(HOST, published(), SECOND, 2 * SECOND)
    known.add(HOST, published(ended=True), 3 * SECOND, 5 * SECOND)
    here = way(HOST, CLIENT, PUBLIC)
    assert known.find(here, 4 * SECOND, 4 * SECOND) is None
    known.add(HOST, published(), 6 * SECOND, 8 * SECOND)  # it begins and ends between two readings
    known.add(HOST, published(ended=True), 6 * SECOND, 8 * SECOND)
    assert known.find(here, 7 * SECOND, 7 * SECOND) is not None


def test_readings_that_follow_each_other_at_once_are_two(known: Translations) -> None:
    """A reading's events are added when it ends; what it heard all of, when it began."""
    known.add(HOST, published(), SECOND, 2 * SECOND + 1000)
    known.add(HOST, published(ended=True), 2 * SECOND, 5 * SECOND)
    assert known.find(way(HOST, CLIENT, PUBLIC), 4 * SECOND, 4 * SECOND) is None


def test_what_may_have_ended_unheard_is_not_told(known: Translations) -> None:
    known.add(HOST, published(), SECOND, SECOND)
    known.hear_until(HOST, 5 * SECOND)
    here = way(BOX, SERVER, CLIENT)
    assert known.find(here, 5 * SECOND, 5 * SECOND) is not None
    assert known.find(here, 5 * SECOND, 6 * SECOND) is None
    assert known.find_now(here) is not None


def test_two_zones_that_say_different_things_say_nothing(known: Translations) -> None:
    known.add(HOST, published(1), SECOND, SECOND)
    known.add(
        HOST, event((CLIENT, PUBLIC), (end("10.8.0.3", 80), CLIENT), 2, zone=7), SECOND, SECOND
    )
    assert known.find(way(HOST, CLIENT, PUBLIC), SECOND, SECOND) is None


def test_two_namespaces_with_one_tuple_are_not_mixed(
    known: Translations, owners: dict[Any, int | None]
) -> None:
    known.add(HOST, published(1), SECOND, SECOND)
    known.add(OTHER, published(2, server=end("10.8.0.9", 80)), SECOND, SECOND)
    assert ends(known.find(way(HOST, CLIENT, PUBLIC), SECOND, SECOND))[1] == SERVER
    assert ends(known.find(way(OTHER, CLIENT, PUBLIC), SECOND, SECOND))[1] != SERVER
    # a third one can be behind either
    assert known.find(way(BOX, CLIENT, PUBLIC), SECOND, SECOND) is None


@pytest.mark.parametrize("stranger", [1000, None])
def test_what_a_user_does_in_his_namespace_tells_nothing_of_others(
    known: Translations, owners: dict[Any, int | None], stranger: int | None
) -> None:
    owners[OTHER] = stranger
    known.add(OTHER, published(), SECOND, SECOND)
    assert known.find(way(OTHER, CLIENT, PUBLIC), SECOND, SECOND) is not None
    for netns in (HOST, BOX, 99):
        assert known.find(way(netns, SERVER, CLIENT), SECOND, SECOND) is None
    owners[BOX] = stranger
    found = known.find(way(BOX, SERVER, CLIENT), SECOND, SECOND)
    assert (found is not None) == (stranger is not None)


def many(known: Any, netns: Any, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        client = end("10.7.0.2", 10_000 + number)
        known.add(netns, event((client, PUBLIC), (SERVER, client), number), SECOND, SECOND)


def test_the_table_is_bounded_and_says_so(owners: dict[Any, int | None]) -> None:
    known = Translations(owners.get, limit=100)
    known.hear_until(HOST, 100 * SECOND)
    many(known, HOST, 100)
    assert not known.cut
    many(known, HOST, 50, 100)
    assert len(known) == 100 and known.evicted == 50 and known.cut
    assert known.find(way(HOST, end("10.7.0.2", 10_000), PUBLIC), SECOND, SECOND) is None
    assert known.find(way(HOST, end("10.7.0.2", 10_149), PUBLIC), SECOND, SECOND) is not None
    for number in range(150):
        known.add(HOST, event((end("10.7.0.2", 10_000 + number), PUBLIC), (SERVER, CLIENT),
                              number, ended=True), SECOND, SECOND)  # fmt: skip
    known.add(HOST, published(999), 60 * SECOND, 60 * SECOND)
    assert len(known) == 1 and len(known._by_ends) == 2 and known._ports.sum() == 2


def test_a_user_with_many_connections_takes_nobody_elses_place(
    owners: dict[Any, int | None],
) -> None:
    owners[OTHER] = 1000
    known = Translations(owners.get, limit=100)
    known.hear_until(HOST, 100 * SECOND)
    many(known, HOST, 10)
    many(known, OTHER, 1000)
    assert sum(one.netns == HOST for one in known._entries.values()) == 10


def test_a_namespace_that_goes_takes_its_connections_along(known: Translations) -> None:
    known.add(HOST, published(), SECOND, SECOND)
    known.leave(HOST)
    assert len(known) == 0 and not known._by_ends and not known._ports.any()


def translated() -> Any:
    """FLOWs: two of one published connection, and one that NAT has nothing to do with."""
    rows = [
        {"saddr": "10.8.0.2", "sport": 80, "daddr": "10.7.0.2", "dport": 4000, "tgid": 7,
         "netns": BOX, "dir": 2},
        {"saddr": "10.7.0.2", "sport": 4000, "daddr": "10.7.0.1", "dport": 8080, "netns": HOST,
         "dir": 3},
        {"saddr": "10.7.0.9", "sport": 6, "daddr": "10.7.0.1", "dport": 7, "netns": HOST, "dir": 2},
    ]  # fmt: skip
    flows = summarize(make_records(*({"proto": 6, **row} for row in rows)), 1)
    known = Translations({HOST: 0, BOX: 0}.get)
    known.hear_until(HOST, FOREVER)
    known.add(HOST, published(), 0, 0)
    known.stamp(flows)
    return flows


QUESTIONS = {
    "public port": ({"port": 8080}, {1, 2}),
    "port of the server": ({"port": 80}, {1, 2}),
    "port of the client": ({"port": 4000}, {1, 2}),
    "another port": ({"port": 7}, {3}),
    "far end": ({"host": ipaddress.ip_network("10.7.0.2")}, {1, 2}),
    "server": ({"host": ipaddress.ip_network("10.8.0.0/16")}, {2}),
    "ends": (
        {"ends": ((2, CLIENT[:16], 4000), (2, PUBLIC[:16], 8080))},
        {1, 2},
    ),
    "ends and port": (
        {"ends": ((2, CLIENT[:16], 4000), (2, SERVER[:16], 80)), "port": 8080},
        {1, 2},
    ),
    "namespace": ({"port": 8080, "netns": BOX}, {1}),
}


@pytest.mark.parametrize(("question", "wanted"), QUESTIONS.values(), ids=QUESTIONS)
def test_questions_match_either_address_in_memory_in_the_database_and_in_sealed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: Any, wanted: Any
) -> None:
    monkeypatch.setattr(sealed, "_GROUP", 1)
    flows = translated()
    memory = FlowMemory(10)
    memory.update(flows, Clock(0, 0))
    asked = Question(**question)
    assert {number for number, _ in memory.ask(asked)[1]} == wanted
    store = Store(str(tmp_path / "history.db"))
    store.write(np.array([1, 2, 3], np.uint64), flows, ())
    before = store.ask(asked, FOREVER)
    assert {number for number, _ in before} == wanted
    assert store.seal(lambda ids: np.zeros(len(ids), bool), 3) == 3
    after = store.ask(asked, FOREVER)
    assert {number: flow_fields(row) for number, row in after} == {
        number: flow_fields(row) for number, row in before
    }
    store.close()


def test_a_flow_of_the_history_keeps_its_translation_when_it_goes_on() -> None:
    flows = translated()
    memory = FlowMemory(10)
    memory.update(flows, Clock(0, 0))
    plain = flows.copy()
    for name in there(FLOW.names):
        if name.startswith("nat_"):
            plain[name] = 0
    memory.update(plain, Clock(0, 0))
    _, found = memory.ask(Question(port=8080, netns=BOX))
    told = flow_fields(found[0][1])
    assert (told["nat_local"], told["nat_lport"]) == ("10.7.0.1", 8080)
    assert (told["nat_remote"], told["nat_rport"]) == ("10.7.0.2", 4000)


def test_rows_that_go_leave_no_translation_to_those_that_take_their_place() -> None:
    memory = FlowMemory(8)
    memory.update(translated(), Clock(0, 0))
    for number in range(64):
        record = {"sport": 100 + number, "dport": 9, "proto": 6, "time_ns": SECOND + number}
        memory.update(summarize(make_records(record), 1), Clock(0, 0))
    _, found = memory.ask(Question())
    told = [flow_fields(row) for _, row in found]
    others = [one for one in told if one["rport"] == 9]
    assert others and {one["nat_local"] for one in others} == {None}
