# SPDX-License-Identifier: MIT
"""Engine packet against real traffic; each worker tells its own pid and ports."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import numpy as np
import pytest

from capturing import IN, OUT, StartRun, StartWorker, facts, families, owners
from nlproto.host import procfs
from nlproto.records import wire
from nlproto.records.clock import Clock
from waiting import there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")


@families
def test_tcp_is_named_at_both_ends_in_both_directions(
    run: StartRun, worker: StartWorker, family: Any
) -> None:
    taken = run()
    server = worker(f"""
f = socket.{family}; a = socket.socket(f); a.bind((loopback(f), 0)); a.listen()
tell(port=a.getsockname()[1]); c, _ = a.accept()
while c.recv(65536): c.send(b"y" * 100)
stay()
""")
    port = facts(server)["port"]
    client = worker(f"""
f = socket.{family}; c = socket.create_connection((loopback(f), {port}))
tell(port=c.getsockname()[1])
for _ in range(20): c.send(b"x" * 1000); c.recv(65536)
sys.stdin.readline(); c.close(); stay()
""")
    facts(client)
    taken.wait(84, port)
    there(client.stdin).write("\n")
    there(client.stdin).flush()
    taken.wait(88, port)
    records = taken.records(port)
    to_server = records[records["dport"] == port]
    to_client = records[records["sport"] == port]
    assert len(to_server) > 40 and len(to_client) > 40
    assert owners(to_server) == {(OUT, client.pid), (IN, server.pid)}
    assert owners(to_client) == {(OUT, server.pid), (IN, client.pid)}
    hows = {wire.lib.SNIFFER_HOW_DIAG, wire.lib.SNIFFER_HOW_LISTENER}  # not accepted yet
    assert set(records["how"].tolist()) <= hows
    assert taken.account.closes(), taken.account.as_dict()


@families
def test_udp_is_named_at_both_ends_in_both_directions(
    run: StartRun, worker: StartWorker, family: Any
) -> None:
    taken = run()
    server = worker(f"""
f = socket.{family}; s = socket.socket(f, socket.SOCK_DGRAM); s.bind((loopback(f), 0))
tell(port=s.getsockname()[1])
for _ in range(20): d, a = s.recvfrom(2000); s.sendto(d, a)
stay()
""")
    port = facts(server)["port"]
    client = worker(f"""
