# SPDX-License-Identifier: MIT
"""Streams: a filter is applied and encoded once a batch, however many subscribe to it."""

from types import SimpleNamespace

import numpy as np

from daemon.streams import Streams
from nlproto.filter import Filter
from nlproto.pipeline import NamedBatch
from nlproto.processes import Processes


class Subscriber:
    def __init__(self):
        self.seen, self.pieces, self.lost = 0, [], 0

    def offer(self, seen, piece):
        self.seen += seen
        if piece is not None:
            self.pieces.append(piece)

    def lose(self, seen, matched):
        self.seen += seen
        self.lost += matched


def _publish(streams, make_batch, records):
    batch = make_batch(records)
    streams.publish(NamedBatch(batch.head, np.array(batch.records), None))


def test_a_filter_runs_once_a_batch_for_all_who_have_it(make_records, make_batch, monkeypatch):
    masks = []
    mask = Filter.mask

    def counted(self, *arguments):
        masks.append(str(self))
        return mask(self, *arguments)

    monkeypatch.setattr(Filter, "mask", counted)
    streams = Streams(
        SimpleNamespace(processes=Processes()), lambda function: function(), max_filters=10
    )
    same = [Subscriber() for _ in range(20)]
    for one in same:
        streams.join("udp dst port 53", None, one)
    other = Subscriber()
    streams.join("tcp", None, other)
    _publish(streams, make_batch, make_records({"dport": 53}, {"dport": 54}))
    assert sorted(masks) == sorted({str(name) for name in masks}) and len(masks) == 2
    assert {id(one.pieces[0].payload) for one in same} == {id(same[0].pieces[0].payload)}
    assert [piece.count for piece in same[0].pieces] == [1]
    assert (other.seen, other.pieces) == (2, [])


def test_another_users_stream_has_its_own_records_and_no_others(make_records, make_batch):
    streams = Streams(
        SimpleNamespace(processes=Processes()), lambda function: function(), max_filters=10
    )
    root, user = Subscriber(), Subscriber()
    streams.join("udp", None, root)
    streams.join("udp", 1000, user)
    _publish(streams, make_batch, make_records({"uid": 1000}, {"uid": 0}, {"uid": 0, "tgid": 0}))
    assert root.pieces[0].count == 3
    assert user.pieces[0].count == 1


def test_what_waits_for_the_event_loop_is_bounded_and_counted(make_records, make_batch):
    posted = []
    streams = Streams(
        SimpleNamespace(processes=Processes()), posted.append, max_filters=10, max_pending=1000
    )
    one = Subscriber()
    streams.join("", None, one)
    for _ in range(3):
        _publish(streams, make_batch, make_records(*({"sport": n + 1} for n in range(10))))
    for function in posted:
        function()
    assert (one.seen, one.lost, sum(piece.count for piece in one.pieces)) == (30, 20, 10)


def test_a_filter_that_fails_costs_its_own_stream_and_no_other(
    make_records, make_batch, monkeypatch
):
    mask = Filter.mask

    def broken(self, *arguments):
        if str(self) == "tcp":
            raise RecursionError("a filter that nobody foresaw")
        return mask(self, *arguments)

    monkeypatch.setattr(Filter, "mask", broken)
    streams = Streams(
        SimpleNamespace(processes=Processes()), lambda function: function(), max_filters=10
    )
    bad, good = Subscriber(), Subscriber()
    streams.join("tcp", None, bad)
    streams.join("udp", None, good)
    _publish(streams, make_batch, make_records({}, {}))
    assert [piece.count for piece in good.pieces] == [2]
    assert (bad.seen, bad.pieces) == (2, [])
