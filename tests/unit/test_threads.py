# SPDX-License-Identifier: MIT
"""Importing starts no thread: NumPy's library would start one for each processor."""

from __future__ import annotations

import os
import subprocess
import sys


def test_reading_records_starts_no_thread() -> None:
    program = (
        "import os; from nlproto.records import wire; print(len(os.listdir('/proc/self/task')))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"
    }
    environment["PYTHONPATH"] = "python"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1"