f = socket.{family}; s = socket.socket(f, socket.SOCK_DGRAM)
for _ in range(20): s.sendto(b"x" * 100, (loopback(f), {port})); s.recv(2000)
stay()
""")
    taken.wait(80, port)
    records = taken.records(port)
    assert len(records) == 80
    assert owners(records[records["dport"] == port]) == {(OUT, client.pid), (IN, server.pid)}
    assert owners(records[records["sport"] == port]) == {(OUT, server.pid), (IN, client.pid)}
    header = 28 if family == "AF_INET" else 48
    assert set(records["len"].tolist()) == {100 + header}
    assert set(records["hdr_len"].tolist()) == {header}


def test_a_process_that_only_receives_is_named(run: StartRun, worker: StartWorker) -> None:
    taken = run()
    receiver = worker("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
tell(port=s.getsockname()[1]); sys.stdin.read()
""")
    port = facts(receiver)["port"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(5):
            sender.sendto(b"hi", ("127.0.0.1", port))
        taken.wait(10, port)
    records = taken.records(port)
    assert owners(records) == {(OUT, os.getpid()), (IN, receiver.pid)}


def test_a_record_holds_everything_that_is_known(run: StartRun) -> None:
    taken = run()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        before = time.monotonic_ns()
        one.sendto(b"12345", other.getsockname())
        after = time.monotonic_ns()
        ports = one.getsockname()[1], other.getsockname()[1]
        taken.wait(2, *ports)
        sent, got = taken.records(*ports)
        cookies = [
            int.from_bytes(s.getsockopt(socket.SOL_SOCKET, 57, 8), "little") for s in (one, other)
        ]
        inodes = [os.fstat(s.fileno()).st_ino for s in (one, other)]
    for record, cookie, inode in zip((sent, got), cookies, inodes, strict=True):
        assert before <= int(record["time_ns"]) <= after + 50_000_000
        assert (int(record["cookie"]), int(record["inode"])) == (cookie, inode)
        assert (int(record["sport"]), int(record["dport"])) == ports
        assert int(record["netns"]) == os.stat("/proc/self/ns/net").st_ino
        assert int(record["ifindex"]) == socket.if_nametoindex("lo")
        assert (int(record["len"]), int(record["gso_segs"])) == (33, 1)
        assert int(record["uid"]) == os.getuid()
        me = procfs.identity(os.getpid())
        assert procfs.same_start(int(record["start_ns"]), there(me).start_ticks)
        assert wire.text(record["comm"]) == open("/proc/self/comm").read().rstrip("\n")
    assert (int(sent["dir"]), int(got["dir"])) == (OUT, IN)
    seen = wire.packet(sent, Clock.from_head(taken.parts[-1].head)).time.timestamp()
    assert abs(seen - time.time()) < 30


def test_a_child_that_the_parent_accepted_for_is_the_owner(
    run: StartRun, worker: StartWorker
) -> None:
    """From its first packet, although its parent was named a moment before."""
    taken = run()
    server = worker("""
a = socket.socket(); a.bind(("127.0.0.1", 0)); a.listen(); tell(port=a.getsockname()[1])
c, _ = a.accept()
while (c.recv(100) or b"e")[:1] == b"x": c.send(b"z" * 5)
child = os.fork()
if child == 0:
    a.close()
    c.send(b"y" * 10)
    while c.recv(100): c.send(b"y" * 10)
    stay(); os._exit(0)
c.close(); tell(child=child); os.waitpid(child, 0)
""")
    port = facts(server)["port"]

    def said(size: Any, records: Any) -> Any:
        sent = (records["sport"] == port) & (records["dir"] == OUT)
        return records[sent & (records["len"] == 52 + size)]

    with socket.create_connection(("127.0.0.1", port)) as client:

        def ask(word: Any) -> None:
            client.send(word)
            client.recv(100)

        def parent_is_named() -> bool:
            ask(b"x")
            return server.pid in said(5, taken.so_far(port))["tgid"][-1:]

        until(parent_is_named, what="the parent's name")
        for word in (b"f", *[b"c"] * 50):
            ask(word)
        child = facts(server)["child"]

        def child_is_named() -> bool:
            ask(b"c")
            return child in said(10, taken.so_far(port))["tgid"][-1:]

        until(child_is_named, what="the child's name")
    answers = said(10, taken.records(port))
    others = answers[answers["tgid"] != child]
    assert len(answers) > 50 and set(others["tgid"].tolist()) <= {server.pid}
    assert np.all(others["flags"] & wire.lib.SNIFFER_F_AMBIGUOUS)


def test_a_shared_socket_is_flagged(run: StartRun, worker: StartWorker) -> None:
    taken = run()
    parent = worker("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
child = os.fork()
if child == 0:
    for _ in range(30): s.sendto(b"x", s.getsockname()); time.sleep(0.1)
    stay(); os._exit(0)
tell(port=s.getsockname()[1], child=child); os.waitpid(child, 0)
""")
    told = facts(parent)
    taken.wait(60, told["port"])
    records = taken.records(told["port"])
    assert len(records) == 60
    assert {pid for _, pid in owners(records)} <= {told["child"], parent.pid}
    assert np.all(records["flags"][-2:] & wire.lib.SNIFFER_F_SHARED)


def test_a_port_that_another_process_takes_over_gets_the_new_owner(
    run: StartRun, worker: StartWorker
) -> None:
    taken = run()
    code = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("127.0.0.1", PORT))
tell(port=s.getsockname()[1])
s.sendto(b"x", s.getsockname()); stay()
"""
    first = worker(code.replace("PORT", "0"))
    port = facts(first)["port"]
    taken.wait(2, port)
    first.communicate()
    second = worker(code.replace("PORT", str(port)))
    taken.wait(4, port)
    found = [int(one["tgid"]) for one in taken.records(port)]
    assert found == [first.pid, first.pid, second.pid, second.pid]


def test_a_closed_port_has_no_socket(run: StartRun) -> None:
    taken = run()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    taken.wait(4, port)
    records = taken.records(port)
    arrived = records[(records["dport"] == port) & (records["dir"] == IN)]
    # Only the answer proves that there was none; it may be read after the question.
    assert {wire.how_name(how) for how in arrived["how"].tolist()} <= {"no_socket", "socket_gone"}
    resets = records[(records["sport"] == port) & (records["dir"] == OUT)]
    assert {wire.how_name(how) for how in resets["how"].tolist()} == {"no_socket"}


def test_never_a_wrong_owner_for_processes_that_live_a_moment(
    run: StartRun, worker: StartWorker
) -> None:
    taken = run()
    sink = worker("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
tell(port=s.getsockname()[1]); sys.stdin.read()
""")
    port = facts(sink)["port"]
    parent = worker(f"""
for _ in range(100):
    child = os.fork()
    if child == 0:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind(("127.0.0.1", 0))
        tell(port=s.getsockname()[1]); s.sendto(b"x", ("127.0.0.1", {port})); os._exit(0)
    os.waitpid(child, 0)
""")
    truth = [json.loads(line) for line in there(parent.stdout)]
    taken.wait(200, port)
    records = taken.records(port)
    assert owners(records, IN) == {(IN, sink.pid)}
    sent = records[records["dir"] == OUT]
    assert len(truth) == len(sent) == 100
    for one, told in zip(sent, truth, strict=True):
        assert int(one["sport"]) == told["port"]
        if wire.is_named(int(one["how"])):
            assert int(one["tgid"]) == told["pid"]
        else:
            assert wire.how_name(int(one["how"])) in ("socket_gone", "not_probed")


@families
def test_without_sock_diag_proc_net_names_as_well(
    run: StartRun, worker: StartWorker, family: Any
) -> None:
    taken = run(sock_diag=False)
    server = worker(f"""
f = socket.{family}; a = socket.socket(f); a.bind((loopback(f), 0)); a.listen()
u = socket.socket(f, socket.SOCK_DGRAM); u.bind((loopback(f), 0))
tell(tcp=a.getsockname()[1], udp=u.getsockname()[1]); c, _ = a.accept(); sys.stdin.read()
""")
    told = facts(server)
    client = worker(f"""
f = socket.{family}
c = socket.create_connection((loopback(f), {told["tcp"]}))
u = socket.socket(f, socket.SOCK_DGRAM); u.connect((loopback(f), {told["udp"]}))
for _ in range(10): time.sleep(0.1); c.send(b"x" * 9); u.send(b"x")
tell(); sys.stdin.read()
""")
    facts(client)
    taken.wait(20, told["udp"])
    records = taken.records(told["tcp"], told["udp"])
    for last in (
        records[records["dport"] == told["udp"]][-10:],
        records[(records["dport"] == told["tcp"]) & (records["tcp_flags"] & 8 != 0)][-10:],
    ):
        assert owners(last) == {(OUT, client.pid), (IN, server.pid)}
        # a table of /proc/net that was read a little late may lack the socket: then it is the
        # listener's owner
        hows = set(last["how"].tolist())
        assert wire.lib.SNIFFER_HOW_PROC in hows
        assert hows <= {wire.lib.SNIFFER_HOW_PROC, wire.lib.SNIFFER_HOW_LISTENER}
    assert taken.engine.stats()["sock_diag"] is False
