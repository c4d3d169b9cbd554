# SPDX-License-Identifier: MIT
"""The module under work from all sides; what is wrong shows in the kernel log and in kmemleak.

PACKET_HUNTER_STRESS says for how many seconds. `make test-kasan` plays it on a kernel that looks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STRESS = Path(__file__).parent / "stress" / "stress.py"
SECONDS = os.environ.get("PACKET_HUNTER_STRESS", "15")


@pytest.mark.patience(900)
def test_the_module_bears_work_from_all_sides_and_leaks_nothing(
    module_file: Path, unloaded: None
) -> None:
    debug = Path("/sys/kernel/debug")
    if not (debug / "kprobes").exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", str(debug)], check=True)
    kmemleak = debug / "kmemleak"
    if kmemleak.exists():
        # Twice: what the first scan finds may still be in somebody's register.
        for word in ("scan", "scan", "clear"):
            kmemleak.write_text(word)
    command = [sys.executable, str(STRESS), str(module_file), SECONDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stress: done" in done.stdout
    assert "unreferenced object" not in done.stdout, done.stdout
    locks = Path("/proc/lockdep_stats")
    if locks.exists():  # lockdep switches itself off with its first report
        assert "debug_locks:                             1" in locks.read_text()
