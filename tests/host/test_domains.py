# SPDX-License-Identifier: MIT
"""Far ends have the names that the process asked for: real servers and clients on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asking import FALSE, SERVER, ZONE, Client, TlsClient, named, stub, tls_server
from asking import seen as flow_seen
from daemons import Daemon, StartDaemon
from nameserver import AAAA, NameServer
from nlproto.client.client import DaemonClient
from talking import looking
from translating import ask, place
from waiting import there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")


@pytest.fixture(name="listener", scope="module")
def _listener() -> Iterator[Any]:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(name="served", autouse=True, scope="module")
def _served() -> Iterator[None]:
    with NameServer(ZONE, SERVER, false=FALSE):
        yield


@pytest.fixture(name="connect")
def _connect(listener: Any) -> Iterator[Any]:
    clients = []

    def connect(name: Any, address: Any, **more: Any) -> Any:
        clients.append(Client(name, listener, address, **more))
        return clients[-1]

    yield connect
    for client in clients:
        client.end()


def seen(daemon: Any, client: Any) -> Any:
    return flow_seen(daemon.path, client)


@pytest.mark.parametrize(
    ("name", "address", "more"),
    [
        ("www.example", "127.0.53.80", {}),
        ("WWW.eXample", "127.0.53.80", {}),
        ("alias.example", "127.0.53.81", {}),
        ("six.example", "::1", {"kind": AAAA}),
        ("stream.example", "127.0.53.83", {"tcp": "tcp"}),
    ],
)
def test_a_far_end_has_the_name_that_the_process_asked_for(
    daemon: Daemon, connect: Any, name: str, address: str, more: dict[str, Any]
) -> None:
    client = connect(name, address, **more)
    assert named(daemon.path, client, name.lower())
    stranger = connect("", address)
    assert seen(daemon, stranger)["domain"] == ""
    with DaemonClient(daemon.path) as asking:
        heard = asking.stats()["domains"]
    assert heard["names"] and heard["dropped"] == 0


def test_an_address_of_a_name_that_nobody_asked_for_has_none(daemon: Daemon, connect: Any) -> None:
    assert seen(daemon, connect("other.example", "127.0.53.82"))["domain"] == ""


def test_an_answer_without_the_questions_id_gives_no_name(daemon: Daemon, connect: Any) -> None:
    assert named(daemon.path, connect("www.example", "127.0.53.80"), "www.example")
    assert seen(daemon, connect("www.example", "127.0.53.86"))["domain"] == ""


def test_who_asks_the_systems_resolver_has_the_name_itself(daemon: Daemon, connect: Any) -> None:
    """And who asks it without DNS, as nss-resolve does, has what the resolver asked for."""
    with stub("127.0.0.53", 53, SERVER, "systemd-resolve"):
        client = connect("shared.example", "127.0.53.84", server="127.0.0.53")
        assert named(daemon.path, client, "shared.example")
        silent = connect("", "127.0.53.84")
        assert named(daemon.path, silent, "shared.example")


DOCKERD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from nameserver import A, NameServer
with NameServer({"far.example": [("far.example", A, 300, "10.77.0.2")]}, "127.0.0.11", 5333):
    print(5333, flush=True)
    time.sleep(1000)
"""

DOCKER = """
chain out {
  type nat hook output priority -100
  ip daddr 127.0.0.11 udp dport 53 dnat ip to 127.0.0.11:5333
}
chain post {
  type nat hook postrouting priority 100
  ip saddr 127.0.0.11 udp sport 5333 snat ip to 127.0.0.11:53
}
"""


