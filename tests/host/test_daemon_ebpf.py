# SPDX-License-Identifier: MIT
"""The daemon with engine ebpf: one set of programs for all its readers, and none after it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from daemons import StartDaemon, send
from loading import links
from nlproto.client.client import DaemonClient
from nlproto.engines.bpf_programs import why_in_parts
from nlproto.kernel.bpf import NoBpf
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it loads programs")


@pytest.fixture(name="daemon")
def _daemon(start: StartDaemon) -> Any:
    try:
        why_in_parts()
    except NoBpf as error:
        pytest.skip(str(error))
    return start("--engine", "ebpf")


def test_readers_share_one_set_of_programs_and_none_outlives_the_daemon(
    daemon: Any, start: StartDaemon, directory: Path
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


def test_one_daemon_follows_another_and_knows_what_that_one_saw(
    daemon: Any, start: StartDaemon, directory: Path, receiver: socket.socket
) -> None:
    """As at an upgrade: programs of both may be there at once, the history is the same."""
    daemon.stop()
    arguments, config = ("--engine", "ebpf"), f"history: {directory}/history.db\n"
    first = start(*arguments, config=config)
    port = receiver.getsockname()[1]
    send(port)
    # a reader of its own beside it
    command = [sys.executable, "-m", "hunter", "--engine", "ebpf", "-n", "-c", "1"]
    command += ["udp", "port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as own:
        assert own.stderr is not None and own.stdout is not None
        while "showing" not in own.stderr.readline():
            pass
        send(port)
        assert str(port) in own.stdout.read()
    # a reader that comes too early gets an error, and changes nothing
    early = [sys.executable, "-I", "-m", "daemon", *arguments, "--foreground"]
    refused = subprocess.run(
        [*early, "--socket", first.path, "--config", str(first.config)],
        capture_output=True,
        text=True,
    )
    assert refused.returncode and f"pid {first.process.pid}" in refused.stderr
    assert first.stop() == 0
    second = start(*arguments, config=config)
    send(port)
    with DaemonClient(second.path) as client:
        until(lambda: packets(client, port) >= 3)


def packets(client: DaemonClient, port: int) -> int:
    """What the daemon knows of as received there, by any sender, in the last minutes."""
    flows = client.who(port=port, since=600)["flows"]
    return sum(flow["packets_in"] for flow in flows if flow["lport"] == port)
