# SPDX-License-Identifier: MIT
"""The pipeline with an engine that replays batches: order, loss and failure at will."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.errors import Error, NoModule
from nlproto.pipeline.account import Account
from nlproto.pipeline.order import TimeOrder
from nlproto.pipeline.pipeline import Pipeline
from nlproto.pipeline.queue import MessageQueue
from nlproto.records import wire
from nlproto.records.process_event import ProcessEvent
from nlproto.tables.processes import Processes
from recording import make_batch, make_records
from replaying import Replay, pipeline_of
from waiting import stand_in, there, until


def test_every_record_reaches_every_subscriber_and_the_account_closes() -> None:
    batches, seq = [], 0
    for n in range(50):
        records = make_records(*({"time_ns": 10**9 + n * 10**6, "sport": n} for _ in range(20)))
        batches.append(make_batch(records, seq))
        seq += 20
    tail = [make_batch(make_records({"time_ns": 2 * 10**9}), seq)]
    engine, got, other = Replay(batches, tail), [], []
    pipeline = pipeline_of(engine)
    pipeline.subscribe(lambda batch: got.append(batch.records))
    pipeline.subscribe(lambda batch: other.append(there(batch.flows)["packets_out"].sum()))
    with pipeline:
        pass
    assert sum(map(len, got)) == sum(other) == 1001
    assert engine.closed.is_set()
    assert pipeline.account.closes()
    assert pipeline.account.named == 1001


def test_records_of_two_cpus_come_in_order_of_time() -> None:
    def batch(cpu: Any, seq: Any, times: Any) -> Any:
        return make_batch(make_records(*({"time_ns": t * 10**6} for t in times)), seq, cpu)

    batches = [
        batch(0, 0, [1000, 1015]),
        batch(1, 0, [1002, 1017]),
        batch(0, 2, [1016, 1040]),
        batch(1, 2, [1020, 1041]),
    ]
    got = []
    pipeline = pipeline_of(Replay(batches))
    pipeline.subscribe(lambda batch: got.extend(batch.records["time_ns"].tolist()))
    with pipeline:
        until(lambda: len(got) == 8)
    assert got == sorted(got)


def test_merge_keeps_what_an_older_record_could_still_follow() -> None:
    merge = TimeOrder(interval_ns=20)
    merge.add(make_records({"time_ns": 100}, {"time_ns": 110}), 115)
    assert merge.take().tolist() == []
    merge.add(make_records({"time_ns": 105}), 125)
    assert merge.take()["time_ns"].tolist() == [100, 105]
    assert merge.drain()["time_ns"].tolist() == [110]
    assert len(merge) == 0


def test_merge_holds_a_bounded_number_of_records() -> None:
    merge = TimeOrder(interval_ns=10**9, limit=3)
    merge.add(make_records(*({"time_ns": 2 * 10**9 + n} for n in range(8))), 2 * 10**9 + 8)
    assert len(merge.take()) == 5
    assert len(merge) == 3


def test_a_worker_that_is_too_slow_loses_whole_batches_in_the_queue_and_counts_them() -> None:
    size = wire.RECORD.itemsize * 10 + wire.BATCH.itemsize
    queue: MessageQueue[Any] = MessageQueue(size * 5)
    batches = [make_batch(make_records(*([{}] * 10)), n * 10) for n in range(100)]
    blocked, release, got = threading.Event(), threading.Event(), []

    def slow(batch: Any) -> None:
        blocked.set()
        release.wait(30)
        got.append(len(batch.records))

    engine = Replay(batches[:1])
    pipeline = pipeline_of(engine, queue=queue)
    pipeline.subscribe(slow)
    with pipeline:
        assert blocked.wait(10)
        engine.batches += batches[1:]
        until(lambda: not engine.batches)
        assert queue.peak_bytes <= queue.max_bytes
        release.set()
    account = pipeline.account
    assert account.lost["queue"] == 1000 - sum(got) > 0
    assert account.lost["queue"] == queue.dropped_records
    assert account.lost["socket"] == 0
    assert account.closes()


def test_a_gap_in_the_sequence_is_lost_at_the_socket() -> None:
    batches = [make_batch(make_records({}), 0), make_batch(make_records({}), 5)]
    with pipeline_of(Replay(batches)) as pipeline:
        until(lambda: pipeline.account.delivered == 2)
    assert pipeline.account.lost["socket"] == 4
    assert pipeline.account.closes()


def test_a_subscriber_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    got = []

    def fail(batch: Any) -> None:
        raise RuntimeError("broken subscriber")

    pipeline = pipeline_of(Replay([make_batch(make_records({}))]))
    pipeline.subscribe(fail)
    pipeline.subscribe(lambda batch: got.append(len(batch.records)))
    with pipeline:
        pass
    assert got == [1]
    assert "broken subscriber" in caplog.text


def test_a_cancelled_subscription_gets_nothing_more() -> None:
    got = []
    engine = Replay()
    with pipeline_of(engine) as pipeline:
        cancel = pipeline.subscribe(lambda batch: got.append(batch))
        cancel()
        engine.batches.append(make_batch(make_records({})))
    assert got == []


def test_a_barrier_is_passed_after_everything_recorded_before_it() -> None:
    engine, got = Replay(), []
    with pipeline_of(engine) as pipeline:
        pipeline.subscribe(lambda batch: got.append(len(batch.records)))
        engine.batches += [make_batch(make_records({}), n) for n in range(20)]
        passed, seen = threading.Event(), []

        def pass_on() -> None:
            seen.append(sum(got))
            passed.set()

        pipeline.barrier(pass_on)
        assert passed.wait(10)
    assert seen == [20]


class Reading(Replay):
    """Its read() has work for long, and ends it only for somebody who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.woken = threading.Event(), threading.Event()

    def wake(self) -> None:
        self.woken.set()

    def read(self, timeout: float) -> Iterator[Any]:
        self.reading.set()
        until(self.awaited, 30, "the engine is told that somebody waits")
        yield from ()


