# SPDX-License-Identifier: MIT
"""A thread that has little to do goes first; one that is busy does not."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import Any

import pytest

from nlproto.running.urgency import Urgency

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to go first")


class Time:
    now = 0

    def __call__(self) -> Any:
        return self.now


def policy(thread: int = 0) -> Any:
    return os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK


def nice() -> Any:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def first() -> Any:
    return policy() == os.SCHED_RR or nice() == -10


def in_a_thread(work: Any) -> None:
    """Run `work` in a thread that takes its class with it; what it raises is raised here."""
    failures = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_a_busy_thread_goes_back_into_the_queue() -> None:
    def work() -> None:
        before, now, used = nice(), Time(), Time()
        urgency = Urgency(now, used)
        urgency.look()
        assert first()
        now.now += 200_000_000
        used.now += 150_000_000
        urgency.look()
        assert policy() == os.SCHED_OTHER and nice() == -10  # before our other threads
        now.now += 200_000_000
        used.now += 50_000_000
        urgency.look()
        assert first()
        urgency.rest()
        assert not first() and nice() == before

    in_a_thread(work)


def test_the_class_is_real_time_where_that_is_allowed() -> None:
    """A nice value is weighed within one session alone."""

    def work() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            pytest.skip("no real-time class here")
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        Urgency().look()
        assert policy() == os.SCHED_RR
        done = subprocess.run(["chrt", "-p", "0"], capture_output=True, text=True, check=True)
        assert "SCHED_OTHER" in done.stdout

    in_a_thread(work)


def test_without_real_time_a_nice_value_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    def work() -> None:
        before, urgency = nice(), Urgency()
        monkeypatch.setattr(os, "sched_setscheduler", refuse)
        urgency.look()
        assert nice() == -10
        urgency.rest()
        assert nice() == before

    in_a_thread(work)


def test_a_busy_thread_is_not_real_time_where_no_nice_value_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    def work() -> None:
        now, used = Time(), Time()
        urgency = Urgency(now, used)
        urgency.look()
        monkeypatch.setattr(os, "setpriority", refuse)
        now.now = used.now = 200_000_000
        urgency.look()
        assert policy() == os.SCHED_OTHER

    in_a_thread(work)


def test_a_thread_that_works_for_long_now_and_then_has_a_nice_value_alone() -> None:
    def work() -> None:
        Urgency(real_time=False).look()
        assert policy() == os.SCHED_OTHER and nice() == -10

    in_a_thread(work)


def test_a_thread_with_a_class_of_its_own_keeps_it() -> None:
    def work() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        urgency = Urgency()
        urgency.look()
        urgency.rest()
        assert policy() == os.SCHED_BATCH

    in_a_thread(work)


def test_no_other_thread_is_touched() -> None:
    before = nice()
    urgency = Urgency()
    reader = threading.Thread(target=urgency.look)
    reader.start()
    reader.join()
    assert nice() == before and policy() == os.SCHED_OTHER
    urgency.rest()
    assert nice() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_threads_that_it_starts_are_not_urgent(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        if not allowed:
            monkeypatch.setattr("nlproto.running.urgency._CLASS", -1)  # EINVAL, as EPERM
        Urgency().look()
        assert first()
        children: list[Any] = []
        child = threading.Thread(target=lambda: children.append((policy(), nice())))
        child.start()
        child.join()
        assert children == [(os.SCHED_OTHER, 0)]

    in_a_thread(work)
