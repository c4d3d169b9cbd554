# SPDX-License-Identifier: MIT
"""who "now": sockets that a process has, with their far end; not what it has closed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.client.client import DaemonClient
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.host.sockdiag import SockDiag, TcpState
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

ALONE = pytest.mark.skipif(os.path.exists(DEFAULT_SOCKET), reason="a daemon serves this machine")

NOW = time.time()
HUNTER = [sys.executable, "-m", "hunter"]
SERVER, NEAR, FAR = "127.0.7.7", "127.0.7.22", "127.0.7.9"

CLOSES_FIRST = """
import socket, sys
with socket.socket() as peer:
    peer.bind((sys.argv[1], 0))
    peer.connect((sys.argv[2], int(sys.argv[3])))
    peer.sendall(b"x")
    sys.stdin.readline()
"""


def start(path: Any, *words: Any) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "--engine", "packet", "--socket", path, "--foreground"],
        stderr=subprocess.DEVNULL,
    )
    until(path.exists)
    return process


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("daemon") / "d.sock"
    process = start(path)
    yield path
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.fixture
def server() -> Iterator[Any]:
    with socket.create_server((SERVER, 0)) as listener:
        yield listener


def who(path: Any, *words: Any) -> Any:
    """`path`: the daemon's; None: there is none, and none is asked for."""
    served = [] if path is None else ["--socket", path]
    done = subprocess.run(
        [*HUNTER, "who", *served, "--json", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert done.returncode == (0 if answer["owners"] or answer["flows"] else 1)
    return answer


def closed_first(port: int) -> Any:
    """The pid of a client that has closed its connection first and is gone: TIME_WAIT is left."""
    words = [FAR, SERVER, str(port)]
    client = subprocess.Popen(
        [sys.executable, "-c", CLOSES_FIRST, *words], stdin=subprocess.PIPE, text=True
    )
    return client


@pytest.mark.parametrize("served", [True, pytest.param(False, marks=ALONE)])
def test_a_closed_connection_is_nobodys_now(served: bool, daemon: Any, server: Any) -> None:
    path = daemon if served else None
    port = server.getsockname()[1]
    client = closed_first(port)
    peer, (_, cport) = server.accept()
    with peer:
        peer.recv(1)

        def has() -> list[Any]:
            owners = who(path, "--port", cport)["owners"]
            return [one for one in owners if one["pid"] == client.pid and one["port"] == cport]

        (one,) = until(has)
        assert (one["remote"], one["rport"], one["state"]) == (SERVER, port, "established")
        client.communicate("\n")
        assert peer.recv(1) == b""
    with SockDiag() as diag:
        table = diag.dump((socket.IPPROTO_TCP,), lport=cport)
    assert [int(row["state"]) for row in table] == [TcpState.TIME_WAIT]
    until(lambda: not has(), seconds=5)
    for words in (["--port", cport], ["--host", FAR], ["--host", SERVER], ["--port", port]):
        owners = who(path, *words)["owners"]
        assert client.pid not in [one["pid"] for one in owners], words
        assert None not in [one["pid"] for one in owners], words


@pytest.mark.parametrize("served", [True, pytest.param(False, marks=ALONE)])
def test_host_is_the_far_end(served: bool, daemon: Any, server: Any) -> None:
    """Of an idle connection that is older than the question, and whoever's address is the near."""
    path = daemon if served else None
    port = server.getsockname()[1]
    with socket.create_connection((SERVER, port), source_address=(NEAR, 0)) as near:
        peer, _ = server.accept()
        with peer:
            mine = (NEAR, near.getsockname()[1], SERVER, port)
            for host, wanted in ((SERVER, mine), (NEAR, (*mine[2:], *mine[:2]))):

                def seen(host: Any = host) -> Any:
                    owners = who(path, "--host", host)["owners"]
                    ends = {
                        (one["address"], one["port"], one["remote"], one["rport"])
                        for one in owners
                        if one["pid"] == os.getpid()
                    }
                    return ends

                assert until(seen) == {wanted}


def test_every_connection_of_a_process_is_there_and_a_cut_is_told(daemon: Any, server: Any) -> None:
    port = server.getsockname()[1]
    pairs = []
    for _ in range(60):
        one = socket.create_connection((SERVER, port))
        pairs += [one, server.accept()[0]]
    with DaemonClient(daemon) as client:
        whole = until(
            lambda: answer if (answer := client.who(port=port))["owners_total"] == 121 else None
        )
        assert len(whole["owners"]) == 121
        assert {one["pid"] for one in whole["owners"]} == {os.getpid()}
        cut = client.who(port=port, limit=10)
        assert (len(cut["owners"]), cut["owners_total"]) == (10, 121)
        assert client.who(pid=os.getpid())["owners_total"] >= 121
    for one in pairs:
        one.close()


def test_a_daemon_that_has_just_started_is_not_asked_in_vain(tmp_path: Path) -> None:
    """Its first look at many sockets takes a while."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(1500)]
    for one in sockets:
        one.bind((SERVER, 0))
    last = sockets[-1].getsockname()[1]
    path = tmp_path / "d.sock"
    process = start(path)
    try:
        owners = who(path, "--port", last)["owners"]
        assert [one["pid"] for one in owners] == [os.getpid()]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        for one in sockets:
            one.close()


def words_of(path: Any, *words: Any) -> Any:
    served = [] if path is None else ["--socket", path]
    done = subprocess.run(
        [*HUNTER, "who", *served, *map(str, words)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("served", [True, pytest.param(False, marks=ALONE)])
def test_without_a_question_it_is_what_listens(served: bool, daemon: Any, server: Any) -> None:
    path = daemon if served else None
    port = server.getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((SERVER, 0))
        mine = {("tcp", port), ("udp", udp.getsockname()[1])}
        with socket.create_connection((SERVER, port)):

            def listen() -> bool:
                answer = who(path)
                assert answer["flows"] == [] and all(one["listening"] for one in answer["owners"])
                return mine <= {
                    (one["proto"], one["port"])
                    for one in answer["owners"]
                    if one["pid"] == os.getpid() and one["address"] == SERVER
                }

            until(listen)
            told = [line for line in words_of(path).splitlines() if f"{SERVER}.{port}" in line]
            assert len(told) == 1 and f".{os.getpid()} " in told[0] and " root" in told[0]


def test_sums_by_name_and_a_time_that_is_over(daemon: Any, server: Any) -> None:
    port = server.getsockname()[1]
    name = Path("/proc/self/comm").read_text().strip()
    with socket.create_connection((SERVER, port)) as near, server.accept()[0] as far:
        near.sendall(b"x" * 1000)
        far.recv(1000)

        def sums() -> Any:
            found = json.loads(words_of(daemon, port, "--by", "name", "--json"))["groups"]
            return found if found and found[0]["bytes"] > 1000 and found[0]["sockets"] else None

        (group,) = until(sums)
        assert group["name"] == name and group["sockets"] == 3 and group["processes"] == 1
        assert group["flows"] == 2 and NOW - 60 < group["first"] <= group["last"]
        assert f"{name} " in words_of(daemon, port, "--by", "name")
        began = until(lambda: who(daemon, "--port", port, "--since", "60s")["flows"])[0]["first"]
        over = max(0.0, time.time() - began) + 60
        for words in (["--until", f"{over:.3f}s"], ["--since", "1d", "--until", f"{over:.3f}s"]):
            answer = who(daemon, "--port", port, *words)
            assert answer["owners"] == [] and answer["flows"] == []
        answer = who(daemon, "--port", port, "--until", "1ms")
        assert answer["owners"] == [] and len(answer["flows"]) == 2


def test_the_same_port_in_two_namespaces_is_told_apart(daemon: Any, server: Any) -> None:
    """`--netns` takes a pid; the name of the namespace is that of `ip netns`."""
    port = server.getsockname()[1]
    program = (
        f"import socket, sys; s = socket.create_server(('{SERVER}', {port})); sys.stdin.read()"
    )
    inside = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
        + [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
    )
    try:
        both = until(
            lambda: (
                pids
                if len(pids := {one["pid"] for one in who(daemon, "--port", port)["owners"]}) == 2
                else None
            )
        )
        assert both == {os.getpid(), inside.pid}
        for pid in both:
            owners = who(daemon, "--port", port, "--netns", pid)["owners"]
            assert [one["pid"] for one in owners] == [pid]
            assert [one["pid"] for one in who(daemon, "--netns", pid)["owners"]].count(pid) == 1
    finally:
        inside.communicate()
