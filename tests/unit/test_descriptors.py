# SPDX-License-Identifier: MIT
"""Limits of open files: raised, shared out, and given back to programs that are run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHOW = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"


def limited(soft: Any, hard: Any, code: Any) -> Any:
    """What `code` prints in a process that starts with these limits."""
    command = ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-c"]
    done = subprocess.run(
        [*command, f"from nlproto.running import descriptors; {code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_soft_limit_becomes_the_hard_one_and_children_get_the_old_one_back() -> None:
    child = f"subprocess.run([sys.executable, '-c', {SHOW!r}], preexec_fn=descriptors.lower_limit)"
    found = limited(64, 300, f"import subprocess, sys; descriptors.raise_limit(); {child}; {SHOW}")
    assert found == ["64", "300", "300", "300"]


@pytest.mark.parametrize(
    ("limit", "captured"),
    [(24, 1), (256, 6), (1024, 44), (2048, 147), (16384, 256)],
)
def test_network_namespaces_leave_descriptors_for_clients(limit: int, captured: int) -> None:
    (found,) = limited(limit, limit, "print(descriptors.namespaces(256))")
    assert int(found) == captured
    assert captured == 1 or captured * 5 + min(512, limit // 2) < limit


def test_with_too_few_both_programs_end_with_one_line() -> None:
    for program in ("hunter", "daemon"):
        done = subprocess.run(
            ["prlimit", "--nofile=12:12", sys.executable, "-m", program],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        (line,) = done.stderr.strip().split("\n")
        assert "12 open files are too few" in line


def test_a_client_with_many_files_open_waits_for_answers(tmp_path: Path) -> None:
    """select(2) knows no descriptor above 1023."""
    code = """
import os, socket, threading
from nlproto.client.client import DaemonClient
from nlproto.errors import Error
server = socket.socket(socket.AF_UNIX); server.bind('d'); server.listen()
holes = [os.dup(0) for _ in range(1100)]
try:
    DaemonClient('d', timeout=0.1)
except Error as error:
    print(error)
"""
    done = subprocess.run(
        ["prlimit", "--nofile=2048:2048", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "did not answer in 0.1 s" in done.stdout, done.stderr