@pytest.mark.parametrize("stay", [True, False], ids=["it stays", "it ends at once"])
def test_who_asks_dockers_resolver_has_the_name(daemon: Daemon, stay: bool) -> None:
    """127.0.0.11 answers from another port of the container's own namespace, behind NAT."""
    with place() as lab:
        lab.rules(DOCKER, "box")
        lab.start("box", DOCKERD, Path(__file__).parents[1])
        serving = lab.server("far", 443, address="10.77.0.2")
        inside = ["ip", "netns", "exec", lab.names["box"]]

        pids = set()

        def asks() -> Any:
            """Once more where the daemon has just found the namespaces."""
            client = Client(
                "far.example", serving.port, "10.77.0.2", server="127.0.0.11", stay=stay,
                inside=inside,
            )  # fmt: skip
            pids.add(client.process.pid)
            flows = ask(daemon.path, port=serving.port)
            client.end()
            return [one for one in flows if one["pid"] in pids and one["domain"]]

        assert {one["domain"] for one in until(asks, 30, "the name")} == {"far.example"}


def test_a_name_ends_with_its_time_to_live(daemon: Daemon, connect: Any) -> None:
    in_time = connect("short.example", "127.0.53.85")
    late = connect("short.example", "127.0.53.85", wait=6.5)
    assert named(daemon.path, in_time, "short.example")
    assert seen(daemon, late)["domain"] == ""


def test_names_are_in_the_file_of_the_history(
    start: StartDaemon, connect: Any, tmp_path: Path
) -> None:
    daemon = start(config=f"history: {tmp_path}/history.db\n")
    client = connect("www.example", "127.0.53.80")
    assert named(daemon.path, client, "www.example")
    assert daemon.stop(signal.SIGTERM) == 0
    again = start(config=f"history: {tmp_path}/history.db\n")
    assert named(again.path, client, "www.example")


def test_lines_and_filters_have_the_name(daemon: Daemon, connect: Any) -> None:
    process, end = looking(daemon.path, "domain", "example")
    client = connect("www.example", "127.0.53.80")
    first = there(process.stdout).readline()
    rest = end()
    assert f" 127.0.53.80.{client.peer} [www.example]" in first
    assert all("[www.example]" in line for line in rest.splitlines())


def test_saved_names_are_read_again(daemon: Daemon, connect: Any, tmp_path: Path) -> None:
    saved = str(tmp_path / "names.pcapng")
    process, end = looking(daemon.path, "--print", "-w", saved, "domain", "alias.example")
    connect("alias.example", "127.0.53.81")
    assert there(process.stdout).readline()
    end()
    read = [sys.executable, "-m", "hunter", "-r", saved, "--json", "domain", "*.example"]
    rows = [json.loads(line) for line in subprocess.check_output(read, text=True).splitlines()]
    assert rows and {row["domain"] for row in rows} == {"alias.example"}


def test_who_asks_by_name(daemon: Daemon, connect: Any) -> None:
    client = connect("www.example", "127.0.53.80")
    assert named(daemon.path, client, "www.example")
    words = [sys.executable, "-m", "hunter", "who", "--socket", daemon.path]
    answer = json.loads(subprocess.check_output([*words, "--domain", "WWW.example.", "--json"]))
    assert {flow["pid"] for flow in answer["flows"]} >= {client.process.pid}
    assert {flow["domain"] for flow in answer["flows"]} == {"www.example"}
    shown = subprocess.check_output([*words, "--domain", "www.example"], text=True)
    assert "www.example" in shown


@pytest.fixture(name="tls", scope="module")
def _tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tls_server(tmp_path_factory.mktemp("tls")):
        yield


@pytest.mark.parametrize("protocols", [0, 20, 60])
def test_who_speaks_tls_has_the_name_of_its_client_hello(
    start: StartDaemon, tls: None, protocols: int
) -> None:
    """A real ClientHello, of 500 bytes to 15 KiB; without a name it has none.

    A ring has 4 KiB for a packet, and over `lo` a packet may have them all.
    """
    daemon = start(config="domains: sni\n")
    for name in ("Hidden.example", ""):
        client = TlsClient(name, protocols)
        assert named(daemon.path, client, name.lower())
        client.end()


def test_tls_is_not_looked_at_unless_it_is_asked_for(daemon: Daemon, tls: None) -> None:
    client = TlsClient("hidden.example")
    assert seen(daemon, client)["domain"] == ""
    client.end()
