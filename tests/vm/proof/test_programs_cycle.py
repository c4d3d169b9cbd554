# SPDX-License-Identifier: MIT
"""The programs of engine ebpf come and go under churn, as test_unload.py has it of the module."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_unload import CYCLES, _end, _fork, _kib, _objects, churn

from nlproto.engines.engine import open_engine
from nlproto.records.wire import Batch

LIBC = ctypes.CDLL(None, use_errno=True)
SYS_BPF, PROG_GET_NEXT_ID, MAP_GET_NEXT_ID = 321, 11, 12


def loaded(what: int) -> set[int]:
    """Ids of all programs, or maps, that the kernel has."""
    found: set[int] = set()
    last = 0
    while True:
        attributes = (ctypes.c_uint32 * 3)(last, 0, 0)
        if LIBC.syscall(SYS_BPF, what, attributes, ctypes.sizeof(attributes)):
            return found
        last = attributes[1]
        found.add(last)


def _reader(joined: int, until: int) -> None:
    """Reads until `until` is closed by the other side, and has had a record then."""
    with open_engine("ebpf", lambda _: None) as engine:
        os.write(joined, b"x")
        os.set_blocking(until, False)
        records = 0
        while True:
            records += sum(len(b.records) for b in engine.read(0.2) if isinstance(b, Batch))
            try:
                if os.read(until, 1) == b"" and records:
                    return
            except BlockingIOError:
                pass


def _cycle() -> None:
    """Three readers: one that reads and ends, one that is stopped first, one that is killed."""
    ready, joined = os.pipe()
    until, go_on = os.pipe()
    os.set_inheritable(go_on, False)

    def read() -> None:
        os.close(go_on)
        _reader(joined, until)

    reading, stopped, dying = (_fork(read) for _ in range(3))
    count = 0
    while count < 3:
        count += len(os.read(ready, 3))
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)
    _end(dying)
    os.close(go_on)
    assert os.waitpid(reading, 0)[1] == 0
    _end(stopped)
    for end in (ready, joined, until):
        os.close(end)


@pytest.mark.patience(900 + 120 * CYCLES)
def test_programs_come_and_go_under_churn_and_leave_no_memory(unloaded: None) -> None:
    """PACKET_HUNTER_CYCLES times."""
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel has no BTF")
    subprocess.run(["ip", "link", "set", "lo", "up", "multicast", "on"], check=True)
    subprocess.run(["ip", "route", "add", "239.0.0.0/8", "dev", "lo"], check=False)
    programs, maps = loaded(PROG_GET_NEXT_ID), loaded(MAP_GET_NEXT_ID)
    with churn():
        _cycle()
    before, percpu = _objects(), _kib("Percpu")
    with churn():
        for _ in range(CYCLES):
            _cycle()
    time.sleep(1)
    grown, percpu = _objects() - before, _kib("Percpu") - percpu
    print(f"{CYCLES} cycles, {grown:+} objects, per-CPU memory {percpu:+} KiB")
    assert loaded(PROG_GET_NEXT_ID) <= programs
    assert loaded(MAP_GET_NEXT_ID) <= maps
    assert grown < 2000 + 20 * CYCLES
    assert percpu < 1000 + CYCLES
