# SPDX-License-Identifier: MIT
"""What a listener refuses."""

from __future__ import annotations

import socket
import struct
import time

from ..catalog import scenario
from ..stage import Stage, Wire, sysctl
from ..traffic import HOST, TCP, V4, V6, ask, bound, listening, playing
from ..truth import Worker

COUNT = 5
IPV6_CHECKSUM = 7
ACK = 0x10


def holds(worker: Worker, wire: Wire, sock: socket.socket, flag: str) -> None:
    """Waits for connections, and accepts none; what follows its end is not shared any more."""
    claim = worker.claim(sock, any_address=True, flags=(flag,), t0=1, has_cookie=False)
    wire.tell("ready")
    wire.hear()
    worker.claim(sock, any_address=True, has_cookie=False)
    worker.end(claim)


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def stray(worker: Worker, wire: Wire, family: int, port: int) -> None:
    """Sends the listener acknowledgements of nothing."""
    raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
    if family == V6:
        raw.setsockopt(socket.IPPROTO_IPV6, IPV6_CHECKSUM, 16)
    host = socket.inet_pton(family, HOST[family])
    for number in range(COUNT):
        own = 2000 + number
        worker.claim_port(own, proto="tcp", out=1, exact=True)
        worker.claim_nobody(proto="tcp", lport=own, reasons=("no_socket",), dirs="i", in_=1)
        segment = struct.pack("!HHIIBBHHH", own, port, 1000, 5, 5 << 4, ACK, 1000, 0, 0)
        if family == V4:
            pseudo = host + host + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(segment))
            segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
        raw.sendto(segment, (HOST[family], 0))
    time.sleep(0.1)


def refused_strays(stage: Stage, family: int, holders: int) -> None:
    with playing(stage):
        sock = listening(family)
        port = sock.getsockname()[1]
        flag = "ambiguous" if holders > 1 else "not-ambiguous"
        children = [stage.spawn(f"holder{n}", holds, sock, flag) for n in range(holders)]
        sock.close()
        for child in children:
            child.hear()
        stage.spawn("stray", stray, family, port).join()
        for child in children:
            child.tell()


@scenario(max_loose=2 * COUNT, engines=("module",))
def reset_of_shared_listener(stage: Stage) -> None:
    """Two have the listener that refuses a segment: its reset is one of theirs, and ambiguous."""
    refused_strays(stage, V4, 2)


@scenario(max_loose=2 * COUNT, engines=("module",))
def reset_of_shared_listener_v6(stage: Stage) -> None:
    """The same over IPv6."""
    refused_strays(stage, V6, 2)


@scenario(engines=("module",))
def reset_of_listener(stage: Stage) -> None:
    """One has the listener: nothing is ambiguous."""
    refused_strays(stage, V4, 1)


def overflows(worker: Worker, wire: Wire, peer: tuple[str, int], waiting: int) -> None:
    """Is the last to wait for a place in the listener's queue, when there is none."""
    socks = [bound(V4, TCP) for _ in range(1 + waiting)]
    for sock in socks:
        worker.claim(sock, out=2, in_=1)
    socks[0].connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    for sock in socks[1:]:
        sock.connect(tuple(peer))
    socks[0].sendall(b"x")
    try:
        socks[0].recv(1)
        wire.tell(False)
    except ConnectionResetError:
        wire.tell(True)
    wire.hear()


def defers(worker: Worker, wire: Wire, stage: Stage) -> None:
    """Has a listener with another process, whose connections enter the queue with their data."""
    sock = bound(V4, TCP)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    sock.listen(2)
    other = stage.spawn("holder1", holds, sock, "ambiguous")
    other.hear()
    claim = worker.claim(sock, any_address=True, flags=("ambiguous",), t0=1, has_cookie=False)
    wire.tell(sock.getsockname())
    wire.hear()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0)
    wire.tell("at once")
    wire.hear()
    worker.end(claim)
    sock.close()
    other.tell()
    other.join()


@scenario(max_loose=40, engines=("module",))
def reset_by_overflow_of_shared_listener(stage: Stage) -> None:
    """tcp_abort_on_overflow: what the full queue of a shared listener refuses is ambiguous, too."""
    sysctl("net.ipv4.tcp_abort_on_overflow", 1)
    with playing(stage):
        maker = stage.spawn("holder0", defers, stage)
        client = stage.spawn("client", overflows, ask(maker), 3)
        client.hear()
        maker.tell()
        maker.hear()
        client.tell()
        if not client.hear():
            raise RuntimeError("no connection was refused")
        client.tell()
        client.join()
        maker.tell()
