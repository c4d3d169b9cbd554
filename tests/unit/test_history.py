# SPDX-License-Identifier: MIT
from __future__ import annotations

import dataclasses
import ipaddress
from collections import Counter
from typing import Any

import numpy as np
import pytest

from daemon.history.memory import FlowMemory, Question, flow_fields
from nlproto.records.clock import Clock
from nlproto.tables.flows import pack_address, summarize
from recording import make_records

NO_OFFSET = Clock(0, 0)


def _ends(*ends: Any) -> Any:
    return tuple((*pack_address(address), port) for address, port in ends)


def _ports(history: Any, **conditions: Any) -> list[int]:
    total, rows = history.ask(Question(**conditions))
    assert total >= len(rows)
    return [int(flow["lport"]) for _, flow in rows]


@pytest.fixture(name="history")
def _history() -> FlowMemory:
    history = FlowMemory(1000)
    rows = (
        {"sport": 1, "time_ns": 100, "comm": b"curl", "tgid": 11, "dport": 80, "proto": 6},
        {"sport": 2, "time_ns": 200, "comm": b"dig", "tgid": 12, "uid": 0},
        {"sport": 3, "time_ns": 300, "comm": b"dig", "tgid": 13, "daddr": "10.9.0.7"},
        {"sport": 4, "time_ns": 400, "tgid": 0, "start_ns": 0, "uid": 0, "how": 18},
        {"sport": 5, "time_ns": 500, "saddr": "2001:db8::5", "daddr": "2001:db8::6", "family": 10},
    )
    history.update(summarize(make_records(*rows), 9), NO_OFFSET)
    return history


@pytest.mark.parametrize(
    ("conditions", "ports"),
    [
        ({}, [5, 4, 3, 2, 1]),
        ({"port": 80}, [1]),
        ({"port": 53}, [5, 4, 3, 2]),
        ({"port": 2}, [2]),
        ({"proto": 6}, [1]),
        ({"pid": 13}, [3]),
        ({"pname": "dig"}, [3, 2]),
        ({"uid": 1000}, [5, 3, 1]),
        ({"uid": 0}, [2]),
        ({"since_ns": 300}, [5, 4, 3]),
        ({"seen_until_ns": 300}, [3, 2, 1]),
        ({"at_ns": 200}, [2]),
        ({"at_ns": 250}, []),
        ({"host": ipaddress.ip_network("10.9.0.7")}, [3]),
        ({"host": ipaddress.ip_network("10.0.0.0/8")}, [4, 3, 2, 1]),
        ({"host": ipaddress.ip_network("2001:db8::/32")}, [5]),
        ({"host": ipaddress.ip_network("0.0.0.0/0")}, [4, 3, 2, 1]),
        ({"port": 53, "pname": "dig", "uid": 1000}, [3]),
        ({"ends": _ends(("10.0.0.1", 1), ("10.0.0.2", 80))}, [1]),
        ({"ends": _ends(("10.0.0.2", 80), ("10.0.0.1", 1))}, [1]),
        ({"ends": _ends(("10.0.0.1", 80), ("10.0.0.2", 1))}, []),
        ({"ends": _ends(("2001:db8::6", 53), ("2001:db8::5", 5))}, [5]),
        ({"ends": _ends(("10.0.0.1", 3), ("10.9.0.7", 53)), "port": 3}, [3]),
        ({"ends": _ends(("10.0.0.1", 3), ("10.9.0.7", 53)), "port": 4}, []),
    ],
)
def test_a_question_finds_what_fits_newest_first(
    history: FlowMemory, conditions: dict[str, Any], ports: list[Any]
) -> None:
    assert _ports(history, **conditions) == ports


def test_a_long_name_is_found_as_the_kernel_cuts_it() -> None:
    history = FlowMemory(10)
    history.update(summarize(make_records({"comm": b"very-long-progr"})), NO_OFFSET)
    assert _ports(history, pname="very-long-program-name") == [40000]


def test_the_limit_keeps_the_newest_and_the_total_tells_how_many_there_were(
    history: FlowMemory,
) -> None:
    total, rows = history.ask(Question(limit=2))
    assert (total, [int(flow["lport"]) for _, flow in rows]) == (5, [5, 4])


