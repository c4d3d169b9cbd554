# SPDX-License-Identifier: MIT
"""Where engine packet runs, and what is left of it (root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nlproto.engines.packet import PacketEngine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="AF_PACKET needs root")

SAY = (
    "from nlproto.engines.packet import PacketEngine\n"
    "PacketEngine(print, everywhere=False).close()\n"
)


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_root_in_a_pid_namespace_is_not_asked_to_be_root() -> None:
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", SAY]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "container" in said and "run it as root" not in said


def test_nothing_is_left_open() -> None:
    def opened() -> list[str]:
        there = Path("/proc/self/fd").iterdir()
        return sorted(os.readlink(one) for one in there if os.path.lexists(one))

    before = opened()
    engine = PacketEngine(pytest.fail, everywhere=False)
    assert opened() != before
    engine.close()
    assert [one for one in opened() if "/proc" in one or "socket" in one] == [
        one for one in before if "/proc" in one or "socket" in one
    ]
