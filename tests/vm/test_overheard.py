# SPDX-License-Identifier: MIT
"""What engines do not tell, joined to what they do: NAT, domains, and who lived a moment."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from asking import SERVER, ZONE, Client, TlsClient, named, seen, tls_server
from daemons import Daemon
from nameserver import NameServer
from nlproto.client.client import DaemonClient
from talking import looking
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
def test_far_ends_have_the_names_of_dns_answers_and_client_hellos(
    start: Start, tmp_path: Path
) -> None:
    daemon = start("domains: sni\n")
    with (
        NameServer(ZONE, SERVER),
        tls_server(tmp_path),
        socket.create_server(("", 0)) as listener,
        ExitStack() as opened,
    ):
        port = listener.getsockname()[1]
        hunter, end = looking(daemon.path, "domain", "*.example")
        opened.callback(hunter.kill)
        clients: dict[str, Client | TlsClient] = {
            "www.example": Client("www.example", port, "127.0.53.80"),
            "stream.example": Client("stream.example", port, "127.0.53.83", tcp="tcp"),
            "hidden.example": TlsClient("hidden.example"),
        }
        for name, client in clients.items():
            assert named(daemon.path, client, name)
        stranger = Client("", port, "127.0.53.80")
        assert seen(daemon.path, stranger)["domain"] == ""
        for client in (*clients.values(), stranger):
            client.end()
        lines = end().splitlines()
    for name, client in clients.items():
        mine = [one for one in lines if f".{client.port} " in one]
        assert any(f"[{name}]" in one for one in mine), lines
    assert not any(f".{stranger.port} " in one for one in lines)


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
