# SPDX-License-Identifier: MIT
"""The daemon with engine ebpf: one set of programs for all its readers, and none after it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nlproto.client.client import DaemonClient
from nlproto.engines.bpf import NoBpf
from nlproto.engines.programs import why_in_parts
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it loads programs")


def links() -> int:
    """How many programs are attached, by whomever."""
    count = 0
    for info in Path("/proc").glob("[0-9]*/fdinfo/*"):
        try:
            count += "link_type" in info.read_text()
        except OSError:
            continue
    return count


@pytest.fixture(name="daemon")
def _daemon(start: Any) -> Any:
    try:
        why_in_parts()
    except NoBpf as error:
        pytest.skip(str(error))
    return start("--engine", "ebpf")


def test_readers_share_one_set_of_programs_and_none_outlives_the_daemon(
    daemon: Any, start: Any, directory: Any
) -> None:
    before = links()
    command = [sys.executable, "-m", "hunter", "--socket", daemon.path]
    with ExitStack() as stack:
        for number in range(2):
            reader = stack.enter_context(
                subprocess.Popen([*command, "-qq", "-w", f"{directory}/{number}.jsonl"])
            )
            stack.callback(reader.terminate)
        with DaemonClient(daemon.path) as client:
            until(lambda: client.stats()["clients"]["connected"] >= 3)
            assert client.stats()["engine"] == "ebpf"
        assert links() == before
    daemon.process.kill()
    daemon.process.wait()
    until(lambda: links() < before)
    again = start("--engine", "ebpf")
    with DaemonClient(again.path) as client:
        assert client.stats()["engine"] == "ebpf"
