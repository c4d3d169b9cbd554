# SPDX-License-Identifier: MIT
"""What engines do not tell, joined to what they do: both tuples of NAT, and who lived a moment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon
from nlproto.client.client import DaemonClient
from translating import PUBLISHED, Place, became, flow_of, place
from waiting import until

Start = Callable[..., Daemon]


@pytest.fixture
def start(engine: str, tmp_path: Path, loaded: None) -> Iterator[Start]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    started: list[Daemon] = []

    def begin(config: str = "") -> Daemon:
        started.append(Daemon(tmp_path, "--engine", engine, config=config))
        return started[-1]

    yield begin
    for daemon in started:
        assert daemon.stop() == 0, daemon.text()


@pytest.fixture
def lab(start: Start) -> Iterator[Place]:
    """NAT begins when the daemon is there already."""
    with place() as found:
        yield found


@pytest.mark.parametrize(
    ("engine", "proto", "address", "port", "server"),
    [
        ("module", "tcp", "fd77::1", 8081, "fd88::2"),
        ("ebpf", "udp", "10.77.0.1", 8080, "10.88.0.2"),
    ],
)
def test_who_names_the_process_behind_a_published_port(
    start: Start, lab: Place, engine: str, proto: str, address: str, port: int, server: str
) -> None:
    daemon = start()
    lab.rules(PUBLISHED)
    serving = lab.server("box", 80, proto, server)
    client = lab.client("far", address, port, proto)

    def joined() -> dict[str, Any] | None:
        client.again()  # the daemon may have been too late for the first packets
        with DaemonClient(daemon.path) as asking:
            flows = asking.who(port=port)["flows"]
        return next((one for one in flows if one["pid"] == serving.pid), None)

    flow = until(joined, 30, f"the server behind port {port}")
    assert (flow["local"], flow["lport"], flow["netns"]) == (server, 80, lab.inode("box"))
    assert became(flow) == (address, port, client.address, client.port)
    asked = flow_of(daemon.path, client, port=80)
    assert became(asked) == (client.address, client.port, server, 80)


@pytest.mark.parametrize("engine", ["module", "ebpf"])
def test_names_of_programs_and_parents_that_lived_a_millisecond(start: Start) -> None:
    """/proc is mostly too late for them. Nobody tells their command line."""
    daemon = start()
    pids = set()
    for _ in range(20):
        with subprocess.Popen(["bash", "-c", "echo x > /dev/udp/127.0.0.1/9"]) as child:
            pids.add(child.pid)

    def told() -> dict[int, dict[str, Any]] | None:
        with DaemonClient(daemon.path) as asking:
            answer = asking.who(port=9)
        found = {one["tgid"]: one for one in answer["processes"]}
        senders = {flow["pid"] for flow in answer["flows"] if flow["packets_out"]}
        return found if pids <= senders and pids <= found.keys() else None

    found = until(told, 30, "all that sent")
    bash = os.path.realpath("/bin/bash")
    for pid in pids:
        assert found[pid]["exe"] == bash
        assert found[pid]["ppid"] == os.getpid()
        assert found[pid]["parents"][0]["pid"] == os.getpid()
