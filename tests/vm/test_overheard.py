# SPDX-License-Identifier: MIT
"""What engines do not tell, joined to what they do: both tuples of NAT, names of far ends."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon
from nameserver import NameServer
from nlproto.client.client import DaemonClient
from translating import PUBLISHED, Place, became, flow_of, place
from waiting import until

Start = Callable[..., Daemon]

ZONE = {"www.example": [("www.example", 1, 300, "127.0.53.80")]}
ASK = """
import socket, sys
from nameserver import ask
address, port, server, tcp, hello = sys.argv[1:6]
if server:
    ask("www.example", 1, server, tcp == "tcp")
with socket.create_connection((address, int(port))) as peer:
    peer.send(bytes.fromhex(hello) or b"x")
    print(peer.getsockname()[1], flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["module", "ebpf"])
def start(request: pytest.FixtureRequest, tmp_path: Path, loaded: None) -> Iterator[Start]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    started: list[Daemon] = []

    def begin(config: str = "") -> Daemon:
        started.append(Daemon(tmp_path, "--engine", request.param, config=config))
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
    ("proto", "address", "port", "server"),
    [
        ("tcp", "10.77.0.1", 8080, "10.88.0.2"),
        ("udp", "10.77.0.1", 8080, "10.88.0.2"),
        ("tcp", "fd77::1", 8081, "fd88::2"),
    ],
)
def test_who_names_the_process_behind_a_published_port(
    start: Start, lab: Place, proto: str, address: str, port: int, server: str
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


class Asker:
    """A process that asks a name server, then connects."""

    def __init__(self, port: int, address: str, server: str = "", tcp: str = "", hello: str = ""):
        self.child = subprocess.Popen(
            [sys.executable, "-c", ASK, address, str(port), server, tcp, hello],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.child.stdout is not None
        self.pid, self.port = self.child.pid, int(self.child.stdout.readline())

    def domain(self, daemon: Daemon) -> str:
        with DaemonClient(daemon.path) as asking:
            flows = asking.who(port=self.port)["flows"]
        return next((one["domain"] for one in flows if one["pid"] == self.pid), "")

    def end(self) -> None:
        self.child.communicate(b"\n", timeout=60)


def wait_for_name(daemon: Daemon, asker: Asker, name: str) -> None:
    until(lambda: asker.domain(daemon) == name, 20, f"{name} of {asker.child.args!r}")


def hello_to(name: str) -> str:
    """The first message of a client of TLS, in hexadecimal."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read().hex()


def test_far_ends_have_the_names_that_processes_asked_for(start: Start) -> None:
    """Of a server by UDP and TCP, of docker's (behind DNAT), and by TLS alone."""
    daemon = start("domains: sni\n")
    rules = (
        "table ip dns { chain out { type nat hook output priority -100;"
        " ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:5353; }; }"
    )
    with ExitStack() as stack:
        subprocess.run(["nft", rules], check=True)
        stack.callback(subprocess.run, ["nft", "delete table ip dns"], check=True)
        stack.enter_context(NameServer(ZONE, "127.0.0.53"))
        stack.enter_context(NameServer(ZONE, "127.0.0.11", 5353))
        listener = stack.enter_context(socket.create_server(("127.0.53.80", 0)))
        tls = stack.enter_context(socket.create_server(("127.0.53.80", 443)))
        port = listener.getsockname()[1]

        def asker(*words: Any, **more: Any) -> Asker:
            found = Asker(*words, **more)
            stack.callback(found.end)
            return found

        for server, tcp in (("127.0.0.53", ""), ("127.0.0.53", "tcp"), ("127.0.0.11", "")):
            wait_for_name(daemon, asker(port, "127.0.53.80", server, tcp), "www.example")
        stranger = asker(port, "127.0.53.80")
        said = asker(tls.getsockname()[1], "127.0.53.80", hello=hello_to("tls.example"))
        wait_for_name(daemon, said, "tls.example")
        assert stranger.domain(daemon) == ""
        with DaemonClient(daemon.path) as asking:
            assert asking.stats()["domains"]["dropped"] == 0, json.dumps(asking.stats()["domains"])
