# SPDX-License-Identifier: MIT
"""Tunnels, VRFs and ipvlan: packets that pass a device more than once."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct

from ..catalog import scenario
from ..stage import (
    CLONE_NEWNET,
    Stage,
    Unable,
    Wire,
    call,
    run,
)
from ..traffic import (
    UDP,
    V4,
    V6,
    ask,
    bound,
    playing,
    send_back,
    tcp_server,
    udp_echo,
    udp_sender,
)
from ..truth import Worker
from .multicast import group_sender
from .namespaces import (
    COUNT,
    LEFT_PORT,
    RIGHT_PORT,
    connect_often,
    far_asker,
    far_echo,
    nobody_forwards,
    router,
)

HERE = "/proc/self/ns/net"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000


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
    other = stage.beside()
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


def vrf_server(worker: Worker, wire: Wire, host: str) -> None:
    sock = socket.socket(V6 if ":" in host else V4, UDP)
    sock.settimeout(30)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"red")
    sock.bind((host, RIGHT_PORT))
    claim = worker.claim(sock, exact=True)
    wire.tell("ready")
    send_back(worker, claim, sock, COUNT)


def in_vrf(stage: Stage, *queue: str) -> None:
    other = stage.beside()
    text = "link add red type vrf table 10\nlink set red up\nlink set ve0 master red\n"
    run("ip", "-batch", "-", data=text + "addr add fd09::1/64 dev ve0 nodad\n")
    other.run("ip", "addr", "add", "fd09::2/64", "dev", "ve1", "nodad")
    if queue:
        run("tc", "qdisc", "add", "dev", "red", "root", *queue)
    with playing(stage):
        for here, there in (("10.9.0.1", "10.9.0.2"), ("fd09::1", "fd09::2")):
            stage.spawn("server", vrf_server, here).hear()
            peer = (here, RIGHT_PORT)
            stage.spawn("near", far_asker, there, LEFT_PORT, peer, 50, netns=other).join()


@scenario()
def vrf(stage: Stage) -> None:
    """A server in a VRF."""
    in_vrf(stage)


@scenario(engines=("module",))
def vrf_with_a_queue(stage: Stage) -> None:
    """The same where the VRF has a queue, which its packets go through."""
    in_vrf(stage, "pfifo")


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
    other = stage.beside()
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
    """ipvlan in mode l3s also receives in the host's namespace: not for the port's holder there."""
    ipvlan(stage, "l3s")


def by_ipsec(stage: Stage, proto: str, how: str) -> None:
    """All datagrams between two namespaces by IPsec in transport mode, over IPv4 and IPv6."""
    run("modprobe", "-a", "xfrm_user", "ah4", "ah6", "ipcomp", "ipcomp6", "deflate")
    other = stage.namespace()
    ends = (("10.9.0.1", "10.9.0.2"), ("fd09::1", "fd09::2"))
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"), ("fd09::1/64", "fd09::2/64"))
    lines = [
        f"xfrm state add src {one} dst {two} proto {proto} spi 0x{spi} mode transport {how}\n"
        f"xfrm policy add src {one} dst {two} dir {{}} tmpl proto {proto} mode transport level "
        for near, far in ends
        for spi, one, two in ((1001, near, far), (1002, far, near))
    ]
    level = {"out": "required", "in": "use" if proto == "comp" else "required"}
    for path, ways in ((HERE, ("out", "in")), (other.path, ("in", "out"))):
        text = [line.format(way) + level[way] for line, way in zip(lines, ways * 2, strict=True)]
        run("nsenter", f"--net={path}", "ip", "-batch", "-", data="\n".join([*text, ""]))
    with playing(stage):
        for near, far in ends:
            stage.spawn("far", far_echo, far, RIGHT_PORT, COUNT, netns=other).hear()
            stage.spawn("near", far_asker, near, LEFT_PORT, (far, RIGHT_PORT), 50).join()


@scenario(engines=("module",))
def authenticated_by_ipsec(stage: Stage) -> None:
    """IPsec's AH: each packet passes with and without that header, and is recorded once."""
    by_ipsec(stage, "ah", "auth hmac(sha256) 0x" + "11" * 32)


@scenario(engines=("module",))
def left_as_it_was_by_ipsec(stage: Stage) -> None:
    """IPComp leaves small packets as they are and sends them on: recorded once."""
    by_ipsec(stage, "comp", "comp deflate")


@scenario(engines=("module",))
def forwarded_by_its_segments(stage: Stage) -> None:
    """A routing header leads through a router: not for who has the port there."""
    left, right = router(stage)
    for path, names in ((left.path, "all eth"), (right.path, "all eth"), (HERE, "all ro1 ro2")):
        text = f"for i in {names}; do echo 1 >/proc/sys/net/ipv6/conf/$i/seg6_enabled; done"
        run("nsenter", f"--net={path}", "sh", "-c", text)
    left.run("ip", "-6", "route", "add", "fd09:2::2", "encap", "seg6", "mode", "inline", "segs",
             "fd09:1::1", "via", "fd09:1::1", "dev", "eth")  # fmt: skip
    with playing(stage):
        decoy = bound(V6, UDP, "fd09:1::1", RIGHT_PORT)
        stage.worker.claim(decoy, exact=True)
        nobody_forwards(stage, LEFT_PORT, RIGHT_PORT)
        stage.spawn("far", far_echo, "fd09:2::2", RIGHT_PORT, COUNT, netns=right).hear()
        peer = ("fd09:2::2", RIGHT_PORT)
        stage.spawn("near", far_asker, "fd09:1::2", LEFT_PORT, peer, 50, netns=left).join()
        decoy.close()
