# SPDX-License-Identifier: MIT
"""The daemon as a process of its own, engine packet, real sockets and users. Root."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nlproto.client.client import DaemonClient, DaemonEvent, ProcessesEvent, StreamBatch
from nlproto.client.frames import Decoder, Kind, encode_json, parse_json
from nlproto.errors import NoDaemon, UsageError
from waiting import patient, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")

# A user of this run's own: what others on this machine do as nobody is not ours.
NOBODY = 60000 + os.getpid() % 5000


class Daemon:
    """One daemon process and its log."""

    def __init__(self, directory: Path, *arguments: str, config: str = "") -> None:
        self.path = str(directory / "daemon.sock")
        self.config = directory / "daemon.yaml"
        self.config.write_text(config)
        self.log = directory / "log"
        command = [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--foreground"]
        command += ["--socket", self.path, "--config", str(self.config), *arguments]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, cwd="/")
        self.wait_for("serving")

    def wait_for(self, text: str, seconds: float = 30) -> None:
        until(lambda: text in self.text() or self._ended(), seconds, f"{text!r} in {self.log}")

    def _ended(self) -> None:
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(patient(20))

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


@pytest.fixture(name="directory")
def _directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("daemon")
    for part in (directory, directory.parent, directory.parent.parent):
        part.chmod(0o755)
    return directory


@pytest.fixture(name="start")
def _start(directory):
    started = []

    def start(*arguments, config=""):
        daemon = Daemon(directory, *arguments, config=config)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.process.send_signal(signal.SIGCONT) if daemon.process.poll() is None else None
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


@pytest.fixture(name="daemon")
def _daemon(start):
    return start()


@pytest.fixture(name="receiver")
def _receiver():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        yield receiver


_senders = []


@pytest.fixture(autouse=True)
def _senders_stay_until_the_test_ends():
    """Engine packet names by a socket that is still there."""
    yield
    while _senders:
        _senders.pop().close()


def _send(port, count=1, pause=0.0, size=20):
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    _senders.append(sender)
    for _ in range(count):
        sender.sendto(b"x" * size, ("127.0.0.1", port))
        if pause:
            time.sleep(pause)


def _records(events):
    return [r for e in events if isinstance(e, StreamBatch) for r in e.batch.records]


def test_named_records_reach_a_client_with_the_details_of_their_process(daemon, receiver):
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        client.start(f"udp port {port}")
        _send(port, 5, 0.01)
        reply = client.unsubscribe()
        events = client.read(0)
    records = _records(events)
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


def test_the_filter_is_applied_by_the_server(daemon, receiver):
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        client.start(f"udp dst port {port} and inbound")
        _send(port, 3)
        reply = client.unsubscribe()
        assert reply["matched"] == reply["sent"] == 3
        assert reply["seen"] >= 6


def test_a_wrong_filter_is_refused_with_its_place_and_the_connection_stays(daemon):
    with DaemonClient(daemon.path) as client:
        with pytest.raises(UsageError, match="column 5"):
            client.start("udp prot 53")
        assert client.start("udp")


def test_who_answers_by_port_pid_name_and_host_after_the_process_has_exited(daemon, receiver):
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

        def own():
            return [flow for flow in client.who(port=port)["flows"] if flow["pid"] == child.pid]

        until(own)
        child.stdin.write(b"\n")
        child.stdin.flush()
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


def test_the_port_map_knows_a_listener_without_traffic_and_forgets_it_within_a_second(daemon):
    with DaemonClient(daemon.path) as client, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (owner,) = until(lambda: client.owner(port))
        assert owner["pid"] == os.getpid() and owner["listening"]
        assert owner["exe"] == os.path.realpath(sys.executable)
        assert [h["pid"] for h in owner["holders"]] == [os.getpid()]
        family = {"netns": owner["netns"], "proto": "tcp", "address": "127.0.0.1", "port": port}
        by_end, by_cookie = client.lookup([family, {"cookie": owner["cookie"]}])
        assert by_end["pid"] == by_cookie["pid"] == os.getpid()
        listener.close()
        # the promise is one second; this machine may be busy with other tests
        until(lambda: not client.owner(port), 3)


def test_the_port_map_knows_connections_that_were_idle_since_before_it_began(start):
    dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    with (
        socket.create_server(("::", 0), **dual) as server,
        socket.create_connection(("127.0.0.1", server.getsockname()[1])) as connection,
        server.accept()[0] as accepted,
    ):
        near, far = connection.getsockname()[1], server.getsockname()[1]
        with DaemonClient(start().path) as client:
            (owner,) = until(lambda: client.owner(near))
            assert (owner["pid"], owner["address"]) == (os.getpid(), "127.0.0.1")
            assert not owner["listening"] and owner["cookie"]
            assert owner["exe"] == os.path.realpath(sys.executable)
            ends = {(one["address"], one["listening"]) for one in client.owner(far)}
            assert ends == {("::", True), ("127.0.0.1", False)}
            accepted.close()
            connection.close()
            until(lambda: not client.owner(near))


def test_all_holders_of_a_shared_listener_are_told(daemon):
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
                    {h["pid"] for o in client.owner(port) for h in o["holders"]}
                    == {os.getpid(), child}
                )
            )
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_many_questions_at_once_are_answered_in_order(daemon, receiver):
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        until(lambda: client.owner(port))
        replies = client.pipeline([("owner", {"port": port})] * 1000)
        assert len(replies) == 1000
        assert all(reply["owners"][0]["pid"] == os.getpid() for reply in replies)


# Life and death


def test_sigterm_ends_it_cleanly_and_the_account_is_logged(daemon, receiver):
    _send(receiver.getsockname()[1], 3)
    with DaemonClient(daemon.path) as client:
        client.start("udp")
        assert daemon.stop(signal.SIGTERM) == 0
        events = _drain(client)
    assert isinstance(events[-1], DaemonEvent) and events[-1].name == "bye"
    assert not os.path.exists(daemon.path)
    assert "packets seen =" in daemon.text()
    assert "does not close" not in daemon.text()


def _drain(client):
    events = []
    try:
        while found := client.read(5):
            events += found
    except NoDaemon:
        pass
    return events


def test_sigint_ends_it_as_well(daemon):
    assert daemon.stop(signal.SIGINT) == 0


def test_records_sent_just_before_sigterm_still_arrive(daemon, receiver):
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        client.start(f"udp dst port {port} and outbound")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(100):
                sender.sendto(b"x", ("127.0.0.1", port))
            daemon.process.send_signal(signal.SIGTERM)
            events = _drain(client)
    assert len(_records(events)) == 100


def test_a_live_daemon_is_not_displaced(daemon):
    second = subprocess.run(
        [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--socket", daemon.path],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd="/",
    )
    assert second.returncode == 1
    assert f"pid {daemon.process.pid}" in second.stderr and len(second.stderr.splitlines()) == 1
    with DaemonClient(daemon.path) as client:
        assert client.daemon["pid"] == daemon.process.pid


def test_after_kill_9_the_socket_is_taken_over_and_owners_are_known_again(
    start, directory, receiver
):
    first = start()
    port = receiver.getsockname()[1]
    with DaemonClient(first.path) as client:
        until(lambda: client.owner(port))
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(NoDaemon):
            client.stats()
    assert os.path.exists(first.path)
    second = start()
    with DaemonClient(second.path) as client:
        (owner,) = until(lambda: client.owner(port))
        assert owner["pid"] == os.getpid()
    assert "stale" in second.text()


def test_a_file_that_is_no_socket_is_left_alone(directory):
    path = directory / "daemon.sock"
    path.write_text("precious")
    done = subprocess.run(
        [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--socket", str(path)],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd="/",
    )
    assert done.returncode == 1 and "no socket" in done.stderr
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--engine", "bpf"], 2, "bpf"),
        (["--config", "/nonexistent.yaml"], 2, "nonexistent"),
        (["--socket", "/proc/daemon.sock"], 1, "--socket"),
    ],
)
def test_bad_usage_is_one_clear_line(arguments, code, word):
    done = subprocess.run(
        [sys.executable, "-I", "-m", "daemon", *arguments],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd="/",
    )
    assert done.returncode == code
    assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_root_does_not_start_where_others_can_write(directory):
    directory.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-m", "daemon", "--engine", "packet"],
        capture_output=True,
        text=True,
        timeout=patient(30),
        cwd=directory,
    )
    assert done.returncode == 1
    assert "others can write" in done.stderr


def test_sighup_reads_the_configuration_again_and_a_mistake_changes_nothing(start):
    daemon = start(config="max_clients: 100\n")
    daemon.config.write_text("max_clients: many\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("daemon.yaml:1: max_clients")
    daemon.config.write_text("max_clients: 1\nqueue_size: 1MiB\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("configuration read again")
    assert "a restart is needed for: queue_size" in daemon.text()
    with DaemonClient(daemon.path), pytest.raises(NoDaemon):
        DaemonClient(daemon.path)


def _rows_in(path):
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT count(*) FROM flows").fetchone()[0]
    return 0


def test_history_survives_a_restart(start, directory, receiver):
    config = f"history: {directory}/history.db\nflush_interval: 100ms\n"
    first = start(config=config)
    port = receiver.getsockname()[1]
    _send(port, 3)
    until(lambda: _rows_in(directory / "history.db"))
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = start(config=config)
    with DaemonClient(second.path) as client:
        reply = client.who(port=port)
        assert {flow["pid"] for flow in reply["flows"]} == {os.getpid()}
        assert {p["tgid"] for p in reply["processes"]} == {os.getpid()}


# Rights


_AS_NOBODY = """
import json, os, sys, socket, time
from nlproto.client.client import DaemonClient, StreamBatch, ProcessesEvent
os.setgroups(json.loads(sys.argv[4]))
os.setgid(int(sys.argv[5])); os.setuid(int(sys.argv[5]))
path, port, root_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("127.0.0.1", 0))
own_port = own.getsockname()[1]
own.connect(own.getsockname())
with DaemonClient(path) as client:
    client.start()
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(3):
        own.send(b"x")
        time.sleep(0.02)
    ended = client.unsubscribe()
    events = client.read(0)
    while not client.who(host="127.0.0.1", port=own_port)["owners"]:
        time.sleep(0.02)
    netns = os.stat("/proc/self/ns/net").st_ino
    key = {"netns": netns, "proto": "udp", "address": "127.0.0.1", "port": port}
    print(json.dumps({
        "pid": os.getpid(),
        "hello": client.daemon,
        "uids": sorted({int(r["uid"]) for e in events if isinstance(e, StreamBatch)
                        for r in e.batch.records}),
        "pids": sorted({int(r["tgid"]) for e in events if isinstance(e, StreamBatch)
                        for r in e.batch.records}),
        "told": sorted({p.tgid for e in events if isinstance(e, ProcessesEvent)
                        for p in e.processes}),
        "ended": ended,
        "others": client.who(port=port),
        "by_pid": client.who(pid=root_pid),
        "by_host": client.who(host="127.0.0.1"),
        "history": client.request("history", uid=0),
        "own": client.who(port=own_port),
        "owner": client.owner(port),
        "own_owner": client.owner(own_port),
        "lookup": client.lookup([key, dict(key, port=own_port)]),
        "by_key": client.lookup(json.loads(sys.argv[6])),
        "at": client.who(port=port, at=time.time()),
        "stats": client.stats(),
    }))
