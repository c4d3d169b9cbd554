# SPDX-License-Identifier: MIT
"""who "now": sockets that a process has, with their far end; not what it has closed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nlproto.client.client import DaemonClient
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.host.sockdiag import SockDiag, TcpState

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

ALONE = pytest.mark.skipif(os.path.exists(DEFAULT_SOCKET), reason="a daemon serves this machine")

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


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, condition
        time.sleep(0.05)
    return found


def start(path, *words):
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "--engine", "packet", "--socket", path, "--foreground"],
        stderr=subprocess.DEVNULL,
    )
    until(path.exists)
    return process


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    path = tmp_path_factory.mktemp("daemon") / "d.sock"
    process = start(path)
    yield path
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.fixture
def server():
    with socket.create_server((SERVER, 0)) as listener:
        yield listener


def who(path, *words):
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


def closed_first(port):
    """The pid of a client that has closed its connection first and is gone: TIME_WAIT is left."""
    words = [FAR, SERVER, str(port)]
    client = subprocess.Popen(
        [sys.executable, "-c", CLOSES_FIRST, *words], stdin=subprocess.PIPE, text=True
    )
    return client


@pytest.mark.parametrize("served", [True, pytest.param(False, marks=ALONE)])
def test_a_closed_connection_is_nobodys_now(served, daemon, server):
    path = daemon if served else None
    port = server.getsockname()[1]
    client = closed_first(port)
    peer, (_, cport) = server.accept()
    with peer:
        peer.recv(1)

        def has():
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
def test_host_is_the_far_end(served, daemon, server):
    """Of an idle connection that is older than the question, and whoever's address is the near."""
    path = daemon if served else None
    port = server.getsockname()[1]
    with socket.create_connection((SERVER, port), source_address=(NEAR, 0)) as near:
        peer, _ = server.accept()
        with peer:
            mine = (NEAR, near.getsockname()[1], SERVER, port)
            for host, wanted in ((SERVER, mine), (NEAR, (*mine[2:], *mine[:2]))):

                def seen(host=host):
                    owners = who(path, "--host", host)["owners"]
                    ends = {
                        (one["address"], one["port"], one["remote"], one["rport"])
                        for one in owners
                        if one["pid"] == os.getpid()
                    }
                    return ends

                assert until(seen) == {wanted}


def test_every_connection_of_a_process_is_there_and_a_cut_is_told(daemon, server):
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


def test_a_daemon_that_has_just_started_is_not_asked_in_vain(tmp_path):
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
