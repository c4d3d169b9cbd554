# SPDX-License-Identifier: MIT
"""The collector's time of day jumps by twenty years, and back: its folder stays as it is."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from fleet import schema, wire
from fleet.collect import tidy
from fleet.collect.parquet import ParquetStore, parts
from fleet.collect.retention import RetentionClock
from fleet.collect.rollup import write_rollup
from fleet.collect.tables import Received
from fleet.collect.tidy import Tidier
from fleet.export.deltas import rows_of
from nlproto.records.elapsed import Moment
from playing import flows

DAY, HOUR = 86400.0, 3600.0
YEARS = 20 * 365.25 * DAY


class Machine:
    """Its clocks, as something sets them."""

    def __init__(self) -> None:
        self.now = Moment("boot", 1000.0, 1000.0, time.time())

    def read(self) -> Moment:
        return self.now

    def runs(self, seconds: float, jump: float = 0.0) -> None:
        now = self.now
        self.now = dataclasses.replace(
            now,
            boot=now.boot + seconds,
            uptime=now.uptime + seconds,
            real=now.real + seconds + jump,
        )


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def clock(machine: Machine, tmp_path: Path) -> RetentionClock:
    made = RetentionClock(tmp_path / ".age", machine.read)
    made.look(empty=True)
    return made


def told(clock: RetentionClock, empty: bool = False) -> float:
    return clock.look(empty) / 1e9


def test_it_follows_the_time_of_day(clock: RetentionClock, machine: Machine) -> None:
    machine.runs(HOUR)
    assert told(clock) == pytest.approx(machine.now.real, abs=1e-3)


@pytest.mark.parametrize("jump", [YEARS, -YEARS])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_jump_and_back_passes_hours_at_most(
    clock: RetentionClock, machine: Machine, jump: float, restarted: bool
) -> None:
    began = machine.now.real
    for step in (jump, 0.0, -jump):
        machine.runs(HOUR, step)
        if restarted:
            clock = RetentionClock(clock._path, machine.read)
        assert told(clock) <= began + 7 * HOUR
    machine.runs(10 * HOUR)
    assert told(clock) == pytest.approx(machine.now.real, abs=1e-3)


def test_what_begins_in_1970_goes_on_with_the_right_time(
    clock: RetentionClock, machine: Machine
) -> None:
    machine.runs(HOUR, -machine.now.real)
    told(clock)
    machine.runs(1, 1.8e9)
    assert told(clock, empty=True) == pytest.approx(machine.now.real, abs=1e-3)


def test_a_machine_that_is_off_at_night_falls_behind_by_hours(
    clock: RetentionClock, machine: Machine
) -> None:
    for day in range(30):
        machine.now = Moment(f"boot {day}", 1.0, 1.0, machine.now.real + DAY / 2)
        told(clock)
        machine.runs(DAY / 2)
        told(clock)
    assert machine.now.real - told(clock) <= DAY


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", "\\xff"])
def test_a_damaged_file_begins_anew(clock: RetentionClock, machine: Machine, text: str) -> None:
    clock._path.write_text(text)
    assert told(clock) == pytest.approx(machine.now.real, abs=1e-3)


@pytest.mark.parametrize("years", [YEARS, -YEARS])
def test_a_folder_keeps_its_hours(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, years: float
) -> None:
    monkeypatch.setattr(tidy, "_EVERY", 0.0)
    with_hours(tmp_path)
    store = ParquetStore(tmp_path, 30 * DAY)
    before = sorted((tmp_path / "flows").iterdir())
    tidier = Tidier(store, 400 * DAY)
    tidier._clock = RetentionClock(tmp_path / ".age", machine.read)
    tidier.tidy()
    real = time.time_ns
    for jump in (years, 0.0):
        machine.runs(40.0, jump or -years)
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: real() + int(jump * 1e9))
        tidier.tidy()
        # rows of hosts whose clocks are right are taken meanwhile
        put(store, 100 + int(jump == 0.0), real())
    assert sorted((tmp_path / "flows").iterdir()) == before
    assert store.untimely == 0


def with_hours(directory: Path) -> None:
    store = ParquetStore(directory, 30 * DAY)
    for sequence, days in enumerate((20, 5, 0)):
        put(store, sequence, time.time_ns() - int(days * DAY * 1e9))


def put(store: ParquetStore, sequence: int, at_ns: int) -> None:
    """Store a batch of two flows."""
    rows = rows_of(flows(10 * sequence, 2))
    rows["first_ns"] = rows["last_ns"] = at_ns
    payload = wire.encode_flows(bytes(16), sequence, rows, {})
    store.write([Received("h1", wire.decode(payload))])


@pytest.mark.parametrize("years", [20, -20])
def test_sums_are_of_all_files_whatever_their_times(tmp_path: Path, years: int) -> None:
    store = ParquetStore(tmp_path, 30 * DAY)
    at = time.time_ns()
    name = schema.hour_name(at)
    put(store, 1, at)
    assert write_rollup(tmp_path, name)
    final = tmp_path / "rollup" / name / "part-0.parquet"
    jumped = final.stat().st_mtime + years * 365 * DAY
    os.utime(final, (jumped, jumped))
    assert not write_rollup(tmp_path, name)
    put(store, 2, at)
    for path in parts(tmp_path / "flows" / name)[1:]:
        os.utime(path, (jumped - 60, jumped - 60))
    assert write_rollup(tmp_path, name)
    assert not write_rollup(tmp_path, name)