"""


def _as_nobody(daemon, receiver, groups=()):
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        (owner,) = until(lambda: client.owner(port))
    keys = [
        {"cookie": owner["cookie"]},
        {"tgid": owner["pid"], "start_ns": owner["start_ns"]},
    ]
    arguments = [daemon.path, str(port), str(os.getpid()), json.dumps(list(groups)), str(NOBODY)]
    arguments.append(json.dumps(keys))
    mine = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mine.connect(("127.0.0.1", port))
    mine.send(b"x")
    with DaemonClient(daemon.path) as client:
        until(lambda: client.who(host="127.0.0.1", port=port)["owners"])
    child = subprocess.Popen(
        [sys.executable, "-c", _AS_NOBODY, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    _send(port, 5, 0.02)
    out, _ = child.communicate("go\n", timeout=patient(60))
    mine.close()
    assert child.returncode == 0
    return json.loads(out)


def test_another_user_sees_only_what_is_its_own_in_every_kind_of_answer(daemon, receiver):
    seen = _as_nobody(daemon, receiver)
    assert seen["hello"]["everything"] is False
    assert seen["uids"] == [NOBODY]
    assert seen["pids"] == seen["told"] == [seen["pid"]]
    assert seen["ended"]["matched"] == 6
    assert seen["ended"]["account"] is None and seen["ended"]["seen"] is None
    assert seen["by_key"] == [None, None]
    for name in ("others", "by_pid", "history", "at"):
        assert seen[name]["flows"] == seen[name]["owners"] == seen[name]["processes"] == [], name
        assert seen[name]["total"] == 0
    assert {flow["uid"] for flow in seen["by_host"]["flows"]} == {NOBODY}
    assert {owner["uid"] for owner in seen["by_host"]["owners"]} == {NOBODY}
    assert {flow["pid"] for flow in seen["own"]["flows"]} == {seen["pid"]}
    assert seen["owner"] == []
    assert [owner["pid"] for owner in seen["own_owner"]] == [seen["pid"]]
    assert seen["lookup"][0] is None and seen["lookup"][1]["pid"] == seen["pid"]
    assert set(seen["stats"]) == {"client", "engine", "pid", "protocol", "started", "version"}


def test_members_of_the_group_see_everything(start, receiver):
    import grp

    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, NOBODY))
    daemon = start(config=f"group: {group.gr_name}\n")
    seen = _as_nobody(daemon, receiver, [group.gr_gid])
    assert seen["hello"]["everything"] is True
    assert 0 in seen["uids"]
    assert [found["process"]["tgid"] for found in seen["by_key"]] == [os.getpid()] * 2
    assert os.getpid() in {flow["pid"] for flow in seen["others"]["flows"]}
    assert "account" in seen["stats"]


def test_one_user_cannot_take_all_connections(start):
    daemon = start(config="max_clients: 16\n")
    code = (
        "import os,sys\nfrom nlproto.client.client import DaemonClient\n"
        "from nlproto import NoDaemon\n"
        "os.setgroups([]);os.setgid(65534);os.setuid(65534)\n"
        "held=[]\n"
        "try:\n"
        f"  for _ in range(16): held.append(DaemonClient({daemon.path!r}))\n"
        "except NoDaemon: pass\n"
        "print(len(held),flush=True)\nsys.stdin.readline()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert child.stdout is not None
    assert int(child.stdout.readline()) == 2
    with DaemonClient(daemon.path) as client:
        assert client.stats()["clients"]["refused"] == 1
    child.communicate("\n", timeout=patient(20))


# Many clients, slow clients, hostile clients


def test_a_stopped_client_loses_only_its_own_records_and_is_told_how_many(start, receiver):
    daemon = start(config="client_queue_size: 64KiB\n")
    port = receiver.getsockname()[1]
    rule = f"udp dst port {port} and outbound"
    code = (
        "import json,sys,time\n"
        "from nlproto.client.client import DaemonClient, DaemonEvent, StreamBatch\n"
        f"c=DaemonClient({daemon.path!r},timeout={patient(60)})\nc.start({rule!r})\nprint('ready',flush=True)\n"
        "sys.stdin.readline()\nend=c.unsubscribe()\nev=c.read(0)\n"
        "n=sum(len(e.batch.records) for e in ev if isinstance(e,StreamBatch))\n"
        "gap=sum(e.fields['records'] for e in ev if isinstance(e,DaemonEvent))\n"
        "print(json.dumps([n,gap,end['sent'],end['dropped'],end['matched']]))\n"
    )
    slow = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert slow.stdout is not None
    slow.stdout.readline()
    slow.send_signal(signal.SIGSTOP)
    try:
        with DaemonClient(daemon.path, timeout=patient(60)) as client:
            client.start(rule)
            total = 0
            for _ in range(60):
                _send_burst(port, 200)
                total += len(_records(client.read(0.05)))
            end = client.unsubscribe()
            total += len(_records(client.read(0)))
            assert end["dropped"] == 0
            assert total == end["matched"]
            assert end["account"]["closes"]
    finally:
        slow.send_signal(signal.SIGCONT)
    out, _ = slow.communicate("go\n", timeout=patient(60))
    received, gap, sent, dropped, matched = json.loads(out)
    assert dropped > 0
    assert received == sent == matched - dropped
    assert 0 < gap <= dropped
    assert matched == total


def _send_burst(port, count):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))
        time.sleep(0.02)


_SLOW = """
import json, sys
from nlproto.client.client import DaemonClient, DaemonEvent, StreamBatch
client = DaemonClient(sys.argv[1], timeout=600)
client.start(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
end = client.unsubscribe()
events = client.read(0)
print(json.dumps({
    "received": sum(len(e.batch.records) for e in events if isinstance(e, StreamBatch)),
    "told": sum(e.fields["records"] for e in events if isinstance(e, DaemonEvent)),
    **{name: end[name] for name in ("sent", "dropped", "matched")},
}))
"""


def test_of_200_subscribers_one_that_is_stopped_loses_its_own_records_and_the_others_none(start):
    daemon = start(config="client_queue_size: 64KiB\nqueue_size: 256MiB\n")
    receivers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(200)]
    clients, slow = [], None
    try:
        ports = []
        for receiver in receivers:
            receiver.bind(("127.0.0.1", 0))
            ports.append(receiver.getsockname()[1])
        for port in ports[1:]:
            client = DaemonClient(daemon.path, timeout=patient(60))
            clients.append(client)
            client.start(f"udp dst port {port} and outbound")
        rule = f"udp dst port {ports[0]} and outbound"
        slow = subprocess.Popen(
            [sys.executable, "-c", _SLOW, daemon.path, rule],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        assert slow.stdout is not None
        slow.stdout.readline()
        clients[0].request("stats")
        assert clients[0].stats()["clients"]["filters"] == 200
        slow.send_signal(signal.SIGSTOP)
        for _ in range(30):
            _send_burst(ports[0], 200)
        for count, port in enumerate(ports[1:], 1):
            _send_burst(port, count % 7 + 1)
        for count, client in enumerate(clients, 1):
            end = client.unsubscribe()
            assert len(_records(client.read(0))) == end["sent"] == count % 7 + 1
            assert end["dropped"] == 0
        slow.send_signal(signal.SIGCONT)
        out, _ = slow.communicate("go\n", timeout=patient(60))
        found = json.loads(out)
        assert found["matched"] == 6000
        assert found["dropped"] > 0
        assert found["received"] == found["sent"] == 6000 - found["dropped"]
        assert 0 < found["told"] <= found["dropped"]
    finally:
        if slow is not None and slow.poll() is None:
            slow.kill()
            slow.communicate()
        for one in (*clients, *receivers):
            one.close()


def test_nonsense_neither_ends_it_nor_grows_it(daemon):
    """A seeded tenth of what `make fuzz` sends."""
    fuzzer = Path(__file__).parents[1] / "fuzz.py"
    arguments = (daemon.path, daemon.process.pid, 1_000_000, 20261123)
    code = f"import runpy; runpy.run_path({str(fuzzer)!r})['check'](*{arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(300)
    )
    assert done.returncode == 0, done.stderr
    assert daemon.process.poll() is None
    assert "Traceback" not in daemon.text()


def test_a_client_that_does_not_read_its_replies_is_not_buffered_without_end(daemon):
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


def test_a_frame_of_the_wrong_kind_ends_the_connection_with_a_reason(daemon):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(10)
        raw.connect(daemon.path)
        raw.sendall(encode_json(Kind.EVENT, {}))
        ((kind, payload),) = Decoder(1 << 20).feed(raw.recv(65536))
        assert kind is Kind.CONTROL
        reply = parse_json(payload)
        assert reply["ok"] is False and reply["code"] == "usage"
        assert raw.recv(10) == b""


def test_a_client_of_another_protocol_is_told(daemon):
    with DaemonClient(daemon.path) as client, pytest.raises(UsageError, match="release"):
        client.request("hello", protocol=99)


def test_disconnecting_in_the_middle_of_an_answer_harms_nobody(daemon):
    for _ in range(20):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(daemon.path)
        raw.sendall(encode_json(Kind.CONTROL, {"id": 1, "op": "who"}) * 10)
        raw.close()
    with DaemonClient(daemon.path) as client:
        assert client.stats()["clients"]["connected"] >= 1
    assert "Traceback" not in daemon.text()


def test_under_flood_the_queue_keeps_its_limit_loss_is_counted_and_it_recovers(start, receiver):
    daemon = start(config="queue_size: 512KiB\nclient_queue_size: 512KiB\n")
    port = receiver.getsockname()[1]
    daemon.memory()
    ends = time.monotonic() + 3
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", port))
        while time.monotonic() < ends:
            for _ in range(500):
                sender.send(b"x")
    with DaemonClient(daemon.path, timeout=patient(60)) as client:
        stats = until(lambda: _at_rest(client), 30)
        assert stats["queue"]["peak_bytes"] <= stats["queue"]["max_bytes"]
        assert stats["account"]["lost"]["queue"] == stats["queue"]["dropped_records"]
        client.start(f"udp dst port {port} and outbound")
        _send(port, 10)
        end = client.unsubscribe()
        assert end["sent"] == 10
        assert end["account"]["closes"]


def _at_rest(client):
    client.start("udp port 1")
    account = client.unsubscribe()["account"]
    return client.stats() if account["closes"] else None


def test_metrics_are_served_on_a_unix_socket(start, directory, receiver):
    path = f"{directory}/metrics.sock"
    daemon = start(config=f"metrics: {path}\nmetrics_processes: 1\n")
    _send(receiver.getsockname()[1], 3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(10)
        raw.connect(path)
        raw.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert b"200 OK" in answer
    assert b"packet_hunter_records_total" in answer
    assert b"packet_hunter_process_bytes_total" in answer
    assert os.stat(path).st_mode & 0o777 == 0o660
    assert daemon.stop() == 0
    assert not os.path.exists(path)


PROMETHEUS = Path(__file__).parents[2] / ".venv/prometheus/usr/bin/prometheus"


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.skipif(not PROMETHEUS.exists(), reason="no Prometheus: ./build.sh --test-tools")
def test_a_real_prometheus_server_scrapes_the_metrics(start, directory, receiver):
    import urllib.error
    import urllib.parse
    import urllib.request

    port, own = _free_port(), _free_port()
    daemon = start(config=f"metrics: 127.0.0.1:{port}\nmetrics_processes: 1\n")
    _send(receiver.getsockname()[1], 5)
    (directory / "prometheus.yml").write_text(
        "scrape_configs:\n- job_name: hunter\n  scrape_interval: 1s\n  static_configs:\n"
        f"  - targets: ['127.0.0.1:{port}']\n"
    )
    command = [PROMETHEUS, f"--config.file={directory}/prometheus.yml"]
    command += [f"--storage.tsdb.path={directory}/tsdb", f"--web.listen-address=127.0.0.1:{own}"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(query):
        url = f"http://127.0.0.1:{own}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with opener.open(url, timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.URLError:
            return []  # it is starting

    with open(directory / "prometheus.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        (up,) = until(lambda: ask('up{job="hunter"} == 1'), 60)
        (records,) = until(lambda: ask("packet_hunter_records_total >= 10"), 60)
        for name in ("packets_total", "named_total", "queue_bytes", "clients"):
            assert ask(f"packet_hunter_{name}"), name
        places = {one["metric"]["place"] for one in ask("packet_hunter_lost_total")}
        assert places == {"alloc", "socket", "queue", "client", "failed"}
        names = {one["metric"]["comm"] for one in ask("packet_hunter_process_bytes_total")}
        # one name of its own, and what is over the limit
        assert 1 <= len(names) <= 2 and names - {"other"}
    finally:
        server.terminate()
        server.wait(30)
    assert daemon.stop() == 0


def test_the_manager_is_told_when_it_is_ready_and_when_it_stops(directory):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(30)
        environment = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "600000"}
        path = str(directory / "daemon.sock")
        child = subprocess.Popen(
            [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--socket", path],
            env=environment,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            assert manager.recv(4096).startswith(b"READY=1\nSTATUS=engine packet")
            assert os.path.exists(path)
            assert manager.recv(4096) == b"WATCHDOG=1"
            assert manager.recv(4096) == b"WATCHDOG=1"
            child.send_signal(signal.SIGHUP)
            while not (got := manager.recv(4096)).startswith(b"RELOADING=1"):
                assert got == b"WATCHDOG=1"
            child.send_signal(signal.SIGTERM)
            while not (got := manager.recv(4096)).startswith(b"STOPPING=1"):
                assert got.startswith((b"WATCHDOG=1", b"READY=1"))
            assert child.wait(20) == 0
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def test_a_user_without_privilege_is_told_what_to_do(directory):
    code = (
        "import os,sys\nfrom daemon.__main__ import main\nimport nlproto.engines.packet\n"
        "os.setgroups([]);os.setgid(65534);os.setuid(65534)\n"
        f"sys.exit(main(['--engine','packet','--socket','{directory}/none.sock']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30, cwd="/"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_daemon_is_a_clear_error(directory):
    with pytest.raises(NoDaemon, match="start it with"):
        DaemonClient(directory / "nothing.sock")
