# SPDX-License-Identifier: MIT
"""One connection behind NAT, not three: a published port, masquerade, hairpin, as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon
from talking import looking
from translating import PUBLISHED, ask, became, flow_of, place
from waiting import there, until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture(name="namespaces", scope="module")
def _namespaces() -> Iterator[Any]:
    with place() as found:
        found.rules(PUBLISHED)
        yield found


@pytest.fixture(name="lab")
def _lab(namespaces: Any) -> Iterator[Any]:
    yield namespaces
    namespaces.end_all()


def flows(daemon: Any, **question: Any) -> Any:
    return ask(daemon.path, **question)


def of(daemon: Any, process: Any, **question: Any) -> Any:
    return flow_of(daemon.path, process, **question)


@pytest.mark.parametrize(
    ("proto", "address", "port", "server"),
    [
        ("tcp", "10.77.0.1", 8080, "10.88.0.2"),
        ("udp", "10.77.0.1", 8080, "10.88.0.2"),
        ("tcp", "fd77::1", 8081, "fd88::2"),
    ],
)
def test_who_names_the_process_behind_a_published_port(
    daemon: Daemon, lab: Any, proto: str, address: str, port: int, server: str
) -> None:
    serving = lab.server("box", 80, proto, server)
    client = lab.client("far", address, port, proto)
    flow = of(daemon, serving, port=port)
    assert (flow["local"], flow["lport"]) == (server, 80)
    assert became(flow) == (address, port, client.address, client.port)
    assert flow["netns"] == lab.inode("box")
    asked = of(daemon, client, port=80)
    assert (asked["remote"], asked["rport"]) == (address, port)
    assert became(asked) == (client.address, client.port, server, 80)


HUNTER = [sys.executable, "-m", "hunter"]


def test_lines_have_both_addresses_and_filters_match_either(daemon: Daemon, lab: Any) -> None:
    serving = lab.server("box", 80, address="10.88.0.2")
    lab.client("far", "10.77.0.1", 8080)  # the daemon follows the namespaces then
    of(daemon, serving, port=8080)
    process, end = looking(daemon.path, "port", "8080", "and", "pname", "python*")
    client = lab.client("far", "10.77.0.1", 8080)
    client.again()
    until(lambda: of(daemon, serving, port=client.port))
    lines = end().splitlines()
    outside = f"{client.address}.{client.port}"
    there = f"out tcp 10.88.0.2.80 (nat 10.77.0.1.8080) > {outside} "
    back = f"in  tcp {outside} > 10.88.0.2.80 (nat 10.77.0.1.8080) "
    for part, pid in ((there, serving.pid), (back, serving.pid)):
        assert any(part in line and f".{pid}" in line for line in lines), lines
    asks = f"out tcp {outside} > 10.77.0.1.8080 (nat 10.88.0.2.80) "
    assert any(asks in line and f".{client.pid}" in line for line in lines), lines
    assert process.returncode == 0


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "pcapng", "ecs.jsonl"])
def test_saved_addresses_are_read_again(
    daemon: Daemon, lab: Any, tmp_path: Path, ending: str
) -> None:
    serving = lab.server("box", 80, address="10.88.0.2")
    lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=8080)
    saved = str(tmp_path / f"nat.{ending}")
    words = ["-w", saved] if ending == "pcapng" else ["--save", saved]
    _, end = looking(daemon.path, "--print", *words, "host", "10.88.0.2")
    client = lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=client.port)
    end()
    read = [*HUNTER, "-r", saved, "--json", "port 8080 and dst port 80"]
    rows = [json.loads(line) for line in subprocess.check_output(read, text=True).splitlines()]
    mine = [one for one in rows if one["pid"] == serving.pid and one["sport"] == client.port]
    assert mine
    for row in mine:
        assert (row["nat_src"], row["nat_sport"]) == (client.address, client.port)
        assert (row["nat_dst"], row["nat_dport"]) == ("10.77.0.1", 8080)


def who(daemon: Any, *words: Any) -> Any:
    """What `who` prints, in one line for each row."""

    def shown() -> Any:
        done = subprocess.run(
            [*HUNTER, "who", "--socket", daemon.path, *words],
            env={**os.environ, "COLUMNS": "300"},
            capture_output=True,
            text=True,
        )
        assert not done.returncode or "did not answer in" in done.stderr, done.stderr
        return not done.returncode and done

    return until(shown).stdout.splitlines()


def test_who_shows_one_connection_with_both_addresses(daemon: Daemon, lab: Any) -> None:
    serving = lab.server("box", 80, address="10.88.0.2")
    client = lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=client.port)
    of(daemon, client, port=client.port)
    until(lambda: any(one["forwarded"] for one in flows(daemon, port=client.port)))

    def now() -> Any:
        lines = who(daemon, "--port", "8080")
        until_seen = next((at for at, line in enumerate(lines) if line.strip() == "seen"), None)
        held = [line for line in lines[:until_seen] if f".{serving.pid}" in line]
        return (held, lines[until_seen:]) if held else None

    held, seen = until(now, 20, "its socket of now")
    assert "10.88.0.2.80 <> 10.77.0.2" in held[0] and " 10.77.0.1.8080 " in held[0]
    (row,) = [line for line in seen if f".{serving.pid}" in line and "10.88.0.2.80" in line]
    assert " 10.77.0.1.8080 " in row
    (row,) = [line for line in seen if f".{client.pid}" in line and "10.77.0.1.8080" in line]
    assert "<> 10.88.0.2.80" in row
    # what passes through the host is theirs
    assert not [line for line in seen if "forwarded" in line and str(client.port) in line]


def test_masquerade_is_seen_from_both_sides(daemon: Daemon, lab: Any) -> None:
    """A container that asks the world: by its own address, and by its host's."""
    serving = lab.server("far", 443, address="10.77.0.2")
    client = lab.client("box", "10.77.0.2", 443)
    asks = of(daemon, client, port=443)
    assert (asks["local"], asks["remote"]) == ("10.88.0.2", "10.77.0.2")
    assert asks["nat_local"] == "10.77.0.1"
    answers = of(daemon, serving, host="10.88.0.2")
    assert (answers["remote"], answers["rport"]) == ("10.77.0.1", asks["nat_lport"])
    assert became(answers) == ("10.77.0.2", 443, "10.88.0.2", client.port)
    assert of(daemon, client, port=asks["nat_lport"])["pid"] == client.pid


