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
from nlproto.host.hashes import Hashes
from places import open_to_all
from waiting import patient, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")

UID = 61_321
SCRIPT = Path(__file__).parents[1] / "stuck.py"
HANGING = SCRIPT.with_name("hanging.py")


@contextlib.contextmanager
def stuck(directory: Path, uid: int = UID, script: Path = SCRIPT) -> Iterator[int]:
    home = open_to_all(directory) / str(uid)
    home.mkdir()
    os.chown(home, uid, uid)
    one = subprocess.Popen(
        [sys.executable, str(script), str(uid), str(home)],
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


def test_a_program_that_cannot_be_opened_holds_up_no_other_hash(tmp_path: Path) -> None:
    """Whoever opens it cannot even be killed: the daemon did not end."""
    told: list[int] = []
    with stuck(tmp_path, script=HANGING) as pid, Hashes(lambda tgid, *_: told.append(tgid)) as one:
        assert os.readlink(f"/proc/{pid}/exe").endswith("/top/program")
        opening = subprocess.Popen(["head", "-c1", f"/proc/{pid}/exe"], stdout=subprocess.PIPE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert opening.wait(1) == -1, "it can be opened: this test shows nothing"
        one.ask(pid, 1, "x")
        one.ask(os.getpid(), 2, "y")
        until(lambda: told == [os.getpid()], 10)
    opening.wait(patient(20))
