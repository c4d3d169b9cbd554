# SPDX-License-Identifier: MIT
"""Connections that are gone when engine packet asks: their listener's owner, or nobody.

Each engine here is read only after the connection has ended, so that the answer is no luck.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet import PacketEngine
from nlproto.host.procfs import TICK_NS
from nlproto.records import wire

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for AF_PACKET")

IN, OUT = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_DIR_OUT
SHARED, AMBIGUOUS = wire.lib.SNIFFER_F_SHARED, wire.lib.SNIFFER_F_AMBIGUOUS
LISTENER, GONE = wire.lib.SNIFFER_HOW_LISTENER, wire.lib.SNIFFER_HOW_SOCKET_GONE
SYN, RST, ACK = 2, 4, 16

SERVER = """
import json, os, socket, sys
def tell(**facts): os.write(1, (json.dumps({"pid": os.getpid(), **facts}) + chr(10)).encode())
def listening(port=0, *options):
    s = socket.socket()
    for option in options: s.setsockopt(socket.SOL_SOCKET, option, 1)
    s.bind(("127.0.0.1", port)); s.listen(); return s
"""
ANSWER = """
def answer(s, first):
    c, _ = s.accept()
    c.recv(100); c.sendall(b"y" * 1000)
    if not first: c.recv(100)
    c.close(); tell()
"""


@pytest.fixture
def worker() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(code: Any) -> Any:
            child = subprocess.Popen(
                [sys.executable, "-c", SERVER + ANSWER + code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.callback(end, child)
            return child

        yield start


def end(child: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # it may have forked
    child.wait()
    child.stdin.close()
    child.stdout.close()


def facts(child: Any) -> Any:
    line = child.stdout.readline()
    assert line, "the worker died"
    return json.loads(line)


@pytest.fixture(params=[True, False], ids=["sock_diag", "proc_net"])
def engine(request: pytest.FixtureRequest) -> Iterator[PacketEngine]:
    with PacketEngine(lambda note: None, everywhere=False, sock_diag=request.param) as opened:
        yield opened


def records(engine: Any, port: int) -> Any:
    """What `engine` has to say now of packets with `port` at either end."""
    parts = [batch.records.copy() for batch in engine.finish() if hasattr(batch, "records")]
    found = np.concatenate([np.zeros(0, wire.RECORD), *parts])
    return found[(found["sport"] == port) | (found["dport"] == port)]


def local(found: Any, port: int) -> Any:
    """Those of the end whose port is `port`."""
    here = np.where(found["dir"] == OUT, found["sport"], found["dport"])
    return found[here == port]


def request(port: int, source: Any = None, options: Any = (), to_end: bool = False) -> Any:
    """One request and its answer, or all until the server closes; the client's port."""
    with socket.socket() as client:
        for option in options:
            client.setsockopt(socket.SOL_SOCKET, option, 1)
        if source:
            client.bind(source)
        client.connect(("127.0.0.1", port))
        name = client.getsockname()
        client.sendall(b"x")
        size = 0
        while size < 1000:
            size += len(client.recv(1000))
        while to_end and client.recv(1000):
            pass
    return name[1]


@pytest.mark.parametrize("first", [True, False], ids=["server_first", "client_first"])
def test_an_accepted_socket_that_is_gone_is_its_listeners(
    engine: PacketEngine, worker: Any, first: bool
) -> None:
    server = worker(f"s = listening(); tell(port=s.getsockname()[1]); answer(s, {first})\n"
                    "sys.stdin.read()")  # fmt: skip
    port = facts(server)["port"]
    request(port)
    facts(server)
    found = local(records(engine, port), port)
    assert len(found) >= 8
    assert set(found["tgid"].tolist()) == {server.pid}
    assert set(found["how"].tolist()) == {LISTENER}
    assert np.all(found["flags"] & AMBIGUOUS)


def test_what_a_client_that_is_gone_received_had_a_socket(
    engine: PacketEngine, worker: Any
) -> None:
    server = worker("s = listening(); tell(port=s.getsockname()[1]); answer(s, True)\n"
                    "sys.stdin.read()")  # fmt: skip
    port = facts(server)["port"]
    client = request(port, to_end=True)
    facts(server)
    found = local(records(engine, port), client)
    assert len(found) >= 6
    assert not np.any(found["tgid"])
    assert set(found["how"].tolist()) == {GONE}