def test_a_container_that_asks_itself_by_its_published_port(daemon: Daemon, lab: Any) -> None:
    """Hairpin: both ends change."""
    serving = lab.server("box", 80, address="10.88.0.2")
    client = lab.client("box", "10.77.0.1", 8080)
    asks = of(daemon, client, port=8080)
    assert (asks["remote"], asks["rport"]) == ("10.77.0.1", 8080)
    assert (asks["nat_local"], asks["nat_remote"], asks["nat_rport"]) == (
        "10.88.0.1", "10.88.0.2", 80)  # fmt: skip
    answers = of(daemon, serving, port=8080)
    assert (answers["remote"], answers["rport"]) == ("10.88.0.1", asks["nat_lport"])
    assert became(answers) == ("10.77.0.1", 8080, "10.88.0.2", client.port)


@pytest.mark.parametrize("address", ["10.77.0.1", "127.0.0.1"])
def test_a_process_of_the_host_that_asks_its_own_published_port(
    daemon: Daemon, lab: Any, address: str
) -> None:
    """What leaves has the addresses behind NAT; its socket has those before."""
    serving = lab.server("box", 80, address="10.88.0.2")
    client = lab.client("host", address, 8080)

    def asks() -> Any:
        client.again()
        return [one for one in flows(daemon, port=client.port) if one["pid"] == client.pid]

    asked = until(asks, 20, "its own flow")[0]
    assert (asked["remote"], asked["rport"]) == ("10.88.0.2", 80)
    assert became(asked)[2:] == (address, 8080)
    assert of(daemon, serving, port=8080)["nat_lport"] == 8080


def test_a_port_that_leads_to_another_of_the_host(daemon: Daemon, lab: Any) -> None:
    serving = lab.server("host", 9090)
    client = lab.client("far", "10.77.0.1", 8082)

    def served() -> Any:
        client.again()
        return [one for one in flows(daemon, port=8082) if one["pid"] == serving.pid]

    assert {one["packets_out"] > 0 for one in until(served, 20, "its own flow")} == {True}


def test_a_proxy_of_the_runtime_has_not_what_is_translated(daemon: Daemon, lab: Any) -> None:
    """It listens on the published port, and packets from outside never reach it."""
    lab.start("host", PROXY, "0.0.0.0", 8080)
    serving = lab.server("box", 80, address="10.88.0.2")
    client = lab.client("far", "10.77.0.1", 8080)

    def served() -> Any:
        client.again()
        found = flows(daemon, port=client.port)
        mine = [one for one in found if one["pid"] == serving.pid]
        return found if mine and any(one["forwarded"] for one in found) else None

    found = until(served, 20, "the flow of the server")
    assert {one["pid"] for one in found} == {serving.pid, client.pid, None}
    assert {one["how"] for one in found if one["pid"] is None} == {"forwarded"}


INNER = """
chain pre {
  type nat hook prerouting priority -100
  tcp dport 80 dnat ip to 10.99.0.2:80
}
"""


