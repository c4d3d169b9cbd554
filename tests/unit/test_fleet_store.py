# SPDX-License-Identifier: MIT
"""Hours of Parquet: what becomes of a batch, and of several collectors on one folder."""

from __future__ import annotations

import functools
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fleet import schema, wire
from fleet.ask.store import FlowStore, Range, ask, open_folder
from fleet.collect import parquet, tidy
from fleet.collect.known_batches import KnownBatches
from fleet.collect.parquet import ParquetStore
from fleet.collect.rollup import write_rollup
from fleet.collect.tables import Received
from fleet.collect.tidy import Tidier
from fleet.export.beginners import Beginners
from fleet.export.deltas import Deltas, rows_of
from fleet.export.source import FlowSource
from fleet.export.spool import Spool
from fleet.schema import network_of
from fleeting import rows
from nlproto.errors import Error
from nlproto.records.clock import Clock
from nlproto.records.wire import lib
from nlproto.tables.flows import pack_address
from nlproto.tables.processes import Process
from playing import flows
from waiting import stand_in

BOOT = uuid.UUID(int=7)
DAY = 86400.0


def received(rows: Any, sequence: int = 1, host: str = "h1", names: Any = None) -> Received:
    payload = wire.encode_flows(BOOT.bytes, sequence, rows, names or {})
    return Received(host, wire.decode(payload))


def now(count: int = 3, first: int = 0, **fields: Any) -> Any:
    made = rows_of(flows(first, count))
    made["first_ns"] = made["last_ns"] = time.time_ns()
    for name, value in fields.items():
        made[name] = value
    return made


def test_longer_rows_of_a_later_release_are_read_and_halves_of_a_column_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = now(5, domain=[0, 1, 2, 3, 4])
    later = np.zeros(5, [("known", wire.ROW), ("more", "<u8")])
    later["known"], later["more"] = made, 77
    monkeypatch.setattr(wire, "ROW", later.dtype)
    payload = wire.encode_flows(BOOT.bytes, 1, later, {4: "a.example"})
    monkeypatch.undo()
    found = wire.decode(payload)
    assert found.rows.tobytes() == made.tobytes() and found.names == {4: "a.example"}
    odd = payload[:6] + (later.dtype.itemsize - 1).to_bytes(2, "little") + payload[8:]
    with pytest.raises(wire.MalformedBatch, match="rows of 191 bytes"):
        wire.decode(odd)


def test_every_column_says_what_the_row_said(tmp_path: Path) -> None:
    made = now(4, domain=[0, 9, 9, 8], initiated=[0, 1, 2, 0], tgid=[0, 1, 1, 1])
    made["how"] = 20, 1, 2, 1
    made["family"][2] = socket.AF_INET6
    made["raddr"][2] = np.frombuffer(pack_address("2001:db8::1")[1], np.uint64)
    made["nat"][3], made["nat_rport"][3] = socket.AF_INET, 8080
    made["nat_raddr"][3] = np.frombuffer(pack_address("192.0.2.9")[1], np.uint64)
    store = ParquetStore(tmp_path, DAY)
    store.write([received(made, 5, "web.example", {9: "a.example"})])
    found = sorted(rows(tmp_path, "flows"), key=lambda row: row["cookie"])
    assert [row["domain"] for row in found] == [None, "a.example", "a.example", None]
    assert [row["initiated"] for row in found] == [None, True, False, None]
    assert [row["uid"] for row in found] == [None, 1000, 1000, 1000]
    assert [row["raddr"] for row in found] == ["10.0.0.5", "10.0.0.5", "2001:db8::1", "10.0.0.5"]
    assert [row["nat_raddr"] for row in found] == [None, None, None, "192.0.2.9"]
    assert [row["nat_rport"] for row in found] == [None, None, None, 8080]
    assert found[1] | {"cookie": 0} == {
        **{"host": "web.example", "boot": str(BOOT), "sequence": 5, "netns": 4026531840},
        **{"cookie": 0, "protocol": 6, "laddr": "10.0.0.5", "lport": 40001, "raddr": "10.0.0.5"},
        **{"rport": 5432, "forwarded": False, "initiated": True, "tgid": 1},
        **{"start_ns": 5_000_000_000, "uid": 1000, "comm": "played", "how": "context"},
        **{"flags": 0, "first_ns": int(made["first_ns"][0]), "last_ns": int(made["last_ns"][0])},
        **{"packets_out": 1, "bytes_out": 60, "packets_in": 0, "bytes_in": 0},
        **{"nat_laddr": None, "nat_raddr": None, "nat_lport": None, "nat_rport": None},
        "domain": "a.example",
    }


