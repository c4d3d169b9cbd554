# SPDX-License-Identifier: MIT
"""Streams: who may see a record is decided before any filter; one user's filters cost that user."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from daemon.serve.publisher import MAX_RECORDS
from daemon.serve.streams import Streams
from daemon.sharing.allowance import Allowance
from nlproto.errors import Error
from nlproto.filters.filter import Filter
from nlproto.filters.parse import parse
from nlproto.overheard.domains import Domains
from nlproto.overheard.live import LiveEnds
from nlproto.overheard.names import NumberedNames
from nlproto.records.batch import NamedBatch
from nlproto.tables.flows import decode_flows, summarize
from nlproto.tables.processes import Processes
from recording import make_batch, make_records
from waiting import stand_in


class Subscriber:
    def __init__(self) -> None:
        self.seen, self.lost = 0, 0
        self.pieces: list[Any] = []

    def offer(self, seen: Any, piece: Any) -> None:
        self.seen += seen
        if piece is not None:
            self.pieces.append(piece)

    def lose(self, seen: Any, matched: Any) -> None:
        self.seen += seen
        self.lost += matched

    @property
    def records(self) -> list[Any]:
        from nlproto.records.wire import decode_batch

        return [record for piece in self.pieces for record in decode_batch(piece.payload).records]


@contextmanager
def _streams(max_filters: int = 100, max_bytes: int = 1 << 20, **options: Any) -> Iterator[Any]:
    """Streams whose publishers run; posted functions run at once, one at a time."""
    lock = threading.RLock()

    def post(function: Any) -> None:
        with lock:
            function()

    pipeline = SimpleNamespace(processes=Processes(), want_packets=lambda wanted: None)
    with Streams(stand_in(pipeline), post, max_filters, max_bytes, **options) as streams:
        yield streams


def _publish(streams: Any, records: Any) -> None:
    batch = make_batch(records)
    streams.publish(NamedBatch(batch.head, np.array(batch.records), stand_in(None)))


def _finish(streams: Any, *joined: Any) -> None:
    """Wait until everything before has been offered to the streams."""
    for stream in joined:
        passed = threading.Event()
        streams.mark(stream, passed.set)
        assert passed.wait(20)


def test_a_filter_runs_once_a_batch_for_all_who_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    mask = Filter.mask

    def counted(self: Any, *arguments: Any) -> Any:
        masks.append(str(self))
        return mask(self, *arguments)

    monkeypatch.setattr(Filter, "mask", counted)
    with _streams() as streams:
        same = [Subscriber() for _ in range(20)]
        for one in same:
            stream = streams.join(parse("udp dst port 53"), None, one)
        other = Subscriber()
        joined = streams.join(parse("tcp"), None, other)
        _publish(streams, make_records({"dport": 53}, {"dport": 54}))
        _finish(streams, stream, joined)
    assert sorted(masks) == sorted({str(name) for name in masks}) and len(masks) == 2
    assert {id(one.pieces[0].payload) for one in same} == {id(same[0].pieces[0].payload)}
    assert [piece.count for piece in same[0].pieces] == [1]
    assert (other.seen, other.pieces) == (2, [])


def test_another_users_stream_has_its_own_records_and_no_others() -> None:
    with _streams() as streams:
        root, user = Subscriber(), Subscriber()
        joined = [streams.join(parse("udp"), None, root), streams.join(parse("udp"), 1000, user)]
        rows = {"uid": 1000}, {"uid": 0}, {"uid": 0, "tgid": 0}, {"uid": 1000, "tgid": 0}
        _publish(streams, make_records(*rows))
        _finish(streams, *joined)
    assert root.pieces[0].count == 4
    assert user.pieces[0].count == 1
    assert user.seen == 1


def test_a_users_filter_never_meets_a_record_of_somebody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met = []
    mask = Filter.mask

    def counted(self: Any, records: Any, details: Any = None) -> Any:
        met.extend(records["uid"].tolist())
        return mask(self, records, details)

    monkeypatch.setattr(Filter, "mask", counted)
    with _streams() as streams:
        user = Subscriber()
        stream = streams.join(parse("pname x or pname y"), 1000, user)
        _publish(streams, make_records(*[{"uid": 0}] * 50, {"uid": 1000}))
        _finish(streams, stream)
    assert met == [1000]


def test_the_numbers_in_a_users_records_count_its_own() -> None:
    """`seq` and the clocks of the head would tell how much the others send."""
    with _streams() as streams:
        root, user = Subscriber(), Subscriber()
        joined = [streams.join(parse(""), None, root), streams.join(parse(""), 1000, user)]
        for number in range(3):
            rows = [{"uid": 0, "seq": 1000 * number + n, "cpu": 1} for n in range(10)]
            rows[4] |= {"uid": 1000, "time_ns": 2_000_000_000 + number}
            batch = make_batch(make_records(*rows), mono_ns=3_000_000_000 + number)
            streams.publish(NamedBatch(batch.head, np.array(batch.records), stand_in(None)))
        _finish(streams, *joined)
    assert [int(record["seq"]) for record in user.records] == [0, 1, 2]
    assert {int(record["cpu"]) for record in user.records} == {0}
    assert [int(record["seq"]) for record in root.records][4] == 4
    from nlproto.records.wire import decode_batch

    heads = [decode_batch(piece.payload).head for piece in user.pieces]
    assert [int(head["mono_ns"]) for head in heads] == [2_000_000_000 + n for n in range(3)]
    rooted = decode_batch(root.pieces[0].payload).head
    for clock in ("real_ns", "boot_ns"):  # what turns one clock into another stays as it was
        assert int(heads[0][clock]) - int(heads[0]["mono_ns"]) == int(rooted[clock]) - int(
            rooted["mono_ns"]
        )


def _stuck(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """From now on filters wait until the event returned is set."""
    go_on, waiting = threading.Event(), threading.Event()
    mask = Filter.mask

    def slow(self: Any, records: Any, details: Any = None) -> Any:
        if "99" in str(self):
            waiting.set()
            assert go_on.wait(20)
        return mask(self, records, details)

    monkeypatch.setattr(Filter, "mask", slow)
    return go_on, waiting


def test_who_has_slow_filters_loses_records_and_nobody_else_and_each_account_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, waiting = _stuck(monkeypatch)
    rows = [{"uid": 1000 + n % 2, "dport": n} for n in range(100)]
    with _streams(max_bytes=30_000) as streams:
        root, slow, quick = Subscriber(), Subscriber(), Subscriber()
        joined = [
            streams.join(parse("udp"), None, root),
            streams.join(parse("not port 99"), 1000, slow),
            streams.join(parse("udp"), 1001, quick),
        ]
        _publish(streams, make_records(*rows))
        assert waiting.wait(20)
        for _ in range(9):
            _publish(streams, make_records(*rows))
            _finish(streams, joined[0])
        assert sum(piece.count for piece in root.pieces) == 1000 and root.lost == 0
        go_on.set()
        _finish(streams, *joined)
        assert streams.figures()["unfiltered_records"] == slow.lost + quick.lost
    for one in (slow, quick):
        assert one.seen == 500
        assert sum(piece.count for piece in one.pieces) + one.lost == 500
    assert slow.lost > 0


def test_a_marker_comes_behind_what_was_lost_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a client who subscribes meanwhile does not count it."""
    go_on, waiting = _stuck(monkeypatch)
    with _streams(max_bytes=10_000) as streams:
        one = Subscriber()
        stream = streams.join(parse("port 99"), 1000, one)
        _publish(streams, make_records({"uid": 1000}))
        assert waiting.wait(20)
        for _ in range(5):
            _publish(streams, make_records(*[{"uid": 1000}] * 50))
        before = threading.Event()
        seen = []

        def mark() -> None:
            seen.append(one.seen)
            before.set()

        streams.mark(stream, mark)
        for _ in range(5):
            _publish(streams, make_records(*[{"uid": 1000}] * 50))
        go_on.set()
        assert before.wait(20)
        _finish(streams, stream)
    assert seen == [251] and one.seen == 501


