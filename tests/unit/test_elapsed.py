# SPDX-License-Identifier: MIT
from __future__ import annotations

import time
from typing import Any

import pytest

from nlproto.records.elapsed import Elapsed, Moment, read_moment

YEARS = 20 * 365.25 * 86400
START = Moment("boot", 1000.0, 1000.0, 1_800_000_000.0)


def _after(
    seconds: float = 0.0,
    boot: float = 0.0,
    uptime: float = 0.0,
    real: float = 0.0,
    boot_id: str = "boot",
) -> Moment:
    return Moment(
        boot_id,
        START.boot + seconds + boot,
        START.uptime + seconds + uptime,
        START.real + seconds + real,
    )


def _lived(*moments: Any) -> Any:
    moments = (START, *moments)
    elapsed = Elapsed(read=iter(moments).__next__)
    for _ in moments[1:]:
        elapsed.look()
    return elapsed.seconds


def test_time_that_all_clocks_agree_on_passed() -> None:
    assert _lived(_after(10), _after(35)) == 35


@pytest.mark.parametrize("clock", ["real", "boot", "uptime"])
@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_a_clock_that_jumps_adds_nothing(clock: str, jump: Any) -> None:
    assert _lived(_after(10, **{clock: jump})) <= 10
    there_and_back = _lived(_after(10, **{clock: jump}), _after(20), _after(30))
    assert 10 <= there_and_back <= 30


def test_all_clocks_of_a_process_that_is_told_lies_do_not_count_either() -> None:
    assert _lived(_after(10, real=YEARS, boot=YEARS)) == 10


def test_a_suspended_machine_has_lived() -> None:
    assert _lived(_after(86400)) == 86400


def test_after_a_reboot_no_more_counts_than_the_machine_runs() -> None:
    assert _lived(Moment("next", 40.0, 40.0, START.real + YEARS)) == 40
    assert _lived(Moment("next", 40.0, 40.0, START.real + 30)) == 30
    assert _lived(Moment("next", 40.0, 40.0, START.real - YEARS)) == 0


@pytest.mark.parametrize("jump", [-YEARS, 0.0, YEARS])
def test_a_gap_within_a_boot_does_not_know_the_time_of_day(jump: float) -> None:
    assert _after(10, real=jump).gap_since(START) == 10


def test_a_gap_over_a_boot_is_no_shorter_than_that_boot() -> None:
    assert Moment("next", 40.0, 40.0, START.real + 900).gap_since(START) == 900
    assert Moment("next", 40.0, 40.0, START.real - YEARS).gap_since(START) == 40


def test_the_machines_own_clocks() -> None:
    elapsed = Elapsed()
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    while time.clock_gettime(time.CLOCK_BOOTTIME) < before + 0.2:
        time.sleep(0.02)
    assert 0.1 < elapsed.look() < 60
    assert len(read_moment().boot_id) == 36