def test_later_packets_of_a_flow_add_to_it() -> None:
    history = FlowMemory(10)
    for moment in (100, 50, 200):
        history.update(summarize(make_records({"time_ns": moment}), 1), Clock(1000, 0))
    total, ((_, flow),) = history.ask(Question())
    assert (int(flow["packets_out"]), int(flow["bytes_out"])) == (3, 180)
    assert (int(flow["first_ns"]), int(flow["last_ns"])) == (1050, 1200)


def test_when_full_the_longest_silent_go_and_are_counted() -> None:
    history = FlowMemory(160)
    rows = ({"sport": 1 + n, "time_ns": 1000 + n} for n in range(300))
    for row in rows:
        history.update(summarize(make_records(row), 1), NO_OFFSET)
    assert len(history) <= 160
    assert history.evicted == 300 - len(history)
    newest = _ports(history, limit=1000)
    assert newest == list(range(300, 300 - len(history), -1))
    assert history.horizon_ns == 1000 + history.evicted - 1


def test_a_batch_larger_than_the_history_leaves_its_last_part() -> None:
    history = FlowMemory(16)
    history.update(summarize(make_records(*({"sport": n} for n in range(100))), 1), NO_OFFSET)
    assert len(history) <= 16
    assert history.evicted + len(history) == 100


def test_changed_rows_are_handed_out_once_and_again_after_a_failure() -> None:
    history = FlowMemory(100, next_id=40)
    history.update(summarize(make_records({"sport": 1}, {"sport": 2}), 1), NO_OFFSET)
    ids, flows = history.changed(10)
    assert sorted(ids.tolist()) == [40, 41]
    assert len(history.changed(10)[0]) == 0
    history.mark_changed(ids[:1])
    assert history.changed(10)[0].tolist() == ids[:1].tolist()
    assert history.has(np.array([39, 40, 41, 42], np.uint64)).tolist() == [False, True, True, False]


def test_eviction_keeps_ids_findable() -> None:
    history = FlowMemory(32)
    for n in range(100):
        history.update(summarize(make_records({"sport": n, "time_ns": n + 1}), 1), NO_OFFSET)
    _, rows = history.ask(Question())
    ids = np.array([number for number, _ in rows], np.uint64)
    assert history.has(ids).all()
    assert not history.has(np.array([1], np.uint64)).any()
    history.update(summarize(make_records({"sport": 99, "time_ns": 500}), 1), NO_OFFSET)
    assert int(history.ask(Question(port=99))[1][0][1]["packets_out"]) == 2


def test_a_flow_of_nobody_tells_no_owner(history: FlowMemory) -> None:
    _, ((_, flow),) = history.ask(Question(port=4))
    fields = flow_fields(flow)
    assert fields["pid"] is None and fields["uid"] is None and fields["comm"] == ""
    assert fields["how"] == "no_socket"


def test_a_question_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Question().port = 5  # type: ignore[misc]


def _flood(history: Any, count: int, base: Any, **values: Any) -> None:
    for at in range(0, count, 500):
        rows = ({"sport": 1 + n % 60000, "time_ns": base + n} | values for n in range(at, at + 500))
        history.update(summarize(make_records(*rows), 1), NO_OFFSET)


def _uids(history: Any) -> Counter[Any]:
    _, rows = history.ask(Question(limit=10**6))
    return Counter((int(flow["tgid"]) and int(flow["uid"])) for _, flow in rows)


def test_a_flood_of_one_users_flows_evicts_that_users_alone() -> None:
    history = FlowMemory(1000)
    _flood(history, 500, 0, uid=0, comm=b"sshd", dport=22)
    _flood(history, 20_000, 10**6, uid=1000, tgid=200)
    assert _uids(history)[0] >= 437  # a half of seven eighths
    history = FlowMemory(1000)
    rows = ({"sport": n, "time_ns": n, "uid": 0, "comm": b"sshd"} for n in range(100))
    history.update(summarize(make_records(*rows), 1), NO_OFFSET)
    _flood(history, 20_000, 10**6, uid=1000, tgid=200)
    assert _uids(history)[0] == 100


