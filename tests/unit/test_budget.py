# SPDX-License-Identifier: MIT
"""Costly work gets its share of the time and no more."""

from __future__ import annotations

from typing import Any

from nlproto.running.budget import Budget


class Clock:
    now = 0

    def __call__(self) -> Any:
        return self.now


def test_saved_time_is_spent_and_earned_again_by_share() -> None:
    clock = Clock()
    budget = Budget(4, 100, clock)
    assert budget.allows()
    with budget.spend():
        clock.now += 140
    assert not budget.allows()  # 100 saved + 35 earned - 140
    clock.now += 24
    assert budget.allows()


def test_no_more_is_saved_than_the_limit() -> None:
    clock = Clock()
    budget = Budget(4, 100, clock)
    clock.now += 1_000_000
    assert budget.allows()
    with budget.spend():
        clock.now += 200
    assert not budget.allows()


def test_what_work_takes_may_have_a_clock_of_its_own() -> None:
    """A thread's own clock stands still while others run, and is another one in each thread."""
    clock, processor = Clock(), Clock()
    processor.now = 1_000_000  # of the thread that made it
    budget = Budget(4, 100, clock, processor)
    processor.now = 0
    assert budget.allows()
    with budget.spend():
        clock.now += 1000
        processor.now += 140
    assert budget.allows()  # 100 saved + 250 earned, at most 100 kept
    with budget.spend():
        processor.now += 140
    assert not budget.allows()
    clock.now += 164
    assert budget.allows()
