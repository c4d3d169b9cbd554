# SPDX-License-Identifier: MIT
"""One line says what is missing around a program: /proc, its current directory (root)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from waiting import patient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

HUNTER = [sys.executable, "-m", "hunter"]
DAEMON = [sys.executable, "-m", "daemon", "--engine", "packet"]
PACKETS = [*HUNTER, "--engine", "packet", "--duration", "100ms"]


def one_line(command: Any, **options: Any) -> Any:
    """What it says last, after what it may have said of the daemon that it did not find."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(30), **options)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [[*HUNTER, "who"], PACKETS, DAEMON])
def test_without_proc_it_says_how_to_have_it(command: Any, tmp_path: Path) -> None:
    socket = ["--socket", str(tmp_path / "d.sock")] if command == DAEMON else []
    hide = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    hide += ['mount -t tmpfs none /proc && exec "$@"', "sh"]
    assert "mount -t proc proc /proc" in one_line([*hide, *command, *socket])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*HUNTER, "stats", "--socket", "/nonexistent"], "no daemon answers at /nonexistent"),
        ([*PACKETS, "--save", "x.csv"], "cannot write x.csv"),
        ([*DAEMON, "--socket", "x"], "the current directory was removed"),
    ],
)
def test_in_a_directory_that_was_removed_it_says_one_line(
    command: list[Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    shell = ["sh", "-c", 'cd gone && rmdir ../gone && exec "$@"', "sh"]
    command = [command[0], "-I", *command[1:]]  # what is installed starts so
    assert words in one_line([*shell, *command], cwd=tmp_path)