def test_what_one_host_calls_a_number_is_not_told_of_another(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, DAY)
    batches = [received(now(1, domain=9), 1, host, {9: f"{host}.example"}) for host in ("h1", "h2")]
    store.write(batches)
    assert {row["host"]: row["domain"] for row in rows(tmp_path, "flows")} == {
        "h1": "h1.example",
        "h2": "h2.example",
    }


def test_of_two_collectors_one_writes_a_batch_also_while_the_other_is_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = ParquetStore(tmp_path, DAY), ParquetStore(tmp_path, DAY)
    both = [received(now(3), 1), received(now(3, 10), 2)]
    write_file = parquet.write_file

    def slow(path: Any, table: Any, keys: Any) -> None:
        monkeypatch.setattr(parquet, "write_file", write_file)
        other.write(both[:1])
        write_file(path, table, keys)

    monkeypatch.setattr(parquet, "write_file", slow)
    one.write(both)
    other.write(both)
    assert sorted(row["cookie"] for row in rows(tmp_path, "flows")) == [0, 1, 2, 10, 11, 12]
    assert not list(tmp_path.rglob(".part-*"))


def test_a_batch_over_the_end_of_an_hour_is_in_both(tmp_path: Path) -> None:
    made = now(4)
    hour = time.time_ns() // schema.HOUR_NS * schema.HOUR_NS
    made["last_ns"][:2] = hour - 1
    made["last_ns"][2:] = hour
    store = ParquetStore(tmp_path, DAY)
    store.write([received(made)])
    ParquetStore(tmp_path, DAY).write([received(made)])
    assert len(rows(tmp_path, "flows")) == 4
    names = {path.name for path in (tmp_path / "flows").iterdir()}
    assert names == {schema.hour_name(hour - 1), schema.hour_name(hour)}
    assert sorted(map(schema.hour_ns, names)) == [hour - schema.HOUR_NS, hour]


def test_keys_are_ranges_however_they_come() -> None:
    rng = np.random.default_rng(1)
    numbers = rng.permutation(2000).tolist()
    keys = KnownBatches(("h", "b", number) for number in numbers[:1000])
    again = KnownBatches.from_bytes(keys.to_bytes())
    for number in range(2000):
        assert (("h", "b", number) in again) == (number in numbers[:1000])
    rest = KnownBatches(("h", "b", number) for number in numbers[1000:])
    assert keys.isdisjoint(rest) and rest.isdisjoint(keys)
    keys.update(rest)
    assert keys.to_bytes() == b'{"h":{"b":[[0,1999]]}}'
    assert not keys.isdisjoint(rest)


def test_deltas_add_up_and_a_flow_is_one_row() -> None:
    deltas = Deltas()
    for turn in range(50):
        some = flows(1, 500, bytes_out=turn, uid=turn)
        some["first_ns"] = some["last_ns"] = 1000 + turn
        some["flags"] = 1 << turn % 3
        deltas.add(some, Clock(10**18, 0))
    taken = deltas.take()
    assert len(taken) == 500 and not len(deltas)
    assert set(taken["bytes_out"].tolist()) == {sum(range(50))}
    assert set(taken["packets_out"].tolist()) == {50}
    assert set(taken["flags"].tolist()) == {7}
    assert set(taken["uid"].tolist()) == {49}
    assert set(taken["first_ns"].tolist()) == {10**18 + 1000}
    assert set(taken["last_ns"].tolist()) == {10**18 + 1049}