def test_a_listener_whose_process_came_later_accepted_nothing(
    engine: PacketEngine, worker: Any
) -> None:
    first = worker("s = listening(0, socket.SO_REUSEADDR); tell(port=s.getsockname()[1])\n"
                   "answer(s, True); s.close(); tell(); sys.stdin.read()")  # fmt: skip
    port = facts(first)["port"]
    request(port)
    facts(first)
    facts(first)
    second = worker(f"s = listening({port}, socket.SO_REUSEADDR); tell(); sys.stdin.read()")
    facts(second)
    found = local(records(engine, port), port)
    assert len(found) >= 8
    assert not np.any(found["tgid"] == second.pid)


def test_a_listener_that_took_over_is_not_named_for_what_came_before(
    engine: PacketEngine, worker: Any
) -> None:
    second = worker(
        "port = int(sys.stdin.readline()); s = listening(port, socket.SO_REUSEADDR); tell()\n"
        "sys.stdin.read()"
    )
    first = worker(
        "s = listening(0, socket.SO_REUSEADDR); tell(port=s.getsockname()[1])\n"
        "answer(s, True); answer(s, True); s.close(); tell(); sys.stdin.read()"
    )
    port = facts(first)["port"]
    request(port)
    facts(first)
    list(engine.read(0.1))  # the first listener is known from here on
    request(port)
    for _ in range(2):
        facts(first)
    second.stdin.write(f"{port}\n")
    second.stdin.flush()
    facts(second)
    found = local(records(engine, port), port)
    assert len(found) >= 8
    assert not np.any(found["tgid"] == second.pid)


@pytest.mark.parametrize("way", ["fork", "reuseport"])
def test_of_several_that_could_accept_one_is_named_and_doubted(
    engine: PacketEngine, worker: Any, way: str
) -> None:
    share = {
        "fork": "s = listening()\nif os.fork() == 0: sys.stdin.read(); os._exit(0)\n",
        "reuseport": "s = listening(0, socket.SO_REUSEPORT)\nif os.fork() == 0:\n"
        "    t = listening(s.getsockname()[1], socket.SO_REUSEPORT); s.close(); tell()\n"
        "    answer(t, True); sys.stdin.read(); os._exit(0)\n",
    }[way]
    server = worker(share + "tell(port=s.getsockname()[1]); answer(s, True); sys.stdin.read()")
    told = [facts(server) for _ in range(2 if way == "reuseport" else 1)]
    port = next(one["port"] for one in told if "port" in one)
    request(port)
    facts(server)
    found = local(records(engine, port), port)
    assert len(found) >= 8
    assert np.all(found["tgid"])
    assert np.all(found["flags"] & (SHARED | AMBIGUOUS) == SHARED | AMBIGUOUS)


def test_a_process_that_listens_twice_on_a_port_shares_with_nobody(
    engine: PacketEngine, worker: Any
) -> None:
    server = worker(
        "s = listening(0, socket.SO_REUSEPORT); p = s.getsockname()[1]\n"
        "t = listening(p, socket.SO_REUSEPORT); tell(port=p)\n"
        "import select; answer(select.select([s, t], [], [])[0][0], True); sys.stdin.read()"
    )
    port = facts(server)["port"]
    request(port)
    facts(server)
    found = local(records(engine, port), port)
    assert set(found["tgid"].tolist()) == {server.pid}
    assert not np.any(found["flags"] & SHARED)


def test_a_refused_connection_is_nobodys_though_one_listens_later(engine: PacketEngine) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        late.bind(("127.0.0.1", port))
        late.listen()
        found = local(records(engine, port), port)
    assert [wire.how_name(how) for how in found["how"].tolist()] == ["no_socket", "no_socket"]


def test_a_connection_made_from_the_port_of_a_listener_is_not_the_listeners(
    engine: PacketEngine, worker: Any
) -> None:
    """Somebody listens on the port that a client connects from (hole punching does it)."""
    server = worker("s = listening(); tell(port=s.getsockname()[1]); answer(s, True)\n"
                    "sys.stdin.read()")  # fmt: skip
    port = facts(server)["port"]
    bystander = worker("s = listening(0, socket.SO_REUSEPORT, socket.SO_REUSEADDR)\n"
                       "tell(port=s.getsockname()[1]); sys.stdin.read()")  # fmt: skip
    source = facts(bystander)["port"]
    request(port, ("127.0.0.1", source), (socket.SO_REUSEPORT, socket.SO_REUSEADDR))
    facts(server)
    found = local(records(engine, source), source)
    assert len(found) >= 6
    assert not np.any(found["tgid"] == bystander.pid)


