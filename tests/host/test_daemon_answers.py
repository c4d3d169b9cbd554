# SPDX-License-Identifier: MIT
"""What the daemon answers, and what it streams: a client of its own asks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon, StartDaemon, records_of, send
from nlproto.client.client import DaemonClient, ProcessesEvent, StreamBatch
from nlproto.client.frames import Decoder, Kind, encode_json, parse_json
from nlproto.errors import UsageError
from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")


def test_named_records_reach_a_client_with_the_details_of_their_process(
    daemon: Daemon, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        client.start(f"udp port {port}")
        send(port, 5, 0.01)
        reply = client.unsubscribe()
        events = client.read(0)
    records = records_of(events)
    assert len(records) == reply["sent"] == 10
    assert {int(r["tgid"]) for r in records} == {os.getpid()}
    assert {int(r["dir"]) for r in records} == {1, 2}
    # on a busy machine an account of the second before comes first
    told = [event for event in events if isinstance(event, ProcessesEvent | StreamBatch)]
    assert isinstance(told[0], ProcessesEvent)
    (process,) = told[0].processes
    assert process.tgid == os.getpid()
    assert process.exe == os.path.realpath(sys.executable)
    assert reply["account"]["closes"]


def test_the_filter_is_applied_by_the_server(daemon: Daemon, receiver: socket.socket) -> None:
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        client.start(f"udp dst port {port} and inbound")
        send(port, 3)
        reply = client.unsubscribe()
        assert reply["matched"] == reply["sent"] == 3
        assert reply["seen"] >= 6


def test_a_wrong_filter_is_refused_with_its_place_and_the_connection_stays(daemon: Daemon) -> None:
    with DaemonClient(daemon.path) as client:
        with pytest.raises(UsageError, match="column 5"):
            client.start("udp prot 53")
        assert client.start("udp")


def test_who_answers_by_port_pid_name_and_host_after_the_process_has_exited(
    daemon: Daemon, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    code = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        f"s.sendto(b'x',('127.0.0.1',{port}))\nsys.stdin.readline()\n"
        "open('/proc/self/comm','w').write('shortlived')\n"
        f"s.sendto(b'x',('127.0.0.1',{port}))\nsys.stdin.readline()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    with DaemonClient(daemon.path) as client:

        def own() -> list[Any]:
            return [flow for flow in client.who(port=port)["flows"] if flow["pid"] == child.pid]

        until(own)
        there(child.stdin).write(b"\n")
        there(child.stdin).flush()
        until(lambda: own()[0]["packets_out"] == 2)
        child.communicate(b"\n")
        (flow,) = own()
        assert flow["last"] > flow["first"]
        for question in (
            {"port": port},
            {"pid": child.pid},
            {"pname": "shortlived"},
            {"host": "127.0.0.0/8", "port": port, "proto": "udp", "since": 60},
            {"port": port, "at": (flow["first"] + flow["last"]) / 2},
        ):
            reply = client.who(**question)
            assert child.pid in {flow["pid"] for flow in reply["flows"]}, question
        details = {p["tgid"]: p for p in reply["processes"]}[child.pid]
        assert details["exe"] == os.path.realpath(sys.executable)
        assert client.who(port=port, proto="tcp")["flows"] == []
        assert client.who(port=port, at=flow["first"] - 5)["flows"] == []
        until(lambda: client.who(pid=child.pid)["owners"] == [])


def test_the_port_map_knows_a_listener_without_traffic_and_forgets_it_within_a_second(
    daemon: Daemon,
) -> None:
    with DaemonClient(daemon.path) as client, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (owner,) = until(lambda: client.owner(port)["owners"])
        assert owner["pid"] == os.getpid() and owner["listening"]
        assert owner["exe"] == os.path.realpath(sys.executable)
        assert [h["pid"] for h in owner["holders"]] == [os.getpid()]
        family = {"netns": owner["netns"], "proto": "tcp", "address": "127.0.0.1", "port": port}
        by_end, by_cookie = client.lookup([family, {"cookie": owner["cookie"]}])
        assert there(by_end)["pid"] == there(by_cookie)["pid"] == os.getpid()
        listener.close()
        # the promise is one second; this machine may be busy with other tests
        until(lambda: not client.owner(port)["owners"], 3)


def test_the_port_map_knows_connections_that_were_idle_since_before_it_began(
    start: StartDaemon,
) -> None:
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server,
        socket.create_connection(("127.0.0.1", server.getsockname()[1])) as connection,
        server.accept()[0] as accepted,
    ):
        near, far = connection.getsockname()[1], server.getsockname()[1]
        with DaemonClient(start().path) as client:
            (owner,) = until(lambda: client.owner(near)["owners"])
            assert (owner["pid"], owner["address"]) == (os.getpid(), "127.0.0.1")
            assert not owner["listening"] and owner["cookie"]
            assert owner["exe"] == os.path.realpath(sys.executable)
            ends = {(one["address"], one["listening"]) for one in client.owner(far)["owners"]}
            assert ends == {("::", True), ("127.0.0.1", False)}
            accepted.close()
            connection.close()
            until(lambda: not client.owner(near)["owners"])


def test_all_holders_of_a_shared_listener_are_told(daemon: Daemon) -> None:
    with DaemonClient(daemon.path) as client, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            port = listener.getsockname()[1]
            until(
                lambda: (
                    {h["pid"] for o in client.owner(port)["owners"] for h in o["holders"]}
                    == {os.getpid(), child}
                )
            )
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_many_questions_at_once_are_answered_in_order(
    daemon: Daemon, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        until(lambda: client.owner(port)["owners"])
        replies = client.pipeline([("owner", {"port": port})] * 1000)
        assert len(replies) == 1000
        assert all(reply["owners"][0]["pid"] == os.getpid() for reply in replies)


def test_nonsense_neither_ends_it_nor_grows_it(daemon: Daemon) -> None:
    """A seeded tenth of what `make nonsense` sends."""
    fuzzer = Path(__file__).parents[1] / "nonsense.py"
    arguments = (daemon.path, daemon.process.pid, 1_000_000, 20261123)
    code = f"import runpy; runpy.run_path({str(fuzzer)!r})['check'](*{arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(300)
    )
    assert done.returncode == 0, done.stderr
    assert daemon.process.poll() is None
    assert "Traceback" not in daemon.text()


def test_a_client_that_does_not_read_its_replies_is_not_buffered_without_end(
    daemon: Daemon,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.connect(daemon.path)
        raw.setblocking(False)
        request = encode_json(Kind.CONTROL, {"id": 1, "op": "stats"}) * 50
        before, sent, ends = daemon.memory(), 0, time.monotonic() + 5
        while time.monotonic() < ends:
            try:
                sent += raw.send(request)
            except BlockingIOError:
                time.sleep(0.01)
        assert daemon.memory() - before < 32 << 20
    with DaemonClient(daemon.path) as client:
        assert client.stats()


def test_a_frame_of_the_wrong_kind_ends_the_connection_with_a_reason(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(10)
        raw.connect(daemon.path)
        raw.sendall(encode_json(Kind.EVENT, {}))
        ((kind, payload),) = Decoder(1 << 20).feed(raw.recv(65536))
        assert kind is Kind.CONTROL
        reply = parse_json(payload)
        assert reply["ok"] is False and reply["code"] == "usage"
        assert raw.recv(10) == b""


def test_a_client_of_another_protocol_is_told(daemon: Daemon) -> None:
    with DaemonClient(daemon.path) as client, pytest.raises(UsageError, match="release"):
        client.request("hello", protocol=99)


def test_disconnecting_in_the_middle_of_an_answer_harms_nobody(daemon: Daemon) -> None:
    for _ in range(20):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(daemon.path)
        raw.sendall(encode_json(Kind.CONTROL, {"id": 1, "op": "who"}) * 10)
        raw.close()
    with DaemonClient(daemon.path) as client:
        assert client.stats()["clients"]["connected"] >= 1
    assert "Traceback" not in daemon.text()