@pytest.mark.parametrize("field", ["laddr", "raddr", "lport", "rport", "proto", "tgid", "netns"])
def test_flows_that_differ_in_one_thing_stay_apart(field: str) -> None:
    one, other = flows(0, 1), flows(0, 1)
    other[field] += 1
    deltas = Deltas()
    for some in (one, other, one):
        deltas.add(some, Clock(0, 0))
    assert sorted(deltas.take()["packets_out"].tolist()) == [1, 2]


def test_what_was_the_listener_s_goes_to_who_accepted_the_connection() -> None:
    """One port twice within a batch; and one whose first packets nobody accepted."""
    listener, socket_ = lib.SNIFFER_HOW_LISTENER, lib.SNIFFER_HOW_SOCKET
    predates = lib.SNIFFER_HOW_PREDATES
    deltas = Deltas()
    for at, cookie, how, tgid, rport, opened in (
        (1, 7, listener, 5, 1000, 2), (2, 0, listener, 5, 1000, 0), (3, 21, socket_, 6, 1000, 0),
        (11, 7, listener, 5, 1000, 2), (12, 22, socket_, 8, 1000, 0),
        (13, 7, listener, 5, 1001, 2), (14, 23, socket_, 6, 1002, 0),
        (15, 7, predates, 0, 1003, 2), (16, 0, socket_, 5, 1003, 0), (17, 24, socket_, 6, 1003, 0),
    ):  # fmt: skip
        some = flows(0, 1, cookie=cookie, how=how, tgid=tgid, rport=rport, opened=opened)
        some["first_ns"] = some["last_ns"] = at
        some["flags"] = lib.SNIFFER_F_AMBIGUOUS if how == listener else 8
        some["nat_lport"] = 80 if at == 2 else 0
        deltas.add(some, Clock(0, 0))
    names = ("cookie", "tgid", "first_ns", "last_ns", "packets_out", "opened", "flags", "nat_lport")
    found = deltas.take()
    # nobody accepted these yet
    for at, cookie, how, tgid in (
        (3, 41, listener, 6), (2, 0, listener, 5), (1, 7, predates, 0)
    ):  # fmt: skip
        some = flows(0, 1, cookie=cookie, how=how, tgid=tgid, rport=1004, first_ns=at, last_ns=at)
        deltas.add(some, Clock(0, 0))
    assert deltas.take()[["tgid", "packets_out"]].tolist() == [(6, 3)]
    assert sorted(zip(*(found[name].tolist() for name in names), strict=True)) == [
        (7, 5, 13, 13, 1, 2, 32, 0),
        (21, 6, 1, 3, 3, 2, 8, 80),
        (22, 8, 11, 12, 2, 2, 8, 0),
        (23, 6, 14, 14, 1, 0, 8, 0),
        (24, 6, 15, 17, 3, 2, 8, 0),
    ]


def test_what_nobody_accepted_yet_waits_for_the_next_batch_and_no_longer() -> None:
    """Also if the disk took nothing meanwhile. A listener's packets are told after some seconds."""
    listener, now_ns = lib.SNIFFER_HOW_LISTENER, 10**18
    deltas = Deltas()

    def add(at: int, cookie: int, how: int, rport: int, opened: int, tgid: int = 5) -> None:
        some = flows(0, 1, cookie=cookie, how=how, tgid=tgid, rport=rport, opened=opened)
        some["first_ns"] = some["last_ns"] = now_ns + at * 10**9
        deltas.add(some, Clock(0, 0))

    def taken(now_s: int | None) -> list[Any]:
        now = None if now_s is None else now_ns + now_s * 10**9
        found = deltas.take(now)[["cookie", "tgid", "packets_out", "opened"]]
        return sorted(found.tolist())

    add(-1, 7, listener, 1000, 2)
    add(-1, 0, lib.SNIFFER_HOW_SOCKET, 1000, 2)
    add(-1, 7, listener, 1001, 2)
    add(-1, 31, lib.SNIFFER_HOW_SOCKET, 1002, 1)
    assert taken(0) == [(31, 5, 1, 1)]
    add(1, 21, lib.SNIFFER_HOW_SOCKET, 1000, 0, 6)
    [accepted] = deltas.take(now_ns + 2 * 10**9)
    assert (accepted["cookie"], accepted["tgid"], accepted["packets_out"]) == (21, 6, 3)
    deltas.give_back(np.array([accepted]))
    assert taken(3) == [(21, 6, 3, 2)]
    assert taken(4) == [(7, 5, 1, 2)] and not len(deltas)
    for at in (-3600, 3600):  # the clock was set meanwhile
        add(at, 7, listener, 1000, 2)
        assert taken(0) == [(7, 5, 1, 2)]
    add(0, 7, listener, 1000, 2)
    assert taken(0) == [] and taken(None) == [(7, 5, 1, 2)]
    deltas.add(flows(0, 10_001, cookie=7, how=listener, tgid=5, opened=2, last_ns=now_ns,
                     rport=np.arange(10_001)), Clock(0, 0))  # fmt: skip
    assert len(taken(0)) == 10_001


