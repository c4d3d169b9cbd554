# SPDX-License-Identifier: MIT
"""What one client is to get: bounded, counted, and every loss is reported."""

from __future__ import annotations

from typing import Any

import msgspec

from daemon.serve.publisher import EncodedPiece
from daemon.serve.subscription import Subscription
from nlproto.client.frames import DATA_HEAD, Decoder, Kind


def _piece(count: int = 1, size: int = 100, details: Any = ()) -> EncodedPiece:
    payload = b"x" * (size - sum(len(encoded) for _, _, encoded in details))
    return EncodedPiece(payload, count, tuple(details), b"", b"", size)


def _begun(limit: Any) -> Any:
    subscription = Subscription(lambda: None, limit)
    subscription.begun = True
    return subscription


def _frames(subscription: Any) -> Any:
    decoder = Decoder(1 << 24)
    frames: list[Any] = []
    while (frame := subscription.next_frame()) is not None:
        frames += decoder.feed(frame)
    return frames


def _gaps(frames: Any) -> list[Any]:
    events = [msgspec.json.decode(payload) for kind, payload in frames if kind is Kind.EVENT]
    return [event["records"] for event in events]


def test_nothing_counts_before_it_has_begun() -> None:
    subscription = Subscription(lambda: None, 1000)
    subscription.offer(5, _piece())
    subscription.lose(5, 5)
    assert _frames(subscription) == [] and subscription.matched == 0


def test_when_it_is_full_the_oldest_goes_and_the_account_closes() -> None:
    subscription = _begun(250)
    for number in range(10):
        subscription.offer(3, _piece(count=number))
    frames = _frames(subscription)
    assert _gaps(frames) == [sum(range(8))]
    sequences = [DATA_HEAD.unpack_from(one)[0] for kind, one in frames if kind is Kind.DATA]
    assert sequences == [8, 9]
    assert (subscription.seen, subscription.matched) == (30, 45)
    assert subscription.matched == subscription.sent + subscription.dropped
    assert subscription.queued == 0


def test_a_smaller_part_of_the_room_is_kept_to_and_the_loss_is_told_though_nothing_follows() -> (
    None
):
    subscription = _begun(1000)
    for _ in range(5):
        subscription.offer(1, _piece(count=1, size=200))
    assert subscription.next_frame() is not None  # it is being sent, and counts still
    subscription.limit_queue(300)
    assert subscription.queued == 400 and subscription.dropped == 3
    assert _gaps(_frames(subscription)) == [3]
    subscription.lose(7, 7)
    assert _gaps(_frames(subscription)) == [7]


def test_details_of_processes_count_as_bytes_and_are_told_once() -> None:
    details = [((n, 5), n, b'"' + b"y" * 40_000 + b'"') for n in range(3)]
    subscription = _begun(1 << 20)
    for _ in range(2):
        subscription.offer(1, _piece(size=130_000, details=details))
    assert subscription.queued == 260_000
    told = [one for kind, one in _frames(subscription) if kind is Kind.PROCESSES]
    assert [len(msgspec.json.decode(one)) for one in told] == [1, 1, 1]
