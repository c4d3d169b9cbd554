# SPDX-License-Identifier: MIT
"""top in a terminal of its own: a signal ends it, and so does the end of the terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")
SECONDS = 60


@pytest.mark.parametrize("how", ["terminated", "hung up"])
def test_top_does_not_outlive_its_terminal(how: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "hunter", "top", "--engine", "packet"])
    try:
        shown = b""
        while b"sorted by" not in shown:
            shown += _read(terminal)
        if how == "hung up":
            os.close(terminal)
            assert _ended(pid, None) == -signal.SIGHUP
        else:
            os.kill(pid, signal.SIGTERM)
            assert _ended(pid, terminal) == 0
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            os.close(terminal)


def _read(terminal: Any) -> Any:
    assert select.select([terminal], [], [], SECONDS)[0], "nothing more is shown"
    return os.read(terminal, 65536)


def _ended(pid: int, terminal: Any) -> Any:
    """The exit code; what it draws until then is thrown away, as a terminal would take it."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if terminal is not None and select.select([terminal], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                os.read(terminal, 65536)
        time.sleep(0.02)
    raise AssertionError("it is still there")