@functools.cache
def _moment() -> int:
    """The same for all, though an hour ends meanwhile."""
    return time.time_ns()


def old(count: int, hours_ago: Any, first: int = 0, **fields: Any) -> Any:
    at = _moment() - int(hours_ago * schema.HOUR_NS)
    return now(count, first, first_ns=at, last_ns=at, **fields)


def test_small_files_become_one_with_the_same_rows_and_keys(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    batches = [received(old(5, 3, 5 * at), at, f"h{at % 3}") for at in range(8)]
    for one in batches:
        store.write([one])
    (folder,) = (tmp_path / "flows").iterdir()
    hidden = folder / ".part-of-another.parquet"
    hidden.touch()
    before = sorted(row["cookie"] for row in rows(tmp_path, "flows"))
    tidier = Tidier(store, 400 * DAY)
    assert not tidier.compact(folder, 9)
    assert tidier.compact(folder, 8)
    assert sorted(row["cookie"] for row in rows(tmp_path, "flows")) == before == list(range(40))
    assert len(parquet.parts(folder)) == 1 and hidden.exists()
    for again in (store, ParquetStore(tmp_path, 30 * DAY)):
        again.write(batches)
    assert len(rows(tmp_path, "flows")) == 40
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", ".tidy", "flows"}


def test_who_asks_while_files_are_put_together_gets_all_rows_once(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, DAY)
    for sequence in range(8):
        store.write([received(now(10, 10 * sequence), sequence)])
    [folder] = (tmp_path / "flows").iterdir()
    opened = []

    def opening() -> FlowStore:
        opened.append(open_folder(tmp_path, Range(0, time.time_ns())))
        if len(opened) == 1:  # after it has listed the files
            assert Tidier(store, 400 * DAY).compact(folder, 8)
        return opened[-1]

    assert ask(opening, lambda one: one.rows("SELECT count(*) AS n FROM flow")) == [{"n": 80}]
    assert len(opened) == 2
    (folder / "part-damaged.parquet").write_bytes(b"PAR1")
    with pytest.raises(Error, match="part-damaged.parquet"):
        ask(lambda: open_folder(tmp_path, Range(0, time.time_ns())), lambda one: one.owners)


def test_an_hour_that_is_removed_while_it_is_asked_is_left_out(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    store.write([received(old(10, 29 * 24), 1), received(now(5, 100), 2)])
    opened = []

    def opening() -> FlowStore:
        opened.append(open_folder(tmp_path, Range(0, time.time_ns())))
        if len(opened) == 1:  # after it has listed the files
            Tidier(store, 400 * DAY).retire(time.time_ns() + 2 * 86400 * 10**9)
        return opened[-1]

    assert ask(opening, lambda one: one.rows("SELECT count(*) AS n FROM flow")) == [{"n": 5}]
    assert len(opened) == 2


def test_a_file_that_comes_while_others_are_put_together_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = ParquetStore(tmp_path, 30 * DAY), ParquetStore(tmp_path, 30 * DAY)
    for at in range(4):
        store.write([received(old(5, 3, 5 * at), at)])
    (folder,) = (tmp_path / "flows").iterdir()
    write = stand_in(tidy).write_file

    def slow(*arguments: Any) -> None:
        other.write([received(old(5, 3, 100), 100)])
        write(*arguments)

    monkeypatch.setattr(tidy, "write_file", slow)
    assert not Tidier(store, 400 * DAY).compact(folder, 4)
    assert len(rows(tmp_path, "flows")) == 25


def test_an_hour_is_summed_up_once_and_again_when_more_comes(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    hour = schema.hour_name(time.time_ns() - 3 * schema.HOUR_NS)
    at = schema.hour_ns(hour)
    process = wire.ToldProcess(
        tgid=100, start_ns=5_000_000_000, at_ns=at, comm="x", exe="/usr/bin/psql", unit="db.service"
    )
    told = wire.decode(wire.encode(wire.PROCS, BOOT.bytes, 1, [process]))
    made = now(
        6,
        lport=40000,
        last_ns=at,
        first_ns=at,
        initiated=[1, 1, 1, 0, 0, 2],
        domain=[0, 0, 0, 9, 9, 0],
    )
    store.write([Received("h1", told), received(made, 2, "h1", {9: "db.example"})])
    assert write_rollup(tmp_path, hour)
    assert not write_rollup(tmp_path, hour)

    def sums() -> list[Any]:
        found = pq.read_table(tmp_path / "rollup" / hour / "part-0.parquet")
        assert found.schema.remove_metadata() == schema.ROLLUP
        return sorted(
            (
                row["name"],
                row["unit"],
                row["remote"],
                row["service"],
                row["flows"],
                row["bytes_out"],
            )
            for row in found.to_pylist()
        )

    assert sums() == [
        ("psql", "db.service", "10.0.0.0/24", 5432, 3, 180),
        ("psql", "db.service", "10.0.0.0/24", 40000, 1, 60),
        ("psql", "db.service", "db.example", 5432, 2, 120),
    ]
    store.write([received(now(1, 50, last_ns=at, initiated=1, tgid=7), 3)])
    assert write_rollup(tmp_path, hour)
    assert ("played", None, "10.0.0.0/24", 5432, 1, 60) in sums()
    assert network_of("2001:db8:1:2:3::4") == "2001:db8:1:2::/64"


def test_a_damaged_file_is_named_and_stops_the_tidying_of_its_hour_alone(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    for hours_ago in (4, 3):
        for at in range(4):
            store.write([received(old(5, hours_ago, 5 * at), 10 * hours_ago + at)])
    first, second = sorted((tmp_path / "flows").iterdir())
    [damaged, *_] = parquet.parts(first)
    damaged.write_bytes(b"PAR1")
    tidier = Tidier(store, 400 * DAY)
    with pytest.raises(Error, match=f"{damaged} is no file of a collector: .*; move it away"):
        tidier.tidy()
    assert len(parquet.parts(first)) == 4 and len(parquet.parts(second)) == 1
    assert [path.name for path in (tmp_path / "rollup").glob("hour=*")] == [second.name]


def test_a_day_is_summed_up_when_it_is_over_and_asked_in_the_place_of_its_hours(
    tmp_path: Path,
) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    day = schema.day_ns(schema.day_name(time.time_ns())) - 2 * schema.DAY_NS
    hours = (day, day + 5 * schema.HOUR_NS, day + 30 * schema.HOUR_NS)
    for sequence, at in enumerate(hours):
        store.write([received(now(3, 0, last_ns=at, first_ns=at, initiated=1), sequence)])
    tidier = Tidier(store, 400 * DAY)
    tidier._tidy(day + 32 * schema.HOUR_NS)  # the second day is not over
    sums = pq.read_table(tmp_path / "rollup" / schema.day_name(day) / "part-0.parquet")
    assert sums.schema.remove_metadata() == schema.ROLLUP
    assert {(row["hour_ns"], row["flows"]) for row in sums.to_pylist()} == {(day, 6)}
    assert len(list((tmp_path / "rollup").glob("day=*"))) == 1

    def asked(since: int, until: int) -> set[str]:
        with open_folder(tmp_path, Range(until, until)) as opened:
            opened.open_sums(since)
            words = "SELECT DISTINCT hour_ns, flows FROM rollup"
            return {f"{(r['hour_ns'] - day) // schema.HOUR_NS}:{r['flows']}" for r in
                    opened.rows(words)}  # fmt: skip

    end = day + 31 * schema.HOUR_NS
    assert asked(0, end) == {"0:6", "30:3"}
    assert asked(day + 1, end) == {"5:3", "30:3"}
    assert asked(day, end - 1) == {"0:6"}
    assert asked(day, day + 6 * schema.HOUR_NS) == {"0:3", "5:3"}
    tidier.retire(day + schema.HOUR_NS + int(400 * DAY * 10**9) + 1)
    assert not list((tmp_path / "rollup").glob("day=*"))
    assert asked(0, end) == {"5:3", "30:3"}


def test_retention_takes_whole_hours_and_keeps_their_sums(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    store.write([received(old(2, 29 * 24), 1), received(old(2, 3, 10), 2)])
    tidier = Tidier(store, 400 * DAY)
    tidier.tidy()
    assert len(rows(tmp_path, "flows")) == 4
    assert len(list((tmp_path / "rollup").glob("hour=*"))) == 2
    tidier.retire(time.time_ns() + 2 * 86400 * 10**9)
    assert {row["cookie"] for row in rows(tmp_path, "flows")} == {10, 11}
    assert len(list((tmp_path / "rollup").glob("hour=*"))) == 2
    tidier.retire(time.time_ns() + 399 * 86400 * 10**9)
    assert not rows(tmp_path, "flows")
    assert len(list((tmp_path / "rollup").glob("hour=*"))) == 1
    store.write([received(old(2, 31 * 24), 3)])
    assert store.untimely == 2 and not rows(tmp_path, "flows")


def test_each_hour_tells_of_the_processes_that_its_flows_are_of() -> None:
    source = FlowSource("/nowhere")
    source._learn(Process(100, 5_000_000_000, comm="one"))
    source._learn(Process(200, 5_000_000_000, comm="idle"))
    some = flows(0, 3)
    assert [one.comm for one in source.due(some, 1)] == ["one"]
    assert not source.due(some, 1)
    (again,) = source.due(some, 2)
    source.untold([again])
    assert len(source.due(some, 2)) == 1
    source._learn(Process(100, 5_000_000_000, comm="one"))
    assert not source.due(some, 2)
    source._learn(Process(100, 5_000_000_000, comm="execed"))
    assert [one.comm for one in source.due(some, 2)] == ["execed"]


def test_who_began_a_connection_is_remembered_for_its_later_rows() -> None:
    deltas = Deltas()
    for opened, cookie in ((1, 5), (0, 5), (0, 6), (2, 7), (0, 7)):
        deltas.add(flows(cookie, 1, opened=opened), Clock(0, 0))
        rows = rows_of(deltas.take())
        assert rows["initiated"].tolist() == [{5: 1, 6: 0, 7: 2}[cookie]]


def test_of_many_connections_the_latest_are_remembered_and_memory_has_a_bound() -> None:
    beginners, count = Beginners(), 600_000
    keys = np.random.default_rng(5).permutation(count).astype(np.uint64)
    told = (keys % np.uint64(3)).astype(np.uint8)
    beginners.recall(keys, told.copy())
    again = np.zeros(count, np.uint8)
    beginners.recall(keys, again)
    right = again == told
    assert right[-100_000:].all() and not right[:100_000].all()
    assert not again[~right].any()
    changed = np.array([2, 1], np.uint8)
    beginners.recall(keys[told != 0][-2:], changed)
    beginners.recall(keys[told != 0][-2:], last := np.zeros(2, np.uint8))
    assert last.tolist() == [2, 1]


@pytest.mark.parametrize(
    "holder", [lambda path: ParquetStore(path, DAY), lambda path: Spool(path, 1 << 20)]
)
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_flows_are_not_kept_where_others_can_put_files(
    tmp_path: Path, holder: Callable[[Path], Any], mode: int
) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(Error, match="others can write into"):
        holder(tmp_path)
    assert not list(tmp_path.iterdir())
