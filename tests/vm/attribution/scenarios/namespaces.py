# SPDX-License-Identifier: MIT
"""Containers, forwarding, firewalls, tunnels: more than one network namespace on the way."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable

from ..catalog import scenario
from ..stage import (
    CLONE_NEWNET,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    Netns,
    Stage,
    Unable,
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
    tcp_server,
    udp_echo,
    udp_sender,
)
from ..truth import Worker, netns_inode
from .owners import quiet
from .udp import group_sender

COUNT = 10
LEFT_PORT, RIGHT_PORT = 41001, 41002
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000


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
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
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
    for _ in range(count):
        data, peer = sock.recvfrom(65536)
        sock.sendto(data, peer[:2])
    worker.count(claim, in_=count, out=count)


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


def open_tun(name: str, address: str) -> int:
    """A tun interface in the caller's network namespace, up, with an address."""
    try:
        device = os.open("/dev/net/tun", os.O_RDWR)
    except OSError as error:
        raise Unable(f"/dev/net/tun: {error.strerror}") from error
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TUN | IFF_NO_PI))
    run("ip", "-batch", "-", data=f"addr add {address} dev {name}\nlink set {name} up\n")
    return device


def tunnel(worker: Worker, wire: Wire, stage: Stage, far: str) -> None:
    """Reads packets from one tun device and writes them into the other, both ways."""
    here = open_tun("tuna", "10.8.0.1/24")
    there_ns = os.open(far, os.O_RDONLY)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    call("setns", there_ns, CLONE_NEWNET)
    there = open_tun("tunb", "10.8.0.2/24")
    call("setns", home, CLONE_NEWNET)
    wire.tell("ready")
    poller = select.poll()
    for descriptor in (here, there, wire.end.fileno()):
        poller.register(descriptor, select.POLLIN)
    other = {here: there, there: here}
    while True:
        for descriptor, _ in poller.poll(30000):
            if descriptor not in other:
                return
            os.write(other[descriptor], os.read(descriptor, 65536))


@scenario()
def tunnel_daemon(stage: Stage) -> None:
    """A VPN daemon writes packets into tun devices: it runs the stack, but owns none of them."""
    if not os.path.exists("/dev/net/tun"):
        run("modprobe", "tun")
    other = stage.namespace()
    daemon = stage.spawn("vpn", tunnel, stage, other.path)
    daemon.hear()
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 3, "10.8.0.2", netns=other))
        client = stage.spawn("client", tcp_far_client, peer, "10.8.0.1", 3)
        echo = ask(stage.spawn("echo", udp_echo, V4, COUNT, "10.8.0.2", netns=other))
        sender = stage.spawn("sender", udp_sender, echo, V4, COUNT, True)
        sender.hear()
        sender.tell()
        client.hear()
        client.join()
        daemon.tell()


def tcp_far_client(
    worker: Worker, wire: Wire, peer: tuple[str, int], host: str, connections: int
) -> None:
    connect_often(worker, peer, host, connections)
    wire.tell("done")


