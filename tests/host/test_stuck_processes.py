# SPDX-License-Identifier: MIT
"""A user's process can make readers of its command line wait for ever (root)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.host import procfs
from places import open_to_all
from waiting import patient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")

UID = 61_321
SCRIPT = Path(__file__).parents[1] / "stuck.py"


@contextlib.contextmanager
def stuck(directory: Path, uid: int = UID) -> Iterator[int]:
    home = open_to_all(directory) / str(uid)
    home.mkdir()
    os.chown(home, uid, uid)
    one = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(uid), str(home)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert one.stdout is not None
        said = one.stdout.readline().strip()
        if not said.isdecimal():
            pytest.skip("users may not mount FUSE here")
        yield int(said)
    finally:
        os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns; fails if that takes longer."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(patient(seconds))
    assert found, "it still waits"
    return found[0]


def details(pid: int) -> Any:
    one = procfs.identity(pid)
    assert one is not None
    return procfs.details(pid, one.start_ns)


def test_who_cannot_be_asked_for_a_command_line_costs_a_moment(tmp_path: Path) -> None:
    with stuck(tmp_path) as pid:
        reading = subprocess.run(
            ["timeout", "1", "cat", f"/proc/{pid}/cmdline"], capture_output=True
        )
        assert reading.returncode == 124  # or this test shows nothing
        found = within(20, lambda: details(pid))
        assert (found.tgid, found.uid, found.cmdline) == (pid, UID, "")
        assert found.comm and found.exe
        # however often: others wait behind it
        within(20, lambda: [details(pid) for _ in range(200)])
        mine = within(20, lambda: details(os.getpid()))
        assert mine.cmdline