def test_a_probe_of_an_open_port_is_nobodys(engine: PacketEngine, worker: Any) -> None:
    """An ACK out of the blue (nmap -sA): there never was a connection."""
    server = worker("s = listening(); tell(port=s.getsockname()[1]); sys.stdin.read()")
    port = facts(server)["port"]
    header = struct.pack("!HHIIBBHHH", 40001, port, 1, 1, 5 << 4, ACK, 1024, 0, 0)
    ends = socket.inet_aton("127.0.0.1") * 2 + struct.pack("!BBH", 0, 6, len(header))
    words = sum(struct.unpack(f"!{(len(ends) + len(header)) // 2}H", ends + header))
    words = (words & 0xFFFF) + (words >> 16)
    check = ~((words & 0xFFFF) + (words >> 16)) & 0xFFFF
    header = header[:16] + struct.pack("!H", check) + header[18:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(header, ("127.0.0.1", 0))
    found = local(records(engine, port), port)
    assert [(int(one["dir"]), int(one["tcp_flags"])) for one in found] == [(IN, ACK), (OUT, RST)]
    assert not np.any(found["tgid"])


def test_a_datagram_to_a_socket_that_is_gone_had_one(engine: PacketEngine) -> None:
    """Nothing says that there was none: only a refused SYN is no_socket."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        to.bind(("127.0.0.1", 0))
        port = to.getsockname()[1]
        sender.sendto(b"x", ("127.0.0.1", port))
        assert to.recv(10) == b"x"
    found = local(records(engine, port), port)
    assert found["how"].tolist() == [GONE]


TAKES_TURNS = """
def client(source, port, stay, kind=socket.SOCK_STREAM):
    s = socket.socket(socket.AF_INET, kind)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if kind == socket.SOCK_STREAM:  # closed by a reset: no TIME_WAIT
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
    s.bind(("127.0.0.1", source)); s.connect(("127.0.0.1", port)); s.sendall(b"x")
    tell(port=s.getsockname()[1])
    if stay: sys.stdin.read()
    s.close()
"""


def another_tick() -> None:
    """What begins from now on has another start time than what was there."""
    tick = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // TICK_NS
    while time.clock_gettime_ns(time.CLOCK_BOOTTIME) // TICK_NS <= tick:
        pass


@pytest.mark.parametrize("older", [True, False], ids=["older", "younger"])
def test_who_takes_over_a_tuple_is_not_named_for_what_came_before(
    engine: PacketEngine, worker: Any, older: bool
) -> None:
    """Whether the one who has it now was there at that time, or began later."""
    listener = worker(
        "s = listening(); tell(port=s.getsockname()[1])\n"
        "held = [s.accept() for _ in range(2)]; sys.stdin.read()"
    )
    port = facts(listener)["port"]
    turn = f"client(int(sys.stdin.readline()), {port}, True)"
    second = worker(TAKES_TURNS + turn) if older else None
    one = worker(TAKES_TURNS + f"client(0, {port}, False)")
    first = facts(one)
    assert one.wait() == 0
    if second is None:
        another_tick()
        second = worker(TAKES_TURNS + turn)
    second.stdin.write(f"{first['port']}\n")
    second.stdin.flush()
    taken_over = facts(second)
    assert taken_over["port"] == first["port"]
    ours = local(records(engine, port), first["port"])
    begins = ours[(ours["tcp_flags"] & (SYN | ACK) == SYN)]["time_ns"].max()
    before, after = ours[ours["time_ns"] < begins], ours[ours["time_ns"] >= begins]
    assert len(before) > 3 and taken_over["pid"] not in before["tgid"], before["how"]
    assert set(after["tgid"].tolist()) == {taken_over["pid"]}


def test_who_takes_over_a_udp_port_is_not_named_for_what_was_sent_before_it_began(
    engine: PacketEngine, worker: Any
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        port = receiver.getsockname()[1]
        first = worker(TAKES_TURNS + f"client(0, {port}, False, socket.SOCK_DGRAM)")
        source = facts(first)["port"]
        assert first.wait() == 0
        another_tick()
        taken = worker(TAKES_TURNS + f"client({source}, {port}, True, socket.SOCK_DGRAM)")
        pid = facts(taken)["pid"]
        ours = np.sort(local(records(engine, port), source), order="time_ns")
    assert len(ours) == 2  # the one that sends is looked up for both
    assert pid not in ours["tgid"][:1], ours["how"]
