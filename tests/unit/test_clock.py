# SPDX-License-Identifier: MIT
"""Monotonic time to the time of day."""

from __future__ import annotations

import time

import numpy as np

from nlproto.records import wire
from nlproto.records.clock import Clock


def test_a_batchs_clock_moves_with_its_head_not_with_the_readers_clock() -> None:
    heads = np.zeros(2, wire.BATCH)
    heads["mono_ns"] = 1_000
    heads["real_ns"] = [500_000, 900_000]  # the time of day was set between the two
    heads["boot_ns"] = 3_000
    assert [Clock.from_head(head).real_ns(1_100) for head in heads] == [500_100, 900_100]
    assert Clock.from_head(heads[0]).boot_ns(1_000) == 3_000


def test_arrays_of_times_become_datetimes() -> None:
    found = Clock(1_700_000_000_000_000_000, 0).real_times(np.array([0, 1_000], np.uint64))
    assert str(found[1]) == "2023-11-14T22:13:20.000001000"


def test_now_agrees_with_the_time_of_day() -> None:
    before = time.time_ns()
    mono = time.monotonic_ns()
    assert abs(Clock.now().real_ns(mono) - before) < 1_000_000_000
