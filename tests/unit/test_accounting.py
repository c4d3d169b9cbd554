# SPDX-License-Identifier: MIT
"""flows.c and table.c do what a plain loop does, for any records, the maddest included."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemon.history.memory import FlowMemory
from nlproto.records import wire
from nlproto.records.clock import Clock
from nlproto.tables.column_table import ColumnTable, part_of
from nlproto.tables.flows import (
    FLOW,
    KEY_FIELDS,
    first_of_processes,
    group,
    summarize,
    unnamed_places,
)
from nlproto.tables.portmap import PortMap
from nlproto.tables.shares import surplus
from recording import make_records
from waiting import there

IN, OUT, FWD = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_DIR_OUT, wire.lib.SNIFFER_DIR_FWD
WORD = 1 << 64


def _some(random: np.random.Generator, bits: int, count: int) -> np.ndarray:
    return random.choice(np.array([0, 1, 2, 2 ** (bits - 1), 2**bits - 1], np.uint64), count)


def make_any(seed: int, count: int) -> np.ndarray:
    """RECORDs in which little differs, so that flows meet again, and numbers are at their ends."""
    random = np.random.default_rng(seed)
    found = np.zeros(count, wire.RECORD)
    for bits, names in (
        (64, ("cookie", "start_ns", "time_ns", "inode")),
        (32, ("tgid", "netns", "uid", "len")),
        (16, ("sport", "dport", "gso_segs", "flags")),
        (8, ("proto", "family", "how", "hdr_len")),
    ):
        for name in names:
            different = random.integers(0, 2) or name in ("len", "gso_segs", "hdr_len")
            found[name] = _some(random, bits, count if different else 1)
    found["dir"] = random.integers(0, 5, count)
    for name in ("saddr", "daddr"):
        found[name][:, 0] = found[name][:, 15] = random.choice([0, 1, 255], count)
    found["comm"] = random.choice([b"", b"a", b"b" * 16, b"\xff\xfe"], count)
    return found


def records() -> st.SearchStrategy[np.ndarray]:
    return st.builds(make_any, st.integers(0, 2**32), st.integers(0, 40))


def _plain(record: np.void) -> tuple[tuple[Any, ...], bool, int, int]:
    """(key, whether it goes out, packets, bytes) of one record."""
    source = (bytes(record["saddr"]), int(record["sport"]))
    target = (bytes(record["daddr"]), int(record["dport"]))
    forwarded = int(record["dir"]) == FWD
    words = [
        (*(int(word) for word in np.frombuffer(end[0], np.uint64)), end[1])
        for end in (source, target)
    ]
    swap = int(record["dir"]) == IN or (forwarded and words[0] > words[1])
    local, remote = (target, source) if swap else (source, target)
    out = not swap if forwarded else int(record["dir"]) == OUT
    names = ("cookie", "start_ns", "tgid", "netns", "proto", "family")
    key = (*(int(record[name]) for name in names), local, remote, forwarded)
    segments = max(1, int(record["gso_segs"]))
    return key, out, segments, int(record["len"]) + (segments - 1) * int(record["hdr_len"])


def _key(flow: np.void) -> tuple[Any, ...]:
    names = ("cookie", "start_ns", "tgid", "netns", "proto", "family")
    ends = [
        (np.ascontiguousarray(flow[address]).tobytes(), int(flow[port]))
        for address, port in (("laddr", "lport"), ("raddr", "rport"))
    ]
    return (*(int(flow[name]) for name in names), *ends, bool(flow["forwarded"]))


@given(records(), st.integers(0, WORD - 1))
def test_sums_are_those_of_a_plain_loop_for_any_records(found: Any, seed: int) -> None:
    expected: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in found:
        key, out, packets, size = _plain(record)
        sums = expected.setdefault(
            key,
            {"packets_in": 0, "bytes_in": 0, "packets_out": 0, "bytes_out": 0, "flags": 0,
             "first_ns": WORD - 1, "last_ns": 0},
        )  # fmt: skip
        way = "out" if out else "in"
        sums[f"packets_{way}"] += packets
        sums[f"bytes_{way}"] = (sums[f"bytes_{way}"] + size) % WORD
        sums["flags"] |= int(record["flags"])
        sums["first_ns"] = min(sums["first_ns"], int(record["time_ns"]))
        sums["last_ns"] = max(sums["last_ns"], int(record["time_ns"]))
        sums |= {name: record[name].item() for name in ("how", "uid", "inode", "comm")}
    flows, belongs = group(found, seed)
    assert {
        _key(flow): {name: flow[name].item() for name in sums}
        for flow, sums in ((flow, expected[_key(flow)]) for flow in flows)
    } == expected
    assert [_key(flows[index]) for index in belongs] == [_plain(record)[0] for record in found]
    hashes = dict(zip(map(_key, flows), flows["hash"].tolist(), strict=True))
    again = summarize(found[::-1], seed)
    assert {_key(flow): int(flow["hash"]) for flow in again} == hashes


def test_bytes_wrap_at_64_bits_and_disturb_nothing_else() -> None:
    found = np.zeros(3, wire.RECORD)
    found["dir"], found["tgid"] = OUT, 1
    history = FlowMemory(10)
    flows = summarize(found)
    flows["bytes_out"] = WORD - 1
    history.update(flows, Clock(0, 0))
    flows["bytes_out"] = 5
    history.update(flows, Clock(0, 0))
    ((_, flow),) = history.ask(_everything())[1]
    assert (int(flow["bytes_out"]), int(flow["packets_out"]), int(flow["bytes_in"])) == (4, 6, 0)


def _everything() -> Any:
    from daemon.history.memory import Question

    return Question()


@given(records())
def test_each_process_is_told_once_where_it_comes_first(found: Any) -> None:
    first: dict[tuple[int, int], int] = {}
    for place, record in enumerate(found):
        if record["tgid"]:
            first.setdefault((int(record["tgid"]), int(record["start_ns"])), place)
    assert first_of_processes(found, 7).tolist() == list(first.values())


@given(records(), st.sets(st.integers(0, 31)))
def test_unnamed_records_are_those_a_plain_loop_finds(found: Any, hows: Any) -> None:
    expected = [
        place
        for place, record in enumerate(found)
        if not record["tgid"] and int(record["how"]) in hows and int(record["dir"]) != FWD
    ]
    assert unnamed_places(found, hows).tolist() == expected


@given(st.lists(records(), max_size=4), st.sampled_from([1, 2, 5, 100]))
def test_the_history_has_the_sums_of_all_batches_or_says_how_many_flows_it_let_go(
    parts: Any, limit: Any
) -> None:
    history = FlowMemory(limit)
    expected: dict[tuple[Any, ...], list[int]] = {}
    for part in parts:
        for record in part:
            key, _, packets, size = _plain(record)
            sums = expected.setdefault(key, [0, 0])
            sums[0] += packets
            sums[1] = (sums[1] + size) % WORD
        history.update(summarize(part, 3), Clock(0, 0))
    total, rows = history.ask(_everything())
    assert total == len(history) <= limit
    found = {
        _key(flow): [
            int(flow["packets_in"]) + int(flow["packets_out"]),
            (int(flow["bytes_in"]) + int(flow["bytes_out"])) % WORD,
        ]
        for _, flow in rows
    }
    assert len(found) == total
    if not history.evicted:
        assert found == expected
    else:
        assert found.keys() <= expected.keys()
        assert all(found[key][0] <= expected[key][0] for key in found)


@given(st.lists(records(), max_size=4), st.sampled_from([1, 3, 1000]))
def test_the_port_map_has_each_owner_once_as_its_last_packet_has_it(parts: Any, limit: Any) -> None:
    portmap = PortMap(limit)
    expected: dict[tuple[Any, ...], int] = {}
    for part in parts:
        flows = summarize(part, 3)
        for flow in flows:
            if not flow["tgid"] or flow["forwarded"] or flow["flags"] & wire.lib.SNIFFER_F_DEAD:
                continue
            end = np.ascontiguousarray(flow["laddr"]).tobytes(), int(flow["lport"])
            names = ("netns", "proto", "family", "tgid", "start_ns")
            key = (*(int(flow[name]) for name in names), *end)
            expected[key] = max(expected.get(key, 0), int(flow["last_ns"]))
        portmap.update(flows)
    owners = portmap.everything()
    assert len(owners) == len(portmap) <= limit
    found = {}
    for owner in owners:
        netns, proto, family, address, port = owner.endpoint
        found[netns, proto, family, owner.tgid, owner.start_ns, address, port] = owner.seen_ns
        assert owner in portmap.who(port)
    assert len(found) == len(owners)
    assert sum(portmap.count(port) for port in {owner.port for owner in owners}) == len(owners)
    if not portmap.evicted:
        assert found == expected
    for key in {owner.key for owner in owners}:
        portmap.forget_process(key)
    assert len(portmap) == 0
    assert not any(portmap.count(port) or portmap.who(port) for *_, port in found)


ROW = np.dtype([("hash", "u8"), ("key", "u4"), ("value", "u4")])
GROUPS = part_of(ROW, "key"), part_of(ROW, "value")
actions = st.lists(
    st.tuples(st.sampled_from(["put", "put", "put", "remove", "keep"]), st.integers(0, 99)),
    max_size=120,
)


@given(actions, st.sampled_from([1, 7, WORD - 1]))
def test_a_table_is_a_dictionary_whatever_its_hashes_are(steps: Any, hashes: Any) -> None:
    """With 1 all rows share a slot; keys are told apart all the same."""
    table = ColumnTable(GROUPS, ("key",), 64)
    known: dict[int, Any] = {}
    for what, number in steps:
        value = np.array([(number * (hashes - 1) % WORD, number, number + 1)], ROW)
        if what == "put" and number not in known and len(known) < 64:
            row = min(set(range(64)) - set(known.values()))
            table.put(np.array([row]), value)
            known[number] = row
        elif what == "remove" and number in known:
            table.remove(np.array([known.pop(number)]))
        elif what == "keep":
            stay = {key: row for key, row in known.items() if key % 3}
            mask = np.zeros(64, bool)
            mask[list(stay.values())] = True
            table.keep(mask)
            order = sorted(stay, key=stay.__getitem__)
            known = {key: row for row, key in enumerate(order)}
        assert len(table) == len(known)
    values = np.array([(n * (hashes - 1) % WORD, n, 0) for n in range(100)], ROW)
    assert table.find(values).tolist() == [known.get(n, -1) for n in range(100)]


def _plain_surplus(age: Any, groups: Any, keep: Any, weights: Any) -> Any:
    place = list(age)
    for names in reversed(groups):
        sums: dict[int, int] = {}
        after = list(place)
        for row in sorted(range(len(age)), key=lambda row: (place[row], age[row])):
            sums[names[row]] = sums.get(names[row], 0) + weights[row]
            after[row] = sums[names[row]]
        place = after
    goes, left = [True] * len(age), keep
    for row in sorted(range(len(age)), key=lambda row: (place[row], age[row])):
        left -= weights[row]
        if left < 0:
            break
        goes[row] = False
    return goes


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2**40, 2**63 - 1, -1, -(2**63)]),
            st.integers(0, 3),
            st.integers(0, WORD - 1),
            st.integers(0, 9),
        ),
        max_size=60,
    ),
    st.integers(-1, 200),
    st.booleans(),
)
@example([(0, 0, 0, 0)], -1, True)
def test_who_gives_way_is_chosen_as_by_sorting(rows: Any, keep: int, weighted: bool) -> None:
    age, payers, programs, weights = ([row[n] for row in rows] for n in range(4))
    columns = np.array(payers, np.uint32), np.array(programs, np.uint64)
    found = surplus(np.array(age, np.int64), columns, keep, np.array(weights) if weighted else None)
    plain = _plain_surplus(age, (payers, programs), keep, weights if weighted else [1] * len(age))
    assert found.tolist() == plain


def test_a_flood_of_program_names_that_a_user_chose_is_judged_as_fast_as_any() -> None:
    """Each row in a group of its own, names that collide in a table without a secret."""
    names = (np.arange(50_000, dtype=np.uint64) << np.uint64(40)) | np.uint64(1)
    goes = surplus(np.arange(50_000), (np.zeros(50_000, np.uint32), names), 100)
    assert np.count_nonzero(~goes) == 100


def test_equal_cookies_of_two_namespaces_are_two_flows_and_two_owners() -> None:
    found = make_records({"cookie": 5, "netns": 1}, {"cookie": 5, "netns": 2})
    history, portmap = FlowMemory(10), PortMap(10)
    history.update(summarize(found, 1), Clock(0, 0))
    portmap.update(summarize(found, 1))
    assert len(history) == len(portmap) == 2
    assert sorted(owner.netns for owner in portmap.who(40000)) == [1, 2]


def test_records_of_a_later_release_are_longer_and_read_as_far_as_they_are_known() -> None:
    longer = np.zeros(3, [("record", wire.RECORD), ("more", "u8")])
    longer["record"] = make_records({}, {"sport": 2}, {})
    assert summarize(longer["record"])["packets_out"].tolist() == [2, 1]


def test_memory_of_rows_that_went_is_given_back() -> None:
    portmap = PortMap(limit=50_000)
    found = np.repeat(make_records({}), 40_000)
    found["tgid"] = np.arange(1, 40_001)
    found["sport"] = np.arange(40_000) % 997
    found["cookie"] = np.where(found["tgid"] > 39_000, 7, 8)
    portmap.update(summarize(found))
    full = _resident(portmap)
    portmap.keep_cookies({7}, before_ns=2**62)
    portmap.expire(0)
    assert len(portmap) == 1000 and sorted(o.tgid for o in portmap.everything()) == list(
        range(39_001, 40_001)
    )
    assert _resident(portmap) < full / 10
    portmap.update(summarize(found[:1000]))
    assert len(portmap) == 2000 and {owner.tgid for owner in portmap.who(5)} == {
        tgid for tgid in (*range(1, 1001), *range(39_001, 40_001)) if (tgid - 1) % 997 == 5
    }


def _resident(portmap: PortMap) -> int:
    """Bytes of the table that are in memory, as /proc/self/smaps has it."""
    starts = {group.__array_interface__["data"][0] for group in portmap._table.groups}
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                low, high = (int(part, 16) for part in words[0].split("-"))
                inside = any(low <= start < high for start in starts)
            elif inside and words[0] == "Rss:":
                total += int(words[1]) * 1024
    return total


def test_threads_that_update_and_ask_one_history_lose_nothing() -> None:
    history = FlowMemory(1000)
    found = make_records(*({"sport": n} for n in range(1, 201)))
    failures: list[BaseException] = []

    def run(work: Any) -> None:
        try:
            for _ in range(100):
                work()
        except BaseException as error:
            failures.append(error)

    works: list[Callable[[], object]] = [
        lambda: history.update(summarize(found, 1), Clock(0, 0))
    ] * 2
    works += [lambda: history.ask(_everything()), lambda: history.changed(50)]
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {int(flow["packets_out"]) for _, flow in history.ask(_everything())[1]} == {200}


def test_the_layouts_of_c_are_those_of_numpy() -> None:
    assert FLOW.itemsize == 216 and set(KEY_FIELDS) < set(there(FLOW.names))
    with pytest.raises(TypeError):
        other = np.dtype([("hash", "u8"), ("key", "u8")])
        ColumnTable(GROUPS, ("key",), 4).find(np.zeros(1, other))
