# SPDX-License-Identifier: MIT
"""Threads that outlive mistakes, say them seldom, and end when nothing else is left."""

from __future__ import annotations

import errno
import logging
import threading
from typing import Any

import pytest

from nlproto import Error
from nlproto.running.descriptors import NoDescriptors, or_error
from nlproto.running.supervise import Failures, described, keep_going


class Clock:
    now = 0.0

    def __call__(self) -> Any:
        return self.now


def test_the_same_is_told_once_a_minute_with_how_often_it_happened(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    failures = Failures("worker", now=clock)
    for second in range(150):
        clock.now = float(second)
        failures.add(ValueError("odd"), "naming")
        if second == 70:
            failures.add(ValueError("other"))
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "worker, naming: ValueError: odd",
        "worker, naming: ValueError: odd (59 more like it in the last minute)",
        "worker: ValueError: other",
        "worker, naming: ValueError: odd (59 more like it in the last minute)",
    ]


@pytest.mark.parametrize(
    ("error", "traceback"),
    [
        (ValueError("x"), True),
        (OSError(errno.EACCES, "no"), True),
        (OSError(errno.EMFILE, "none left"), False),
        (Error("do this"), False),
    ],
)
def test_a_traceback_is_for_what_nobody_foresaw(
    caplog: pytest.LogCaptureFixture, error: Any, traceback: bool
) -> None:
    Failures("watcher").add(error)
    assert (caplog.records[0].exc_info is not None) == traceback
    assert caplog.records[0].levelno == logging.ERROR


def test_a_description_is_one_line_and_says_where() -> None:
    try:
        raise KeyError("a\nb")
    except KeyError as error:
        assert described(error).startswith("KeyError: 'a\\nb' [tests.unit.test_supervise:")
    assert described(Error("a\n b")) == "a b"


def test_a_thread_goes_on_after_failures_and_ends_when_it_is_done() -> None:
    turns: list[Any] = []
    deaths: list[Any] = []
    failures = Failures("x", patience=60)

    def turn() -> bool:
        turns.append(1)
        if len(turns) < 4:
            raise RuntimeError("not yet")
        return False

    thread = threading.Thread(target=keep_going, args=(turn, failures, deaths.append))
    thread.start()
    thread.join(60)
    assert len(turns) == 4 and not deaths


def test_success_gives_new_patience() -> None:
    clock = Clock()
    failures = Failures("x", patience=10, now=clock)
    failures.add(ValueError())
    clock.now = 9.0
    failures.clear()
    failures.add(ValueError())
    clock.now = 18.0
    assert not failures.hopeless
    clock.now = 20.0
    assert failures.hopeless
    assert isinstance(failures.death(), Error) and "x cannot go on" in str(failures.death())


def test_no_descriptor_left_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NoDescriptors, match="ulimit -n"), or_error():
        raise OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(PermissionError), or_error():
        raise PermissionError(errno.EACCES, "no")
