# SPDX-License-Identifier: MIT
from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from nlproto.pipeline.queue import MessageQueue


def test_messages_come_out_in_the_order_they_went_in() -> None:
    queue: MessageQueue[Any] = MessageQueue(100)
    for number in range(5):
        queue.put(number, 10)
    assert queue.get_many(3) == [0, 1, 2]
    assert queue.get_many(10) == [3, 4]
    assert queue.bytes == 0


def test_a_full_queue_drops_the_oldest_and_counts_its_records() -> None:
    queue: MessageQueue[Any] = MessageQueue(100)
    assert queue.put("a", 60, 6) == 0
    assert queue.put("b", 40, 4) == 0
    assert queue.put("c", 50, 5) == 6
    assert queue.get_many(10) == ["b", "c"]
    assert (queue.dropped_messages, queue.dropped_records) == (1, 6)
    assert queue.peak_bytes <= 100


def test_a_message_larger_than_the_queue_is_still_accepted_alone() -> None:
    queue: MessageQueue[Any] = MessageQueue(10)
    queue.put("small", 5, 1)
    assert queue.put("large", 50, 9) == 1
    assert queue.get() == "large"


def test_markers_of_no_size_are_never_dropped_and_keep_their_place() -> None:
    queue: MessageQueue[Any] = MessageQueue(10)
    queue.put("marker", 0)
    queue.put("a", 10, 1)
    queue.put("late marker", 0)
    assert queue.put("b", 10, 1) == 1
    assert queue.get_many(10) == ["marker", "late marker", "b"]


def test_put_after_close_counts_the_message_as_lost() -> None:
    queue: MessageQueue[Any] = MessageQueue(10)
    queue.put("kept", 1, 1)
    queue.close()
    assert queue.put("late", 1, 3) == 3
    assert queue.get_many(10) == ["kept"]
    assert queue.get_many(10) == []
    assert queue.dropped_records == 3


def test_get_wakes_up_when_another_thread_closes() -> None:
    queue: MessageQueue[Any] = MessageQueue(10)
    closer = threading.Timer(0.05, queue.close)
    closer.start()
    assert queue.get(timeout=30) is None
    closer.join()


def test_get_gives_up_after_its_timeout() -> None:
    began = time.monotonic()
    assert MessageQueue(1).get(timeout=0.05) is None
    assert time.monotonic() - began >= 0.05


def test_a_size_below_one_byte_is_refused() -> None:
    with pytest.raises(ValueError):
        MessageQueue(0)


def test_nothing_is_lost_or_doubled_between_many_threads() -> None:
    queue: MessageQueue[Any] = MessageQueue(1 << 20)
    taken: list[int] = []

    def put(base: int) -> None:
        for number in range(500):
            queue.put(base + number, 1)

    def take() -> None:
        while found := queue.get_many(7, 1):
            taken.extend(found)

    putters = [threading.Thread(target=put, args=(base,)) for base in (0, 1000, 2000)]
    takers = [threading.Thread(target=take) for _ in range(2)]
    for thread in putters + takers:
        thread.start()
    for thread in putters:
        thread.join()
    queue.close()
    for thread in takers:
        thread.join()
    assert sorted(taken) == sorted(base + n for base in (0, 1000, 2000) for n in range(500))
