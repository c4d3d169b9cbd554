# SPDX-License-Identifier: MIT
"""A pipeline that reads sums of flows while nobody wants packets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from recording import make_batch, make_records
from replaying import Replay, pipeline_of
from waiting import there, until


class Summing(Replay):
    """An engine with groups packets and flows: `stream` is told from where it is asked for."""

    def __init__(self, records: Any) -> None:
        super().__init__()
        self.instance = 7
        self.records = records
        self.at = 0
        self.limit = len(records)
        self.queued: list[Any] = []
        self.opening = self.tail_at()

    def tail_at(self) -> Any:
        tail = np.zeros(1, wire.TAIL)
        tail["record_seq"] = tail["packets"] = self.at
        return tail

    def next(self, count: int) -> Any:
        """The next `count` records, in the present group; flows of up to 5 records."""
        records = self.records[self.at : self.at + count]
        batch = make_batch(records, self.at)
        self.at += len(records)
        if self.group == "packets":
            return batch
        parts = [records[n : n + 5] for n in range(0, len(records), 5)]
        flows = np.zeros(len(parts), wire.FLOW_RECORD)
        for flow, part in zip(flows, parts, strict=True):
            flow["last"] = part[-1]
            flow["last"]["len"], flow["last"]["hdr_len"] = part["len"].sum(), 0
            flow["last"]["gso_segs"] = len(part)
            flow["first_ns"], flow["records"] = part["time_ns"][0], len(part)
        return wire.FlowBatch(batch.head, flows, self.at, 0)

    def read(self, timeout: Any) -> Iterator[Any]:
        if self.queued:
            yield self.queued.pop(0)
        elif self.at < self.limit:
            yield self.next(20)
        else:
            time.sleep(min(timeout, 0.01))

    def catch_up(self) -> Iterator[Any]:
        yield from ()
        self.closing = self.tail_at()

    def want_packets(self, wanted: Any) -> None:
        self.queued.append(self.next(13))  # recorded until now, and not yet read
        self.group = "packets" if wanted else "flows"
        self.opening = self.tail_at()

    def finish(self, until_ns: Any = None) -> Iterator[Any]:
        yield from self.queued
        self.closing = self.tail_at()


def test_flows_and_packets_in_turn_give_the_sums_of_packets_alone() -> None:
    records = make_records(
        *({"time_ns": 10**9 + n, "len": 60 + n % 11, "hdr_len": 28} for n in range(4000))
    )
    engine, sums, one_by_one = Summing(records), [], []
    first, last = [], []

    def take(batch: Any) -> None:
        sums.append(int(batch.flows["packets_out"].sum()))
        first.append(int(batch.flows["first_ns"].min()))
        last.append(int(batch.flows["last_ns"].max()))
        one_by_one.extend(batch.records["time_ns"].tolist())

    pipeline = pipeline_of(engine, packets=False)
    pipeline.subscribe(take)
    total = []
    pipeline.subscribe(lambda batch: total.append(int(there(batch.flows)["bytes_out"].sum())))
    with pipeline:
        wanted = False
        while engine.at < 4000:
            wanted = not wanted
            pipeline.want_packets(wanted)
            passed = threading.Event()
            pipeline.barrier(passed.set)
            assert passed.wait(20)
    assert sum(sums) == 4000
    assert sum(total) == int(records["len"].sum())
    assert (min(first), max(last)) == (10**9, 10**9 + 3999)
    assert 0 < len(one_by_one) < 4000
    assert len(set(one_by_one)) == len(one_by_one)
    assert pipeline.account.delivered == 4000
    assert pipeline.account.closes()


def test_after_a_barrier_there_are_only_packets_for_who_wanted_them() -> None:
    records = make_records(*({"time_ns": 10**9 + n} for n in range(1000)))
    engine, after = Summing(records), []
    engine.limit = 200
    pipeline = pipeline_of(engine, packets=False)
    passed = threading.Event()

    def count(batch: NamedBatch) -> None:
        if passed.is_set():
            after.append(len(batch.records))

    pipeline.subscribe(count)
    with pipeline:
        until(lambda: engine.at >= 200)
        pipeline.want_packets(True)
        pipeline.barrier(passed.set)
        assert passed.wait(20)
        engine.limit = 1000
        until(lambda: sum(after) >= 700)
    assert all(after)


def test_flows_that_nobody_can_take_are_lost_as_many_records() -> None:
    def broken(batch: Any) -> None:
        raise RuntimeError("no")

    engine = Summing(make_records(*({"time_ns": 10**9 + n} for n in range(100))))
    pipeline = pipeline_of(engine, packets=False)
    pipeline.subscribe(broken)
    with pipeline:
        until(lambda: pipeline.account.lost["failed"] == 100)
    assert pipeline.account.closes()


def test_an_engine_without_flows_keeps_what_its_kernel_had_no_memory_for() -> None:
    class Old(Replay):
        instance = 7

        def want_packets(self, wanted: Any) -> None:
            pass

    batch = make_batch(make_records({}, {}), 5)
    head = batch.head.copy()
    head["lost"], head["packets"] = 5, 7
    engine = Old([wire.Batch(head, batch.records)])
    engine.opening = np.zeros(1, wire.TAIL)
    pipeline = pipeline_of(engine, packets=False)
    with pipeline:
        until(lambda: pipeline.account.delivered == 2)
        pipeline.want_packets(True)
        passed = threading.Event()
        pipeline.barrier(passed.set)
        assert passed.wait(20)
    assert pipeline.account.lost["alloc"] == 5
    assert pipeline.account.closes()