def test_users_take_turns_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has ten filters and much to filter does not come before who has one."""
    order = []
    mask = Filter.mask
    go_on = threading.Event()

    def told(self: Any, records: Any, details: Any = None) -> Any:
        assert go_on.wait(20)
        order.append(int(records["uid"][0]))
        return mask(self, records, details)

    monkeypatch.setattr(Filter, "mask", told)
    with _streams(max_filters=200, max_bytes=64 << 20) as streams:
        greedy = [
            streams.join(parse(f"port {n}"), 1000, Subscriber(), user=1000) for n in range(10)
        ]
        other = streams.join(parse("port 1"), 1001, Subscriber(), user=1001)
        rows = np.repeat(make_records({"uid": 1000}), 4 * MAX_RECORDS)
        _publish(streams, rows)
        _publish(streams, make_records({"uid": 1001}))
        go_on.set()
        _finish(streams, *greedy, other)
    assert order.index(1001) == 1
    assert len(order) == 41


def test_an_encoder_that_fails_loses_its_own_records_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mask = Filter.mask

    def broken(self: Any, records: Any, details: Any = None) -> Any:
        if str(self) == "tcp":
            raise ValueError("unforeseen")
        return mask(self, records, details)

    monkeypatch.setattr(Filter, "mask", broken)
    with _streams() as streams:
        bad, good = Subscriber(), Subscriber()
        joined = [streams.join(parse("tcp"), None, bad), streams.join(parse("udp"), None, good)]
        for _ in range(3):
            _publish(streams, make_records({}))
        _finish(streams, *joined)
    assert (bad.seen, bad.lost) == (3, 3)
    assert sum(piece.count for piece in good.pieces) == 3
    assert len([one for one in caplog.records if one.exc_info]) == 1


def test_places_for_filters_are_kept_for_those_who_see_everything() -> None:
    with _streams(max_filters=16) as streams:
        taken = []

        def take(uid: int | None, number: int) -> None:
            taken.append(streams.join(parse(f"port {number}"), uid, Subscriber(), user=uid or 0))

        take(1000, 1)
        take(1000, 2)
        with pytest.raises(Error, match="different filters"):
            take(1000, 3)
        for uid in range(1001, 1006):
            take(uid, 1)
            take(uid, 2)
        with pytest.raises(Error, match="different filters"):
            take(2000, 1)
        for number in range(4):
            take(None, number)


def test_the_tests_of_all_filters_of_a_user_are_bounded_together() -> None:
    with _streams(max_filters=256) as streams:
        worst = " or ".join(f"pname a{n}" for n in range(128))
        for number in range(4):
            streams.join(parse(worst.replace(" a", f" b{number}")), 1000, Subscriber(), user=1000)
        with pytest.raises(Error, match="tests together"):
            streams.join(parse(worst), 1000, Subscriber(), user=1000)
        streams.join(parse(worst), None, Subscriber())


def test_what_users_without_rights_may_take_of_a_cpu_has_an_end() -> None:
    allowance = Allowance(share=0.5, saved=0.1)
    began = time.monotonic()
    assert allowance.spend(0.1) == pytest.approx(0, abs=0.01)
    pause = allowance.spend(1.0)
    assert pause == pytest.approx(2.0, abs=2 * (time.monotonic() - began) + 0.01)


def test_flows_go_to_who_asked_for_them_and_tell_no_hash() -> None:
    rows = [{"uid": uid, "tgid": 10 * uid} for uid in (1, 1, 1, 2, 2, 2)]
    records = make_records(*rows)
    batch = make_batch(records)
    flows = summarize(np.array(batch.records), 77)
    wanted: list[Any] = []
    with _streams() as streams:
        streams._pipeline.want_packets = wanted.append
        everything, own = Subscriber(), Subscriber()
        full = streams.join(parse(""), None, everything, flows=True)
        part = streams.join(parse(""), 1, own, flows=True)
        assert wanted == [False, False]
        streams.publish(NamedBatch(batch.head, batch.records[:0], stand_in(None), flows))
        _finish(streams, full, part)
        other = Subscriber()
        streams.join(parse(""), None, other)
        assert wanted[-1]
    assert flows["hash"].all()
    told = [decode_flows(piece.payload)[1] for piece in everything.pieces]
    assert np.concatenate(told)["bytes_out"].sum() == flows["bytes_out"].sum()
    assert not np.concatenate(told)["hash"].any()
    assert everything.seen == len(flows)
    (mine,) = (decode_flows(piece.payload)[1] for piece in own.pieces)
    assert set(mine["tgid"].tolist()) == {10}
    assert mine["bytes_out"].sum() == flows["bytes_out"][flows["uid"] == 1].sum()
    assert not other.pieces


def test_names_of_far_ends_come_with_flows_as_far_as_one_may_know_them() -> None:
    records = make_records({"uid": 1, "sport": 1}, {"uid": 1, "sport": 2})
    batch = make_batch(records)
    names = NumberedNames()
    flows = summarize(np.array(batch.records), 0)
    assert len(flows) == 2
    flows["domain"] = names.number("own.example"), names.number("all.example", of_resolver=True)
    with _streams() as streams:
        streams._processes.ends = LiveEnds(Domains(names))
        everything, own = Subscriber(), Subscriber()
        joined = [
            streams.join(parse(""), uid, one, flows=True)
            for uid, one in ((None, everything), (1, own))
        ]
        streams.publish(NamedBatch(batch.head, batch.records[:0], stand_in(None), flows))
        _finish(streams, *joined)
    told = [
        set(msgspec.json.decode(one.pieces[0].names, type=dict[int, str]).values())
        for one in (everything, own)
    ]
    assert told == [{"own.example", "all.example"}, {"own.example"}]
    assert np.count_nonzero(decode_flows(own.pieces[0].payload)[1]["domain"]) == 1
