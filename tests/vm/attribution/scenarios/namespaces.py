# SPDX-License-Identifier: MIT
"""Containers, forwarding, firewalls, tunnels: more than one network namespace on the way."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from ..catalog import scenario
from ..stage import (
    CLONE_NEWNET,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    Netns,
    Stage,
    Wire,
    call,
    loopback_up,
    run,
    sysctl,
)
from ..traffic import (
    TCP,
    UDP,
    V4,
    V6,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    send_back,
    tcp_server,
    udp_echo,
    udp_sender,
)
from ..truth import Worker, netns_inode
from .owners import quiet

COUNT = 10
LEFT_PORT, RIGHT_PORT = 41001, 41002


def rootless(worker: Worker, wire: Wire) -> None:
    """Like a rootless container: new namespaces, then a child that is pid 1 in there."""
    call("unshare", CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
    loopback_up()
    in_child(worker, inside)


def in_child(worker: Worker, work: Callable[[Worker], None]) -> None:
    """Do the work in a forked child, after unshare(CLONE_NEWPID) pid 1 of its namespace."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            worker.again()
            if os.getpid() != 1:
                raise RuntimeError("not the first of its pid namespace")
            work(worker)
            status = 0
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("the container's process failed")


def inside(worker: Worker) -> None:
    """Traffic of one process with itself, inside its own network namespace."""
    server, client = listening(V4), bound(V4, TCP)
    first = worker.claim(server, any_address=True, in_=2, out=1)
    worker.claim(client, out=2, in_=1)
    client.connect(server.getsockname())
    peer, _ = server.accept()
    worker.also(first, peer)
    peer.sendall(b"inside")
    receive_all(client, 6)
    one, two = bound(V4, UDP), bound(V4, UDP)
    worker.claim(one, exact=True, out=COUNT)
    worker.claim(two, exact=True, in_=COUNT)
    for _ in range(COUNT):
        one.sendto(b"u", two.getsockname())
        two.recv(10)


@scenario()
def container(stage: Stage) -> None:
    """New pid and network namespace, over veth to the host: pids are the initial namespace's."""
    other = stage.beside()
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 2, "10.9.0.1"))
        stage.spawn("container", container_client, peer, netns=other)


