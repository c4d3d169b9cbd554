# SPDX-License-Identifier: MIT
"""A debug kernel finds bugs: each detector that `make test-kasan` trusts is shown a planted one.

Lockdep switches itself off with its first report, and KASAN's first one switches it off too: each
bug that does so has a guest of its own, or comes after those that need lockdep.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from vmtest.kernlog import KernelLog, problems

RELEASE = os.uname().release
needs_debug = pytest.mark.skipif("-debug" not in RELEASE, reason="kernel 6.1-debug is needed")
needs_races = pytest.mark.skipif("-races" not in RELEASE, reason="kernel 6.1-races is needed")
KMEMLEAK = Path("/sys/kernel/debug/kmemleak")
SOON = 3  # s: a detector that works later than at once


def plant(bug: str, log: KernelLog) -> str:
    """What the kernel complains about when this bug is played."""
    planted = os.environ["PACKET_HUNTER_PLANTED"]
    try:
        subprocess.run(["insmod", planted, f"bug={bug}"], check=True)
        time.sleep(SOON)
    finally:
        subprocess.run(["rmmod", "planted"], check=False)
    return "\n".join(problems(log.read()))


@needs_debug
@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("rcu_dereference", "suspicious RCU usage"),
        ("rcu_walk", "suspicious RCU usage"),
        ("atomic_sleep", "sleeping function called from invalid context"),
        ("rcu_twice", "WARNING: "),
        ("use_after_free", "KASAN: "),
        ("out_of_bounds", "KASAN: slab-out-of-bounds"),
    ],
)
def test_a_planted_bug_is_found(kernel_log: KernelLog, bug: str, words: str) -> None:
    assert words in plant(bug, kernel_log)


@needs_debug
@pytest.mark.boot("planted=lock_inversion")
def test_a_lock_inversion_is_found(kernel_log: KernelLog) -> None:
    assert "possible circular locking" in plant("lock_inversion", kernel_log)


@needs_races
def test_a_data_race_is_found(kernel_log: KernelLog) -> None:
    assert "KCSAN: data-race in count_up [planted] / count_up [planted]" in plant(
        "data_race", kernel_log
    )


@needs_debug
def test_a_leak_is_found(kernel_log: KernelLog) -> None:
    if not KMEMLEAK.exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    for word in ("scan", "scan", "clear"):
        KMEMLEAK.write_text(word)
    plant("leak", kernel_log)
    for _ in range(2):
        time.sleep(6)  # kmemleak leaves out what is younger than 5 s
        KMEMLEAK.write_text("scan")
    found = KMEMLEAK.read_text()
    kernel_log.read()
    assert "unreferenced object" in found
    KMEMLEAK.write_text("clear")
