# SPDX-License-Identifier: MIT
"""MPTCP: subflows, and listeners that plain TCP reaches."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np

from ..catalog import scenario
from ..stage import Netns, Stage, Unable, Wire, run, sysctl
from ..traffic import (
    TCP,
    V4,
    ask,
    playing,
    receive_all,
    tcp_client,
    tcp_server,
)
from ..truth import Worker
from .owners import quiet

IPPROTO_MPTCP = 262


def mptcp_server(worker: Worker, wire: Wire, host: str, size: int) -> None:
    sock = socket.socket(V4, TCP, IPPROTO_MPTCP)
    sock.settimeout(30)
    sock.bind((host, 0))
    sock.listen(8)
    worker.claim(sock, any_address=True, proto="tcp", in_=4, out=2, has_cookie=False)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    if len(receive_all(peer, size)) != size:
        raise RuntimeError("data lost")
    peer.sendall(b"ok")
    receive_all(peer, 1)


def mptcp_client(
    worker: Worker, wire: Wire, peer: tuple[str, int], size: int, stops: bool = False
) -> None:
    # Subflows take ports of their own, so the claim is on the server's port instead: a second
    # claim with the ends exchanged would need the ports; the stage's port range is fixed to two.
    sock = socket.socket(V4, TCP, IPPROTO_MPTCP)
    sock.settimeout(30)
    low, high = (int(x) for x in open("/proc/sys/net/ipv4/ip_local_port_range").read().split())
    for port in range(low, high + 1):
        worker.claim_port(port, proto="tcp", dirs="io", rport=peer[1])
    sock.connect(tuple(peer))
    for number in range(4):
        sock.sendall(bytes(size // 4))
        time.sleep(0.05)  # lets the path manager add its subflow between two bursts
        if stops and number in (0, 2):
            wire.tell("stopped")
            wire.hear()
    receive_all(sock, 2)
    wire.tell("done")


def mptcp_possible() -> None:
    try:
        socket.socket(V4, TCP, IPPROTO_MPTCP).close()
    except OSError as error:
        raise Unable(f"this kernel has no MPTCP ({error.strerror})") from error


@scenario()
def mptcp_first_subflow(stage: Stage) -> None:
    """MPTCP with one subflow: the socket of the application owns it."""
    mptcp_possible()
    sysctl("net.ipv4.ip_local_port_range", "40000 40009")
    with playing(stage):
        server = stage.spawn("server", mptcp_server, "127.0.0.1", 40000)
        stage.spawn("client", mptcp_client, ask(server), 40000).hear()


def mptcp_fallback_server(worker: Worker, wire: Wire, connections: int) -> None:
    """Accepts each connection only when it has been spoken to, as long as there are clients."""
    sock = socket.socket(V4, TCP, IPPROTO_MPTCP)
    sock.settimeout(30)
    sock.bind(("127.0.0.1", 0))
    sock.listen(8)
    worker.claim(sock, any_address=True, in_=4 * connections, out=3 * connections, has_cookie=False)
    wire.tell(sock.getsockname())
    for number in range(connections):
        if number:
            quiet()
        peer, _ = sock.accept()
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)


@scenario()
def mptcp_listener_plain_client(stage: Stage) -> None:
    """Clients of plain TCP at an MPTCP listener (a Go server's): its connections as ever."""
    mptcp_possible()
    with playing(stage):
        peer = ask(stage.spawn("server", mptcp_fallback_server, 4))
        stage.spawn("client", tcp_client, peer, V4, 4, 3).hear()


@scenario()
def mptcp_client_plain_listener(stage: Stage) -> None:
    """An MPTCP client at a server of plain TCP: both their own."""
    mptcp_possible()
    sysctl("net.ipv4.ip_local_port_range", "40000 40009")
    with playing(stage):
        server = stage.spawn("server", tcp_server, V4, 1)
        stage.spawn("client", mptcp_talker, ask(server))


def mptcp_talker(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = socket.socket(V4, TCP, IPPROTO_MPTCP)
    sock.settimeout(30)
    for port in range(40000, 40010):
        worker.claim_port(port, proto="tcp", dirs="io", rport=peer[1])
    sock.connect(tuple(peer))
    for _ in range(3):
        sock.sendall(b"talk!")
        receive_all(sock, 5)


def mptcp_hosts(stage: Stage) -> Netns:
    """Two networks to another host, which may open further subflows; returns that host."""
    mptcp_possible()
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"),
               ("10.9.1.1/24", "10.9.1.2/24"))  # fmt: skip
    limits = ("ip", "mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
    other.run(*limits)
    run(*limits)
    other.run("sh", "-c", "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range")
    return other


@scenario()
def mptcp_more_subflows(stage: Stage) -> None:
    """MPTCP with a second subflow that the kernel opens by itself."""
    other = mptcp_hosts(stage)
    other.run("ip", "mptcp", "endpoint", "add", "10.9.1.2", "dev", "ve1", "subflow")
    with playing(stage):
        server = stage.spawn("server", mptcp_server, "10.9.0.1", 400_000)
        stage.spawn("client", mptcp_client, ask(server), 400_000, netns=other).hear()


def join_seen(records: np.ndarray, recorder: object, directory: Path) -> list[str]:
    syns = np.count_nonzero((records["tcp_flags"] == 2) & (records["dir"] == 1))
    return [] if syns == 2 else [f"{syns} subflows came, 2 meant"]


@scenario(check=join_seen)
def mptcp_subflow_by_command(stage: Stage) -> None:
    """`ip mptcp endpoint` opens and ends a subflow of a connection that is up: not ip's."""
    other = mptcp_hosts(stage)
    with playing(stage):
        server = stage.spawn("server", mptcp_server, "10.9.0.1", 400_000)
        client = stage.spawn("client", mptcp_client, ask(server), 400_000, True, netns=other)
        client.hear()
        other.run("ip", "mptcp", "endpoint", "add", "10.9.1.2", "dev", "ve1", "subflow")
        client.tell()
        client.hear()
        other.run("ip", "mptcp", "endpoint", "flush")
        client.tell()
        client.hear()


def mptcp_has_it(worker: Worker, wire: Wire, sock: socket.socket, count: int, reads: bool) -> None:
    """Has a connection from its parent, and answers what comes or never looks at it."""
    worker.claim(
        sock, remote=sock.getpeername(), any_address=True, proto="tcp", has_cookie=False,
        in_=count, out=count,
    )  # fmt: skip
    wire.tell("mine")
    for _ in range(count if reads else 0):
        sock.sendall(receive_all(sock, 5))
    wire.hear()


def mptcp_hands_on(worker: Worker, wire: Wire, stage: Stage, count: int, reads: bool) -> None:
    listener = socket.socket(V4, TCP, IPPROTO_MPTCP)
    listener.settimeout(30)
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    claim = worker.claim(listener, any_address=True, proto="tcp", has_cookie=False, in_=3, out=2)
    wire.tell(listener.getsockname())
    sock, _ = listener.accept()
    sock.sendall(receive_all(sock, 5))
    wire.hear()
    child = stage.spawn("child", mptcp_has_it, sock, count, reads, keep=[sock])
    child.hear()
    worker.end(claim)
    wire.tell("handed over")
    wire.hear()
    child.tell()
    child.join()


def mptcp_asks(worker: Worker, wire: Wire, peer: tuple[str, int], count: int, reads: bool) -> None:
    sock = socket.socket(V4, TCP, IPPROTO_MPTCP)
    sock.settimeout(30)
    for port in range(40000, 40010):
        worker.claim_port(port, proto="tcp", dirs="io", rport=peer[1])
    sock.connect(tuple(peer))
    sock.sendall(b"first")
    receive_all(sock, 5)
    quiet()
    wire.tell("answered")
    wire.hear()
    for _ in range(count):
        sock.sendall(b"later")
        if reads:
            receive_all(sock, 5)
        else:
            quiet()
    wire.tell("done")
    wire.hear()


def mptcp_handed_on(stage: Stage, reads: bool) -> None:
    mptcp_possible()
    sysctl("net.ipv4.ip_local_port_range", "40000 40009")
    with playing(stage):
        server = stage.spawn("parent", mptcp_hands_on, stage, 6, reads)
        client = stage.spawn("client", mptcp_asks, ask(server), 6, reads)
        client.hear()
        server.tell()
        server.hear()
        client.tell()
        client.hear()
        server.tell()
        server.join()
        client.tell()


@scenario(engines=("module",))
def mptcp_accept_fork_close(stage: Stage) -> None:
    """A child answers on an MPTCP connection that its parent has accepted and closed."""
    mptcp_handed_on(stage, reads=True)


@scenario(engines=("module",))
def mptcp_heir_never_reads(stage: Stage) -> None:
    """The same where the child, which alone has it, never looks at it."""
    mptcp_handed_on(stage, reads=False)


def mptcp_leaves(worker: Worker, wire: Wire, peer: tuple[str, int], size: int) -> None:
    sock = socket.socket(V4, TCP, IPPROTO_MPTCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size)
    for port in range(40000, 40010):
        worker.claim_port(port, proto="tcp", dirs="io", rport=peer[1])
    sock.connect(tuple(peer))
    sock.sendall(bytes(size))
    os._exit(0)


def mptcp_reads_late(worker: Worker, wire: Wire, size: int) -> None:
    listener = socket.socket(V4, TCP, IPPROTO_MPTCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    worker.claim(listener, any_address=True, proto="tcp", has_cookie=False, in_=5, out=3)
    wire.tell(listener.getsockname())
    listener.settimeout(30)
    sock, _ = listener.accept()
    wire.hear()
    if len(receive_all(sock, size)) != size:
        raise RuntimeError("data lost")
    quiet()


@scenario(engines=("module",))
def mptcp_orphan_sends(stage: Stage) -> None:
    """A process exits with data unsent in an MPTCP socket: what still leaves is its own."""
    mptcp_possible()
    sysctl("net.ipv4.ip_local_port_range", "40000 40009")
    with playing(stage):
        server = stage.spawn("server", mptcp_reads_late, 100_000)
        stage.spawn("leaves", mptcp_leaves, ask(server), 100_000).join()
        server.tell()