def container_client(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    call("unshare", CLONE_NEWPID)
    in_child(worker, lambda first: connect_often(first, peer, "10.9.0.2", 2))


def connect_often(worker: Worker, peer: tuple[str, int], host: str, connections: int) -> None:
    for _ in range(connections):
        sock = bound(V4, TCP, host)
        worker.claim(sock, any_address=True, out=5, in_=3)
        sock.connect(tuple(peer))
        for _ in range(3):
            sock.sendall(b"12345")
            receive_all(sock, 5)
        sock.close()


@scenario()
def container_of_a_user(stage: Stage) -> None:
    """New user, pid and network namespaces, as rootless containers have them."""
    with playing(stage):
        stage.spawn("rootless", rootless)


def emigrant(worker: Worker, wire: Wire, home: int, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True)
    call("unshare", CLONE_NEWNET)
    if netns_inode() == home:
        raise RuntimeError("still at home")
    for _ in range(COUNT):
        sock.sendto(b"abroad", tuple(peer))
        sock.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


@scenario()
def socket_of_another_namespace(stage: Stage) -> None:
    """A process moves on by setns/unshare, its socket stays: netns is the socket's."""
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        stage.spawn("emigrant", emigrant, stage.netns, peer)


def handing_out(worker: Worker, wire: Wire, link: socket.socket) -> None:
    """Makes a socket in its own namespace for somebody in another."""
    sock = bound(V4, UDP)
    wire.tell([*sock.getsockname()])
    socket.send_fds(link, [b"x"], [sock.fileno()])
    sock.close()
    wire.hear()


def using_foreign(
    worker: Worker, wire: Wire, link: socket.socket, home: int, peer: tuple[str, int]
) -> None:
    _, fds, _, _ = socket.recv_fds(link, 10, 1)
    sock = socket.socket(fileno=fds[0])
    sock.settimeout(30)
    claim = worker.claim(sock, exact=True, netns=home)
    for _ in range(COUNT):
        sock.sendto(b"foreign", tuple(peer))
        sock.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


@scenario()
def socket_passed_between_namespaces(stage: Stage) -> None:
    """A process of namespace B uses a socket made in A: the packets are in A and are its own."""
    other = stage.namespace()
    left, right = socket.socketpair(socket.AF_UNIX)
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        maker = stage.spawn("maker", handing_out, left)
        maker.hear()
        stage.spawn("foreigner", using_foreign, right, stage.netns, peer, netns=other).join()
        maker.tell()


def router(stage: Stage) -> tuple[Netns, Netns]:
    """The stage forwards between two namespaces, 10.9.1.2 and 10.9.2.2 (fd09:1::2, fd09:2::2)."""
    sides = []
    for number in (1, 2):
        side = stage.namespace()
        stage.veth(side, (f"ro{number}", "eth"),
                   (f"10.9.{number}.1/24", f"10.9.{number}.2/24"),
                   (f"fd09:{number}::1/64", f"fd09:{number}::2/64"))  # fmt: skip
        side.run("sh", "-c", f"ip route add default via 10.9.{number}.1;"
                 f"ip -6 route add default via fd09:{number}::1")  # fmt: skip
        sides.append(side)
    sysctl("net.ipv4.ip_forward", 1)
    sysctl("net.ipv6.conf.all.forwarding", 1)
    return sides[0], sides[1]


def far_echo(worker: Worker, wire: Wire, host: str, port: int, count: int) -> None:
    sock = bound(V6 if ":" in host else V4, UDP, host, port)
    claim = worker.claim(sock, exact=True)
    wire.tell("ready")
    send_back(worker, claim, sock, count)


def far_asker(
    worker: Worker, wire: Wire, host: str, port: int, peer: tuple[str, int], size: int
) -> None:
    sock = bound(V6 if ":" in host else V4, UDP, host, port)
    claim = worker.claim(sock, exact=True)
    for _ in range(COUNT):
        sock.sendto(bytes(size), tuple(peer))
        sock.recv(65536)
    worker.count(claim, in_=COUNT, out=COUNT)


def nobody_forwards(stage: Stage, source: int, target: int) -> None:
    """Claim both directions of a flow for nobody, in the router."""
    for one, two in ((source, target), (target, source)):
        stage.worker.claim_nobody(
            proto="udp", lport=one, rport=two, dirs="f", reasons=("forwarded",), out=0,
        )  # fmt: skip


@scenario()
def forwarded(stage: Stage) -> None:
    """Two flows that this host only forwards, IPv4 and IPv6: nobody's, said so."""
    left, right = router(stage)
    with playing(stage):
        for number, family in enumerate((4, 6)):
            near, far = ("10.9.1.2", "10.9.2.2") if family == 4 else ("fd09:1::2", "fd09:2::2")
            for flow in range(2):
                source, target = LEFT_PORT + 10 * number + flow, RIGHT_PORT + 100 * number + flow
                nobody_forwards(stage, source, target)
                child = stage.spawn("far", far_echo, far, target, COUNT, netns=right)
                child.hear()
                stage.spawn("near", far_asker, near, source, (far, target), 50, netns=left)


@scenario()
def masqueraded(stage: Stage) -> None:
    """Forwarded through a masquerading router: nobody's there, exact at both ends."""
    left, right = router(stage)
    rules(
        "table ip t { chain post { type nat hook postrouting priority 100;"
        ' oifname "ro2" masquerade; }; }'
    )
    with playing(stage):
        nobody_forwards(stage, LEFT_PORT, RIGHT_PORT)
        stage.spawn("far", far_echo, "10.9.2.2", RIGHT_PORT, COUNT, netns=right).hear()
        stage.spawn(
            "near", far_asker, "10.9.1.2", LEFT_PORT, ("10.9.2.2", RIGHT_PORT), 50, netns=left
        )


def rules(text: str) -> None:
    """Load an nft ruleset into the caller's network namespace."""
    run("nft", "-f", "-", data=text)


@scenario()
def redirected_to_local(stage: Stage) -> None:
    """DNAT to a local port: the server that gets the packets is named."""
    left = stage.namespace()
    stage.veth(left, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    rules(
        "table ip t { chain pre { type nat hook prerouting priority -100;"
        f" udp dport 4000 redirect to :{RIGHT_PORT}; }}; }}"
    )
    with playing(stage):
        stage.spawn("server", far_echo, "10.9.0.1", RIGHT_PORT, COUNT).hear()
        stage.spawn("near", far_asker, "10.9.0.2", LEFT_PORT, ("10.9.0.1", 4000), 50, netns=left)


IP_TRANSPARENT = 19


def transparent(kind: int, host: str, port: int) -> socket.socket:
    """A socket that may have a foreign address."""
    sock = socket.socket(V4, kind)
    sock.settimeout(30)
    sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    sock.bind((host, port))
    return sock


def proxy(worker: Worker, wire: Wire, port: int, target: tuple[str, int]) -> None:
    """Answers in the name of a host that it is not, over TCP twice and over UDP once."""
    listener = transparent(TCP, "0.0.0.0", port)
    listener.listen()
    receiver = transparent(UDP, "0.0.0.0", port)
    worker.claim_port(target[1], proto="tcp", dirs="io", laddr=target[0], in_=8, out=6)
    worker.claim_port(target[1], proto="udp", dirs="io", laddr=target[0], in_=1, out=1, exact=True)
    wire.tell()
    for number in range(2):
        peer, _ = listener.accept()
        peer.sendall(receive_all(peer, 5))
        if number:  # and once its peer closes first
            receive_all(peer, 1)
        peer.close()
    data, client = receiver.recvfrom(100)
    transparent(UDP, *target).sendto(data, client)


def proxied(worker: Worker, wire: Wire, host: str, target: tuple[str, int]) -> None:
    for number in range(2):
        sock = bound(V4, TCP, host)
        worker.claim(sock, in_=3, out=4)
        sock.connect(tuple(target))
        sock.sendall(b"talk!")
        receive_all(sock, 5 if number else 6)
        quiet()  # so that no ACK overtakes the FIN on another processor
        sock.close()
    sock = bound(V4, UDP, host)
    worker.claim(sock, in_=1, out=1, exact=True)
    sock.sendto(b"talk!", tuple(target))
    sock.recv(100)


@scenario()
def transparent_proxy(stage: Stage) -> None:
    """TPROXY: who answers in the name of a foreign address owns those packets."""
    left, _ = router(stage)
    target = ("10.9.2.2", 80)
    rules(
        "table ip t { chain pre { type filter hook prerouting priority mangle;"
        f" ip daddr {target[0]} meta l4proto {{ tcp, udp }} tproxy to 127.0.0.1:8888"
        " meta mark set 1; }; }"
    )
    run("ip", "rule", "add", "fwmark", "1", "lookup", "100")
    run("ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100")
    with playing(stage):
        stage.spawn("proxy", proxy, 8888, target).hear()
        stage.spawn("client", proxied, "10.9.1.2", target, netns=left)


def hindered(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    worker.claim(sock, exact=True, out=0)
    refused = 0
    for _ in range(COUNT):
        try:
            sock.sendto(b"no", tuple(peer))
        except PermissionError:
            refused += 1
    if refused != COUNT:
        raise RuntimeError(f"only {refused} were refused")


@scenario()
def dropped_by_firewall(stage: Stage) -> None:
    """Dropped on output or input by nft: not sent, not received, and so not recorded as such."""
    rules(
        "table ip t { chain out { type filter hook output priority 0; udp dport 4001 drop; };"
        " chain in { type filter hook input priority 0; udp dport 4002 drop; }; }"
    )
    with playing(stage):
        stage.spawn("hindered", hindered, ("127.0.0.1", 4001))
        target = bound(V4, UDP, "", 4002)
        stage.worker.claim(target, exact=True, in_=0)
        sender = stage.spawn("sender", udp_sender, ("127.0.0.1", 4002), V4, COUNT, False)
        sender.hear()
        sender.tell()


@scenario()
def large_ipv6_in_fragments(stage: Stage) -> None:
    """UDP over IPv6 in fragments: one record a datagram, later fragments counted as skipped."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("fd09::1/64", "fd09::2/64"))
    with playing(stage):
        stage.spawn("far", far_echo, "fd09::2", RIGHT_PORT, COUNT, netns=other).hear()
        stage.spawn("near", far_asker, "fd09::1", LEFT_PORT, ("fd09::2", RIGHT_PORT), 5000)