def test_what_is_translated_twice_has_the_last_ends(daemon: Daemon) -> None:
    """A published port whose container publishes another one's."""
    with place(inner=True) as lab:
        lab.rules(PUBLISHED)
        lab.rules(INNER, "box")
        serving = lab.server("inner", 80, address="10.99.0.2")
        client = lab.client("far", "10.77.0.1", 8080)

        def twice() -> Any:
            client.again()
            found = [one for one in flows(daemon, port=8080) if one["pid"] == serving.pid]
            return [one for one in found if one["nat_lport"] == 8080]

        (flow,) = until(twice, 20, "the flow with both translations")
        assert became(flow) == ("10.77.0.1", 8080, client.address, client.port)
        (asked,) = [one for one in flows(daemon, port=8080) if one["pid"] == client.pid]
        assert became(asked)[2:] == ("10.99.0.2", 80)


def test_what_one_user_translates_is_not_told_of_another(daemon: Daemon, lab: Any) -> None:
    """A namespace of somebody else's with the same tuples claims nothing."""
    serving = lab.server("box", 80, address="10.88.0.2")
    client = lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=8080)
    stranger = subprocess.Popen(
        [sys.executable, "-c", STRANGER, str(client.port)], stdout=subprocess.PIPE, text=True
    )
    try:
        if not (line := there(stranger.stdout).readline()):
            pytest.skip("users may not make namespaces here")
        pid = int(line)
        until(lambda: [one for one in flows(daemon, port=client.port) if one["netns"] not in
                       map(lab.inode, ("host", "box", "far"))])  # fmt: skip
        others = [one for one in flows(daemon, port=client.port) if one["pid"] == pid]
        assert others and {one["nat_lport"] for one in others} == {None}
        assert pid not in {one["pid"] for one in flows(daemon, port=8080)}
    finally:
        stranger.kill()
        stranger.communicate()


STRANGER = """
import ctypes, os, socket, subprocess, sys, time
libc, port = ctypes.CDLL(None), int(sys.argv[1])
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
if libc.unshare(0x10000000 | 0x40000000):  # CLONE_NEWUSER, CLONE_NEWNET
    sys.exit()
libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its uid_map is its own again
open("/proc/self/uid_map", "w").write("0 65534 1")
for words in ("link set lo up", "addr add 10.88.0.2/32 dev lo", "addr add 10.77.0.2/32 dev lo"):
    subprocess.run(["ip", *words.split()], check=True)
with socket.create_server(("10.88.0.2", 80)) as server, socket.socket() as peer:
    peer.bind(("10.77.0.2", port))
    peer.connect(("10.88.0.2", 80))
    other, _ = server.accept()
    print(os.getpid(), flush=True)
    while True:
        peer.send(b"x"), other.recv(1), other.send(b"x"), peer.recv(1)
        time.sleep(0.05)
"""


PROXY = """
import ctypes, socket, sys, threading
ctypes.CDLL(None).prctl(15, b"docker-proxy")
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print(sys.argv[2], flush=True)
def pour(one, other):
    while data := one.recv(100):
        other.sendall(data)
while True:
    peer, _ = server.accept()
    beyond = socket.create_connection(("10.88.0.2", 80))
    for pair in ((peer, beyond), (beyond, peer)):
        threading.Thread(target=pour, args=pair, daemon=True).start()
"""


def test_who_shows_the_process_behind_a_proxy_of_the_runtime(daemon: Daemon, lab: Any) -> None:
    serving = lab.server("box", 80, address="10.88.0.2")
    proxy = lab.start("host", PROXY, "10.77.0.1", 9000)
    client = lab.client("far", "10.77.0.1", 9000)
    of(daemon, proxy, port=9000)
    of(daemon, serving, port=80)
    client.again()

    def rows() -> Any:
        lines = who(daemon, "--port", "9000")
        found = [line for line in lines if f".{serving.pid}" in line and "10.88.0.2.80" in line]
        return found if any(f".{proxy.pid}" in line for line in lines) and found else None

    (row,) = until(rows, 20, "the server behind the proxy")
    assert f"behind docker-proxy.{proxy.pid}" in row


def test_a_capture_of_the_uplink_names_the_process_in_the_container(
    daemon: Daemon, lab: Any, tmp_path: Path
) -> None:
    serving = lab.server("box", 80, address="10.88.0.2")
    client = lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=8080)
    capture, named = tmp_path / "uplink.pcap", tmp_path / "named.pcapng"
    dump = subprocess.Popen(
        ["ip", "netns", "exec", lab.names["host"], "tcpdump", "--immediate-mode", "-U", "-i", "far",
         "-c", "2", "-w", capture, "tcp", "port", "8080"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "listening on" not in (line := there(dump.stderr).readline()):
        assert line, "tcpdump ended at once"
    client.again()
    assert dump.wait(30) == 0
    until(lambda: of(daemon, serving, port=8080)["packets_in"] > 4)
    command = [*HUNTER, "annotate", str(capture), "-o", str(named), "--socket", daemon.path]
    subprocess.run(command, check=True, capture_output=True)
    assert f"python.{serving.pid}".encode() in named.read_bytes()