def test_a_batch_of_one_user_larger_than_the_history_leaves_others_their_place() -> None:
    history = FlowMemory(64)
    rows = ({"sport": n, "time_ns": n, "uid": 0} for n in range(20))
    history.update(summarize(make_records(*rows), 1), NO_OFFSET)
    _flood(history, 1000, 10**6, uid=1000, tgid=200)
    assert _uids(history)[0] == 20


def test_packets_of_nobody_evict_nobodys_flows() -> None:
    history = FlowMemory(1000)
    rows = ({"sport": n, "time_ns": n, "uid": 0} for n in range(100))
    history.update(summarize(make_records(*rows), 1), NO_OFFSET)
    _flood(history, 10_000, 10**6, tgid=0, start_ns=0, uid=0, how=18)
    assert sum(flow["tgid"] != 0 for _, flow in history.ask(Question())[1]) == 100


def test_a_flood_at_one_of_roots_services_evicts_that_services_flows() -> None:
    history = FlowMemory(1000)
    rows = ({"sport": n, "time_ns": n, "uid": 0, "comm": b"sshd", "tgid": 7} for n in range(100))
    history.update(summarize(make_records(*rows), 1), NO_OFFSET)
    _flood(history, 10_000, 10**6, uid=0, comm=b"dnsmasq")
    assert len(_ports(history, pname="sshd")) == 100


def test_flows_of_a_wrong_year_are_not_the_newest_for_ever() -> None:
    year = 365 * 86400 * 10**9
    history = FlowMemory(100)
    rows = ({"sport": n, "time_ns": n} for n in range(80))
    history.update(summarize(make_records(*rows), 1), Clock(40 * year, 0))
    for n in range(200):
        record = make_records({"sport": 1000 + n, "time_ns": 1000 + n})
        history.update(summarize(record, 1), Clock(20 * year, 0))
    assert max(_ports(history)) == 1199
    assert min(_ports(history)) >= 1000


def test_a_flow_that_was_seen_in_a_wrong_year_goes_on_in_the_right_one() -> None:
    year = 365 * 86400 * 10**9
    history = FlowMemory(100)
    for moment, offset in ((100, 20 * year), (200, 40 * year), (300, 20 * year)):
        history.update(summarize(make_records({"time_ns": moment}), 1), Clock(offset, 0))
    ((_, flow),) = history.ask(Question())[1]
    assert int(flow["packets_out"]) == 3
    assert (int(flow["first_ns"]), int(flow["last_ns"])) == (20 * year + 100, 20 * year + 300)
    history = FlowMemory(100)
    for moment, offset in ((100, 40 * year), (200, 20 * year)):
        history.update(summarize(make_records({"time_ns": moment}), 1), Clock(offset, 0))
    ((_, flow),) = history.ask(Question(at_ns=20 * year + 200))[1]
    assert int(flow["packets_out"]) == 2


def test_a_row_evicted_while_it_could_not_be_stored_is_counted() -> None:
    history = FlowMemory(16)
    history.update(summarize(make_records({"sport": 1, "time_ns": 1}), 1), NO_OFFSET)
    ids, _ = history.changed(10)
    for n in range(40):
        history.update(summarize(make_records({"sport": 9 + n, "time_ns": 9 + n}), 1), NO_OFFSET)
    before = history.unstored
    history.mark_changed(ids)
    assert history.unstored == before + 1
    assert history.waiting() == len(history)


def test_a_flood_at_one_process_evicts_its_flows_and_not_its_namesakes() -> None:
    history = FlowMemory(1000)
    rows = (
        {"sport": n, "time_ns": n, "uid": 0, "comm": b"python3", "tgid": 7 + n % 5}
        for n in range(100)
    )
    history.update(summarize(make_records(*rows), 1), NO_OFFSET)
    _flood(history, 10_000, 10**6, uid=0, comm=b"python3", tgid=99)
    assert all(len(_ports(history, pid=pid)) == 20 for pid in range(7, 12))
