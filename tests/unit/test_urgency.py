# SPDX-License-Identifier: MIT
"""A thread that has little to do goes first; one that is busy does not."""

import os
import threading

import pytest

from nlproto.running.urgency import Urgency

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to go first")


class Time:
    now = 0

    def __call__(self):
        return self.now


def nice():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_busy_thread_goes_back_into_the_queue():
    before, now, used = nice(), Time(), Time()
    urgency = Urgency(now, used)
    urgency.look()
    assert nice() == -10
    now.now += 200_000_000
    used.now += 150_000_000
    urgency.look()
    assert nice() == before
    now.now += 200_000_000
    used.now += 50_000_000
    urgency.look()
    assert nice() == -10
    urgency.rest()
    assert nice() == before


def test_no_other_thread_is_touched():
    before = nice()
    urgency = Urgency()
    reader = threading.Thread(target=urgency.look)
    reader.start()
    reader.join()
    assert nice() == before
    urgency.rest()
    assert nice() == before
