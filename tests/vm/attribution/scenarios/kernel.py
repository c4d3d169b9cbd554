# SPDX-License-Identifier: MIT
"""What the kernel sends by itself, or in the context of a process that has no part in it."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any

from ..catalog import scenario
from ..stage import Child, Stage, Unable, Wire, run, sysctl
from ..traffic import (
    TCP,
    V4,
    V6,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    tcp_server,
)
from ..truth import Worker, identity_of
from .namespaces import LEFT_PORT, RIGHT_PORT, far_asker, far_echo, router, rules
from .owners import quiet

COUNT = 10


def closes(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    worker.claim(sock, remote=sock.getpeername()[:2], any_address=True, in_=1, out=1)


def accept_two(
    worker: Worker, wire: Wire, stage: Stage, family: int, host: str = "", port: int = 0
) -> None:
    sock = listening(family, host, port)
    claim = worker.claim(sock, any_address=True, in_=5, out=3)
    wire.tell(sock.getsockname()[:2])
    first, _ = sock.accept()
    second, _ = sock.accept()
    worker.also(claim, first)
    worker.also(claim, second)
    quiet()
    stage.spawn("child", closes, first, keep=[first]).join()
    wire.tell("closed")
    wire.hear()
    second.sendall(b"late")


def connect_twice(
    worker: Worker, wire: Wire, peer: tuple[str, int], family: int, host: str = ""
) -> None:
    one, two = bound(family, TCP, host), bound(family, TCP, host)
    worker.claim(one, in_=2, out=3)
    worker.claim(two, in_=2, out=3)
    one.connect(tuple(peer))
    two.connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    one.sendall(b"late")
    two.close()
    wire.tell("closed")
    wire.hear()


def close_and_send(server: Child, client: Child) -> None:
    """Each end closes one connection, and the other end sends on it then."""
    client.hear()
    server.hear()
    client.tell()
    client.hear()
    server.tell()
    server.join()
    client.tell()


@scenario()
def tcp_data_after_close(stage: Stage) -> None:
    """Data for a socket that is closed, its FIN still under way: the RST is the closer's."""
    rules(
        "table inet t { chain out { type filter hook output priority 0;"
        " tcp flags & fin == fin drop; }; }"
    )
    with playing(stage):
        for family in (V4, V6):
            server = stage.spawn("server", accept_two, stage, family)
            close_and_send(server, stage.spawn("client", connect_twice, ask(server), family))


@scenario()
def tcp_data_after_close_behind_nat(stage: Stage) -> None:
    """The same at a service's address (as kube-proxy's), which NAT changes on the way out."""
    stage.beside()
    run("ip", "route", "add", "default", "via", "10.9.0.2")
    rules(
        "table ip t {"
        " chain nat { type nat hook output priority -100;"
        " ip daddr 10.8.0.1 tcp dport 80 dnat to 10.9.0.1:8080; };"
        " chain out { type filter hook output priority 0;"
        " tcp flags & fin == fin drop; }; }"
    )
    with playing(stage):
        server = stage.spawn("server", accept_two, stage, V4, "10.9.0.1", 8080)
        server.hear()
        peer = ("10.8.0.1", 80)
        close_and_send(server, stage.spawn("client", connect_twice, peer, V4, "10.9.0.1"))


def closes_first(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=3, out=2)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.close()
    sock.close()
    wire.hear()
    worker.end(claim)