@scenario()
def kernel_tunnel(stage: Stage) -> None:
    """vxlan: the inner packets are the applications', the outer ones the kernel's."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    text = (
        "link add vx type vxlan id 7 {} remote {} dstport 4789 srcport 42001 42002 noudpcsum\n"
        "addr add {}/24 dev vx\nlink set vx up\n"
    )
    run("ip", "-batch", "-", data=text.format("dev ve0", "10.9.0.2", "10.7.0.1"))
    run("nsenter", f"--net={other.path}", "ip", "-batch", "-",
        data=text.format("dev ve1", "10.9.0.1", "10.7.0.2"))  # fmt: skip
    with playing(stage):
        for netns in (stage.netns, other.inode):
            stage.worker.claim_nobody(
                proto="udp", lport=4789, netns=netns, dirs="i", reasons=("kernel",), in_=COUNT
            )
            for port in (42001, 42002):
                stage.worker.claim_nobody(
                    proto="udp", lport=port, rport=4789, netns=netns, dirs="o",
                    reasons=("kernel",),
                )  # fmt: skip
        stage.spawn("far", far_echo, "10.7.0.2", RIGHT_PORT, COUNT, netns=other).hear()
        stage.spawn("near", far_asker, "10.7.0.1", LEFT_PORT, ("10.7.0.2", RIGHT_PORT), 50)


def vrf_server(worker: Worker, wire: Wire) -> None:
    sock = socket.socket(V4, UDP)
    sock.settimeout(30)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"red")
    sock.bind(("10.9.0.1", RIGHT_PORT))
    claim = worker.claim(sock, exact=True)
    wire.tell("ready")
    for _ in range(COUNT):
        data, peer = sock.recvfrom(65536)
        sock.sendto(data, peer)
    worker.count(claim, in_=COUNT, out=COUNT)


@scenario()
def vrf(stage: Stage) -> None:
    """A server in a VRF."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    text = "link add red type vrf table 10\nlink set red up\nlink set ve0 master red\n"
    run("ip", "-batch", "-", data=text)
    with playing(stage):
        stage.spawn("server", vrf_server).hear()
        peer = ("10.9.0.1", RIGHT_PORT)
        stage.spawn("near", far_asker, "10.9.0.2", LEFT_PORT, peer, 50, netns=other)


def vrf_member(worker: Worker, wire: Wire, device: bytes, count: int) -> None:
    sock = socket.socket(V4, UDP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.settimeout(30)
    if device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    sock.bind(("", RIGHT_PORT))
    request = struct.pack("4s4si", socket.inet_aton("239.1.2.5"), bytes(4),
                          socket.if_nametoindex("ve0"))  # fmt: skip
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    worker.claim(sock, in_=count, exact=True)
    wire.tell("ready")
    for _ in range(count):
        sock.recv(100)
    wire.hear()


@scenario(max_loose=COUNT)
def multicast_in_vrf(stage: Stage) -> None:
    """In a VRF a group's packets reach the members that are bound to it, and no others."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    text = "link add red type vrf table 10\nlink set red up\nlink set ve0 master red\n"
    run("ip", "-batch", "-", data=text)
    with playing(stage):
        inside = stage.spawn("inside", vrf_member, b"red", COUNT)
        outside = stage.spawn("outside", vrf_member, b"", 0)
        inside.hear()
        outside.hear()
        stage.spawn("sender", group_sender, "239.1.2.5", RIGHT_PORT, COUNT, netns=other).join()
        inside.tell()
        outside.tell()


def ipvlan(stage: Stage, mode: str) -> None:
    inside, other = stage.namespace(), stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    run("ip", "link", "add", "iv0", "link", "ve0", "type", "ipvlan", "mode", mode)
    run("ip", "link", "set", "iv0", "netns", str(inside.pid))
    inside.run("sh", "-c", "ip addr add 10.9.5.1/24 dev iv0; ip link set iv0 up;"
               " ip route add default dev iv0")  # fmt: skip
    other.run("ip", "route", "add", "10.9.5.0/24", "via", "10.9.0.1")
    with playing(stage):
        decoy = bound(V4, UDP, "0.0.0.0", RIGHT_PORT)
        stage.worker.claim_nobody(proto="udp", lport=RIGHT_PORT, dirs="f", reasons=("forwarded",))
        stage.spawn("inside", far_echo, "10.9.5.1", RIGHT_PORT, COUNT, netns=inside).hear()
        far = stage.spawn("far", far_asker, "10.9.0.2", LEFT_PORT, ("10.9.5.1", RIGHT_PORT), 50,
                          netns=other)  # fmt: skip
        far.join()
        decoy.close()


@scenario()
def ipvlan_l3(stage: Stage) -> None:
    """ipvlan sends on through the host's namespace, where nobody is the sender."""
    ipvlan(stage, "l3")


@scenario()
def ipvlan_l3s(stage: Stage) -> None:
    """ipvlan in mode l3s receives in the host's namespace, too: not for who has the port there."""
    ipvlan(stage, "l3s")
