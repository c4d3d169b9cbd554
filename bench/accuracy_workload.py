# SPDX-License-Identifier: MIT
"""The workload of the accuracy comparison: what a small service host does in a few seconds.

One side of a veth pair is "this host". It has a client with a lasting connection and one with a
bulk transfer. It also has a server for remote clients and a chatty UDP process. Many processes
live only for one TCP or one UDP request. Only this side's packets are judged; the other side is
just the peer.
"""

from __future__ import annotations

import time

from attribution.stage import Child, Netns, Stage, Wire
from attribution.traffic import TCP, UDP, V4, ask, bound, listening, receive_all, udp_echo
from attribution.truth import Worker

HOST, PEER = "10.9.0.1", "10.9.0.2"
INTERFACE = "ve0"
LASTING = 100
BRIEF = 60
BULK = 3_000_000


def echo_server(worker: Worker, wire: Wire, host: str, connections: int) -> None:
    sock = listening(V4, host)
    worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname())
    for _ in range(connections):
        peer, _ = sock.accept()
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)


def sink(worker: Worker, wire: Wire) -> None:
    sock = listening(V4, PEER)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    receive_all(peer, BULK)
    peer.sendall(b"ok")


def lasting(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP, HOST)
    worker.claim(sock)
    sock.connect(tuple(peer))
    for _ in range(LASTING):
        sock.sendall(bytes(2000))
        receive_all(sock, 2000)
        time.sleep(0.03)


def bulk(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP, HOST)
    worker.claim(sock)
    sock.connect(tuple(peer))
    sock.sendall(bytes(BULK))
    receive_all(sock, 2)


def chatty(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP, HOST)
    worker.claim(sock)
    for _ in range(LASTING):
        sock.sendto(bytes(200), tuple(peer))
        sock.recv(1000)
        time.sleep(0.03)


def brief_tcp(worker: Worker, wire: Wire, peer: tuple[str, int], host: str, size: int) -> None:
    sock = bound(V4, TCP, host)
    worker.claim(sock)
    sock.connect(tuple(peer))
    sock.sendall(bytes(size))
    receive_all(sock, size)
    sock.close()


def brief_udp(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP, HOST)
    worker.claim(sock)
    sock.sendto(bytes(60), tuple(peer))
    sock.recv(1000)


def set_up(stage: Stage) -> Netns:
    """The peer's namespace, connected."""
    other = stage.namespace()
    stage.veth(other, (INTERFACE, "ve1"), (f"{HOST}/24", f"{PEER}/24"))
    return other


def play(stage: Stage, other: Netns) -> None:
    """All of it; returns when the last worker has ended."""
    steady = ask(stage.spawn("peer", echo_server, PEER, 1, netns=other))
    brief = ask(stage.spawn("peer", echo_server, PEER, BRIEF, netns=other))
    far_sink = ask(stage.spawn("peer", sink, netns=other))
    far_udp = [
        ask(stage.spawn("peer", udp_echo, V4, count, PEER, netns=other))
        for count in (LASTING, BRIEF)
    ]
    service = ask(stage.spawn("service", echo_server, HOST, BRIEF))
    # What only now begins is seen by tools that look ten times a second.
    time.sleep(0.5)
    workers: list[Child] = [
        stage.spawn("lasting", lasting, steady),
        stage.spawn("chatty", chatty, far_udp[0]),
        stage.spawn("bulk", bulk, far_sink),
    ]
    for _ in range(BRIEF):
        workers += [
            stage.spawn("brieftcp", brief_tcp, brief, HOST, 500),
            stage.spawn("briefudp", brief_udp, far_udp[1]),
            stage.spawn("remote", brief_tcp, service, PEER, 500, netns=other),
        ]
        time.sleep(0.03)
    stage.join()
