# SPDX-License-Identifier: MIT
"""The questions of the fleet to one machine: its daemon's own history answers."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon
from hunter.__main__ import main
from nlproto.filters.words import quote
from waiting import until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")


class Machine:
    """A daemon, what is asked of it, and connections to this process."""

    def __init__(self, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
        self._daemon = daemon
        self._capsys = capsys

    def ask(self, *words: str) -> list[dict[str, Any]]:
        self._capsys.readouterr()
        main(["fleet", *words, "--json", "--socket", self._daemon.path])
        rows: list[dict[str, Any]] = json.loads(self._capsys.readouterr().out)["rows"]
        return rows

    def connect(self, server: socket.socket) -> None:
        """Connect from this process, and wait until both ends are named."""
        port = server.getsockname()[1]
        with socket.create_connection(server.getsockname()[:2]) as client, server.accept()[0]:
            end = client.getsockname()[1]
            until(lambda: self.owners("port", str(port), "and port", str(end)) == [os.getpid()] * 2)

    def owners(self, *words: str) -> list[int]:
        return [row["tgid"] for row in self.ask("who", *words)]


@pytest.fixture(name="machine")
def _machine(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(daemon, capsys)


@pytest.mark.parametrize("family", ["127.0.0.1", "::1"])
def test_new_is_what_the_history_has_not_from_before(machine: Machine, family: str) -> None:
    with listening(family) as old, listening(family) as new:
        machine.connect(old)
        between = time.time()
        until(lambda: time.time() > between + 0.01)
        machine.connect(old)
        machine.connect(new)
        since = ("--since", datetime.fromtimestamp(between).isoformat())
        ports = [server.getsockname()[1] for server in (old, new)]

        def services(kind: str) -> list[int]:
            rows = machine.ask("new", "--of", kind, *since, "--limit", "1000")
            return [row["service"] for row in rows if row["service"] in ports]

        assert {len(machine.owners(f"--port={port}", *since)) for port in ports} == {2}
        assert services("destination") == services("listener") == ports[1:]


def test_conditions_find_what_fits_and_nothing_else(machine: Machine) -> None:
    with listening("127.0.0.1") as server:
        machine.connect(server)
        port, me = server.getsockname()[1], os.getpid()
        parent = Path(f"/proc/{os.getppid()}/comm").read_text().rstrip("\n")
        fits: list[list[str]] = [
            [str(port)],
            [f"udp or port {port}"],
            [f"port {port} and tcp and pid {me}"],
            [f"--port={port}", "--host=127.0.0.0/8", "--proto=tcp", f"--pid={me}"],
            [f"port {port} and parent {quote(parent)}"],
        ]
        for words in fits:
            assert machine.owners(*words) == [me, me], words
        nothing: list[list[str]] = [
            [f"port {port} and udp"],
            [f"--port={port}", "--host=10.0.0.0/8"],
            [f"port {port} and pid 1"],
        ]
        for words in nothing:
            assert machine.owners(*words) == [], words


def listening(address: str) -> socket.socket:
    """A socket on a port below those of clients: by that the history knows who serves."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in range(15_000 + os.getpid() % 10_000, 32_000):
        try:
            return socket.create_server((address, port), family=family)
        except OSError:
            continue
    raise AssertionError("no port is free")