def successor(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = listening(V4, *peer)
    claim = worker.claim(sock, any_address=True, in_=4, out=2)
    wire.tell("ready")
    accepted, _ = sock.accept()
    worker.also(claim, accepted)
    receive_all(accepted, 5)


def returning(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    claim = worker.claim(sock, in_=2, out=3)
    sock.connect(tuple(peer))
    receive_all(sock, 1)
    name = sock.getsockname()
    sock.close()
    wire.tell("closed")
    wire.hear()
    worker.end(claim)
    sock = bound(V4, TCP, *name)
    worker.claim(sock, in_=2, out=3)
    sock.connect(tuple(peer))
    sock.sendall(b"again")


@scenario()
def tcp_time_wait_reopened(stage: Stage) -> None:
    """A SYN for a connection in TIME_WAIT goes to the present listener, not to its last owner."""
    with playing(stage):
        first = stage.spawn("first", closes_first)
        peer = ask(first)
        client = stage.spawn("client", returning, peer)
        client.hear()
        quiet()
        first.tell()
        first.join()
        stage.spawn("second", successor, peer).hear()
        client.tell()


def defers(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, TCP)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    sock.listen(8)
    claim = worker.claim(sock, any_address=True, in_=2, out=1, has_cookie=False)
    wire.tell(sock.getsockname())
    wire.hear()
    sock.close()
    worker.end(claim)


def listens_after(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    wire.hear()
    sock = listening(V4, *peer)
    worker.claim(sock, any_address=True, in_=1, out=1)
    wire.tell("ready")
    wire.hear()


def speaks_late(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, in_=2, out=3)
    sock.connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    sock.sendall(b"late")
    select.select([sock], [], [], 30)


@scenario()
def tcp_listener_replaced(stage: Stage) -> None:
    """A listener closes in the midst of a handshake: what still comes is its successor's."""
    with playing(stage):
        first = stage.spawn("first", defers)
        peer = ask(first)
        second = stage.spawn("second", listens_after, peer)
        client = stage.spawn("client", speaks_late, peer)
        client.hear()
        first.tell()
        first.join()
        second.tell()
        second.hear()
        client.tell()
        client.join()
        second.tell()


@scenario()
def udp_encapsulation(stage: Stage) -> None:
    """IP in UDP (fou): the inner packets are the applications', the outer ones the kernel's."""
    other = stage.beside()
    run("modprobe", "fou")
    run("modprobe", "ipip")
    text = (
        "fou add port 5555 ipproto 4\n"
        "link add fo type ipip local {} remote {} encap fou encap-sport 42001 encap-dport 5555\n"
        "addr add {}/24 dev fo\nlink set fo up\n"
    )
    run("ip", "-batch", "-", data=text.format("10.9.0.1", "10.9.0.2", "10.7.0.1"))
    run("nsenter", f"--net={other.path}", "ip", "-batch", "-",
        data=text.format("10.9.0.2", "10.9.0.1", "10.7.0.2"))  # fmt: skip
    with playing(stage):
        for netns in (stage.netns, other.inode):
            stage.worker.claim_nobody(
                proto="udp", lport=5555, netns=netns, dirs="i", reasons=("kernel",), in_=COUNT
            )
            stage.worker.claim_nobody(
                proto="udp", lport=42001, netns=netns, dirs="o", reasons=("kernel",), out=COUNT
            )
        stage.spawn("far", far_echo, "10.7.0.2", RIGHT_PORT, COUNT, netns=other).hear()
        stage.spawn("near", far_asker, "10.7.0.1", LEFT_PORT, ("10.7.0.2", RIGHT_PORT), 50)


# linux/ip_vs.h
IP_VS_ADD, IP_VS_ADD_DESTINATION = 64 + 1024 + 64 + 2, 64 + 1024 + 64 + 7


def virtual_server(host: str, port: int, real: tuple[str, int]) -> None:
    """ipvsadm -A -t HOST:PORT -s rr; ipvsadm -a -t HOST:PORT -r REAL -m."""
    run("modprobe", "ip_vs_rr")
    service = struct.pack(
        "@H2x4s2s2xI16sIII", socket.IPPROTO_TCP, socket.inet_aton(host),
        struct.pack("!H", port), 0, b"rr", 0, 0, 0xFFFFFFFF,
    )  # fmt: skip
    destination = struct.pack(
        "@4s2s2xIiII", socket.inet_aton(real[0]), struct.pack("!H", real[1]), 0, 1, 0, 0
    )
    with socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_RAW) as control:
        control.setsockopt(socket.IPPROTO_IP, IP_VS_ADD, service)
        control.setsockopt(socket.IPPROTO_IP, IP_VS_ADD_DESTINATION, service + destination)


def balanced_client(worker: Worker, wire: Wire, host: str, port: int, peer: Any) -> None:
    sock = bound(V4, TCP, host, port)
    worker.claim(sock, in_=3, out=4)
    sock.connect(tuple(peer))
    sock.sendall(b"talk!")
    receive_all(sock, 5)


@scenario()
def load_balanced(stage: Stage) -> None:
    """IPVS sends on what came in: forwarded, though a process here has the client's port."""
    left, right = router(stage)
    real = ("10.9.2.2", 8080)
    virtual_server("10.9.1.1", 80, real)
    with playing(stage):
        decoy = listening(V4, "0.0.0.0", LEFT_PORT)
        for one, two in ((LEFT_PORT, 8080), (80, LEFT_PORT)):
            stage.worker.claim_nobody(
                proto="tcp", lport=one, rport=two, dirs="f", reasons=("forwarded",), out=0
            )
        server = stage.spawn("server", fixed_server, *real, netns=right)
        server.hear()
        client = stage.spawn(
            "client", balanced_client, "10.9.1.2", LEFT_PORT, ("10.9.1.1", 80), netns=left
        )
        client.join()
        server.join()
        decoy.close()


def fixed_server(worker: Worker, wire: Wire, host: str, port: int) -> None:
    sock = listening(V4, host, port)
    claim = worker.claim(sock, any_address=True, in_=4, out=3)
    wire.tell("ready")
    peer, _ = sock.accept()
    worker.also(claim, peer)
    while data := peer.recv(100):
        peer.sendall(data)


def migrating(worker: Worker, wire: Wire, port: int, accepts: int) -> None:
    sock = socket.socket(V4, TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.settimeout(30)
    sock.bind(("127.0.0.1", port))
    sock.listen(16)
    wire.tell(sock.getsockname())
    wire.hear()
    claim = worker.claim(sock, any_address=True, in_=accepts, has_cookie=False)
    if accepts == 0:
        sock.close()
        worker.end(claim)
        return
    wire.tell("ready")
    wire.hear()
    for _ in range(accepts):
        peer, _ = sock.accept()
        receive_all(peer, 5)


def connects_early(worker: Worker, wire: Wire, peer: tuple[str, int], count: int) -> None:
    socks = []
    for _ in range(count):
        sock = bound(V4, TCP)
        worker.claim(sock, in_=1, out=3)
        sock.connect(tuple(peer))
        socks.append(sock)
    wire.tell("connected")
    wire.hear()
    try:
        for sock in socks:
            sock.sendall(b"early")
        wire.tell("sent")
    except ConnectionError:
        wire.tell("reset")
    wire.hear()


@scenario()
def tcp_queue_migrated(stage: Stage) -> None:
    """tcp_migrate_req: connections nobody had accepted go from a closed listener to another."""
    sysctl("net.ipv4.tcp_migrate_req", 1)
    with playing(stage):
        first = stage.spawn("first", migrating, 0, 0)
        peer = ask(first)
        # until it closes, all are the first one's
        claim = stage.worker.claim_port(
            peer[1], proto="tcp", dirs="io", in_=8, out=4, owner=identity_of(first.pid)
        )
        client = stage.spawn("client", connects_early, peer, 4)
        client.hear()
        second = stage.spawn("second", migrating, peer[1], 4)
        second.hear()
        quiet()
        stage.worker.end(claim)
        first.tell()
        first.join()
        second.tell()
        second.hear()
        client.tell()
        if client.hear() == "reset":  # 5.10 of Debian
            raise Unable("this kernel has the sysctl tcp_migrate_req, but nothing behind it")
        second.tell()
        second.join()
        client.tell()


def leaves_behind(
    worker: Worker, wire: Wire, peer: tuple[str, int], link: socket.socket, other: socket.socket
) -> None:
    other.close()
    sock = bound(V4, TCP)
    worker.claim(sock, in_=1, out=3)
    sock.connect(tuple(peer))
    socket.send_fds(link, [b"take it"], [sock.fileno()])
    sock.close()
    link.close()
    wire.tell("left")
    wire.hear()


def throws_away(worker: Worker, wire: Wire, link: socket.socket, other: socket.socket) -> None:
    other.close()
    wire.hear()
    link.close()


@scenario()
def tcp_closed_by_a_stranger(stage: Stage) -> None:
    """The last reference waits in a UNIX socket that another process closes: not its FIN."""
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 1))
        left, right = socket.socketpair(socket.AF_UNIX)
        stranger = stage.spawn("stranger", throws_away, right, left)
        client = stage.spawn("client", leaves_behind, peer, left, right)
        left.close()
        right.close()
        client.hear()
        stranger.tell()
        stranger.join()
        client.tell()