@pytest.mark.parametrize("ask", ["barrier", "switch", "stop"])
def test_a_reading_engine_is_told_that_somebody_waits(ask: str) -> None:
    engine = Reading()
    passed = threading.Event()
    pipeline = pipeline_of(engine)
    with pipeline:
        assert engine.reading.wait(60) and not engine.awaited()
        if ask == "barrier":
            pipeline.barrier(passed.set)
            assert passed.wait(60) and engine.woken.is_set()
        elif ask == "switch":
            pipeline.switch(Replay(), 60)
            assert engine.closed.is_set() and engine.woken.is_set()
    assert engine.woken.is_set()


def test_what_is_lost_before_a_barrier_is_in_the_account_that_it_sees() -> None:
    """The engine knows of it, though no batch came since to tell."""
    engine, seen, passed = Replay(), [], threading.Event()
    engine.opening = np.zeros(1, wire.TAIL)
    pipeline = pipeline_of(engine)

    def ask() -> None:
        seen.append(stand_in(pipeline.account.as_dict(settled=True)["lost"])["socket"])
        passed.set()

    with pipeline:
        until(lambda: pipeline.account.instances)
        engine.opening = np.zeros(1, wire.TAIL)
        engine.opening["record_seq"] = engine.opening["packets"] = 5
        pipeline.barrier(ask)
        assert passed.wait(10)
    assert seen == [5]


def test_an_engine_that_fails_is_replaced_and_the_account_spans_both() -> None:
    failures: list[Any] = []
    first = Replay([make_batch(make_records({}), 0)], error=NoModule("the module is gone"))
    second = Replay([make_batch(make_records({}, {}), 0, instance=8)])
    second.instance = 8
    pipeline = pipeline_of(first, on_failure=failures.append)
    with pipeline:
        until(lambda: pipeline.failed)
        pipeline.switch(second)
        assert pipeline.engine is second
        until(lambda: pipeline.account.delivered == 3)
        assert not pipeline.failed
    assert [str(error) for error in failures] == ["the module is gone"]
    assert first.closed.is_set() and second.closed.is_set()
    assert pipeline.account.delivered == 3
    assert pipeline.account.closes()


def test_an_engine_that_takes_over_begins_where_the_other_is_told_to_end() -> None:
    first = Replay([make_batch(make_records({}), 0)], [make_batch(make_records({}), 1)])
    early = make_batch(make_records({}, {}), 0, instance=8)
    second = Replay([early])
    second.instance = 8
    with pipeline_of(first) as pipeline:
        until(lambda: pipeline.account.delivered == 1)
        pipeline.switch(second)
    assert first.until_ns == second.begun_ns
    assert pipeline.account.delivered == 2
    assert pipeline.account.closes() and not pipeline.account.gap_ms


def test_an_engine_that_breaks_by_a_bug_fails_like_one_that_says_so() -> None:
    engine = Replay(error=ZeroDivisionError("bug"))
    failures: list[Error] = []
    with pipeline_of(engine, on_failure=failures.append) as pipeline:
        until(lambda: pipeline.failed)
    assert "bug" in str(failures[0])


