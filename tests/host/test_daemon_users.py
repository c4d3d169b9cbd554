# SPDX-License-Identifier: MIT
"""What other users see, and what one of them can do to the others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from daemons import NOBODY, Daemon, StartDaemon, records_of, send, send_burst
from nlproto.client.client import DaemonClient
from waiting import patient, stand_in, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")


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
        "owner": client.owner(port)["owners"],
        "own_owner": client.owner(own_port)["owners"],
        "lookup": client.lookup([key, dict(key, port=own_port)]),
        "by_key": client.lookup(json.loads(sys.argv[6])),
        "at": client.who(port=port, at=time.time()),
        "stats": client.stats(),
    }))
"""


def _as_nobody(daemon: Daemon, receiver: socket.socket, groups: Any = ()) -> Any:
    port = receiver.getsockname()[1]
    with DaemonClient(daemon.path) as client:
        (owner,) = until(lambda: client.owner(port)["owners"])
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
    send(port, 5, 0.02)
    out, _ = child.communicate("go\n", timeout=patient(60))
    mine.close()
    assert child.returncode == 0
    return json.loads(out)


def test_another_user_sees_only_what_is_its_own_in_every_kind_of_answer(
    daemon: Daemon, receiver: socket.socket
) -> None:
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


def test_members_of_the_group_see_everything(start: StartDaemon, receiver: socket.socket) -> None:
    import grp

    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, NOBODY))
    daemon = start(config=f"group: {group.gr_name}\n")
    seen = _as_nobody(daemon, receiver, [group.gr_gid])
    assert seen["hello"]["everything"] is True
    assert 0 in seen["uids"]
    assert [found["process"]["tgid"] for found in seen["by_key"]] == [os.getpid()] * 2
    assert os.getpid() in {flow["pid"] for flow in seen["others"]["flows"]}
    assert "account" in seen["stats"]


def talker(code: str) -> subprocess.Popen[str]:
    """A client of its own, which says and hears lines."""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd="/")


def test_one_user_cannot_take_all_connections(start: StartDaemon) -> None:
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
    child = talker(code)
    assert child.stdout is not None
    assert int(child.stdout.readline()) == 2
    with DaemonClient(daemon.path) as client:
        assert client.stats()["clients"]["refused"] == 1
    child.communicate("\n", timeout=patient(20))


def test_a_stopped_client_loses_only_its_own_records_and_is_told_how_many(
    start: StartDaemon, receiver: socket.socket
) -> None:
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
    slow = talker(code)
    assert slow.stdout is not None
    slow.stdout.readline()
    slow.send_signal(signal.SIGSTOP)
    try:
        with DaemonClient(daemon.path, timeout=patient(60)) as client:
            client.start(rule)
            total = 0
            for _ in range(60):
                send_burst(port, 200)
                total += len(records_of(client.read(0.05)))
            end = client.unsubscribe()
            total += len(records_of(client.read(0)))
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


def test_of_200_subscribers_one_that_is_stopped_loses_its_own_records_and_the_others_none(
    start: StartDaemon,
) -> None:
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
            send_burst(ports[0], 200)
        for count, port in enumerate(ports[1:], 1):
            send_burst(port, count % 7 + 1)
        for count, client in enumerate(clients, 1):
            end = client.unsubscribe()
            assert len(records_of(client.read(0))) == end["sent"] == count % 7 + 1
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
        for one in [*clients, *stand_in(receivers)]:
            one.close()


def test_under_flood_the_queue_keeps_its_limit_loss_is_counted_and_it_recovers(
    start: StartDaemon, receiver: socket.socket
) -> None:
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
        send(port, 10)
        end = client.unsubscribe()
        assert end["sent"] == 10
        assert end["account"]["closes"]


def _at_rest(client: Any) -> Any:
    client.start("udp port 1")
    account = client.unsubscribe()["account"]
    return client.stats() if account["closes"] else None