def test_an_exit_takes_the_process_out_of_the_port_map() -> None:
    exited = ProcessEvent(
        9, 5_000_000_000, 0, 100, 1, 0, 0, 0, wire.lib.SNIFFER_EVENT_EXIT, "client", ""
    )
    engine = Replay([make_batch(make_records({}))])
    with pipeline_of(engine) as pipeline:
        until(lambda: len(there(pipeline.portmap).who(40000)) == 1)
        engine.batches.append(exited)
        until(lambda: there(pipeline.portmap).who(40000) == [])


class Refuses:
    """A namer that fails on records from one port, as on what one process does."""

    def __init__(self, sport: int) -> None:
        self.sport = sport

    def name(self, records: Any) -> None:
        if np.any(records["sport"] == self.sport):
            raise ValueError("not enough values to unpack")


def test_a_batch_that_cannot_be_named_is_lost_alone_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = [
        make_batch(make_records({"sport": 1}, {"sport": 2 + n % 2}), 2 * n) for n in range(40)
    ]
    engine, got = Replay(), []
    pipeline = pipeline_of(engine, namer=Refuses(3))
    pipeline.subscribe(lambda batch: got.extend(batch.records["sport"].tolist()))
    with pipeline:
        engine.batches += batches
    assert sorted(got) == [1] * 20 + [2] * 20
    account = pipeline.account
    assert (account.delivered, account.lost["failed"]) == (40, 40)
    assert account.closes()
    assert len(caplog.records) == 1 and caplog.records[0].exc_info
    assert "ValueError: not enough values to unpack [tests.unit.test_pipeline:" in caplog.text


def test_what_no_subscriber_got_is_lost_and_not_delivered(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail(batch: Any) -> None:
        calls.append(len(batch.records))
        raise RuntimeError("broken subscriber")

    engine, got = Replay(), []
    pipeline = pipeline_of(engine)
    pipeline.subscribe(fail)
    pipeline.subscribe(lambda batch: got.append(len(batch.records)))
    with pipeline:
        for number in range(30):
            engine.batches.append(make_batch(make_records({}), number))
            until(functools.partial(lambda least: len(calls) > least, number))
    assert sum(got) == sum(calls) == 30
    assert (pipeline.account.delivered, pipeline.account.lost["failed"]) == (0, 30)
    assert pipeline.account.closes()
    assert len(caplog.records) == 1


def test_what_a_process_is_called_costs_its_details_and_no_packet() -> None:
    def details(pid: int, start_ns: int) -> None:
        raise ValueError("nobody foresaw this")

    got = []
    pipeline = Pipeline(
        Replay([make_batch(make_records({}))]), account=Account(), processes=Processes(details)
    )
    pipeline.subscribe(lambda batch: got.append(len(batch.records)))
    with pipeline:
        pass
    assert got == [1] and pipeline.account.closes()
    assert there(pipeline.processes.get(100, 5_000_000_000)).comm == "client"


def test_a_worker_that_only_fails_ends_and_says_so() -> None:
    deaths: list[Any] = []
    engine = Replay()
    pipeline = pipeline_of(engine, namer=Refuses(40000), on_death=deaths.append, patience=0.2)
    with pipeline:
        number = 0
        while not deaths:
            engine.batches.append(make_batch(make_records({}), number))
            number += 1
            time.sleep(0.01)
        engine.batches += [make_batch(make_records({}), number)]
        until(lambda: not engine.batches)
    assert "worker cannot go on (ValueError: not enough" in str(deaths[0])
    assert len(deaths) == 1
    account = pipeline.account
    assert (account.delivered, account.lost["failed"], account.waiting) == (0, number + 1, 0)
    assert account.closes()


def test_a_receiver_that_only_fails_ends_and_says_so() -> None:
    class Broken(Replay):
        def stats(self) -> dict[str, object]:
            raise ZeroDivisionError("broken figures")

    deaths: list[Any] = []
    with pipeline_of(stand_in(Broken()), on_death=deaths.append, patience=0.2) as pipeline:
        pipeline._asked = -1e9
        until(lambda: deaths)
    assert "receiver cannot go on (ZeroDivisionError: broken figures" in str(deaths[0])


def test_a_question_that_fails_leaves_the_worker_alive() -> None:
    engine, got = Replay(), []
    with pipeline_of(engine) as pipeline:
        pipeline.subscribe(lambda batch: got.append(len(batch.records)))
        asked = threading.Event()

        def fail() -> None:
            asked.set()
            raise ZeroDivisionError

        pipeline.barrier(fail)
        assert asked.wait(30)
        engine.batches.append(make_batch(make_records({})))
    assert got == [1]
