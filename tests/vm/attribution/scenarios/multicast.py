# SPDX-License-Identifier: MIT
"""Datagrams for many receivers: multicast and broadcast."""

from __future__ import annotations

import socket
import struct

from ..catalog import scenario
from ..stage import Netns, Stage, Wire
from ..traffic import (
    UDP,
    V4,
    V6,
    bound,
    playing,
)
from ..truth import Worker
from .udp import COUNT

IP_MULTICAST_ALL, IP_ADD_SOURCE_MEMBERSHIP = 49, 39
GROUP_PORT = 41003
IPV6_JOIN_GROUP = 20


def member(worker: Worker, wire: Wire, group: str, port: int, interface: str) -> None:
    family = V6 if ":" in group else V4
    sock = socket.socket(family, UDP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.settimeout(30)
    sock.bind(("", port))
    if family == V6:
        index = socket.if_nametoindex(interface)
        packed = socket.inet_pton(V6, group) + struct.pack("@I", index)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_JOIN_GROUP, packed)
    elif group.startswith("239."):
        index = socket.if_nametoindex(interface)
        request = struct.pack("4s4si", socket.inet_aton(group), bytes(4), index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    worker.claim(sock, exact=True, in_=10)
    wire.tell(sock.getsockname()[1])
    for _ in range(10):
        sock.recv(100)


def group_send(stage: Stage, group: str, interface: str, other: Netns) -> None:
    with playing(stage):
        receivers = []
        port = 0
        for number in range(3):
            child = stage.spawn(f"member{number}", member, group, port, interface)
            port = child.hear()
            receivers.append(child)
        family = V6 if ":" in group else V4
        sock = socket.socket(family, UDP)
        if family == V6:
            index = socket.if_nametoindex(interface)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 1)
        elif group.startswith("239."):
            request = struct.pack("4s4si", bytes(4), bytes(4), socket.if_nametoindex(interface))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.bind(("", 0))
        stage.worker.claim(sock, exact=True, out=10)
        for _ in range(10):
            sock.sendto(b"all", (group, port))
        stage.worker.claim_nobody(
            proto="udp", lport=port, netns=other.inode, reasons=("no_socket",), dirs="i"
        )


def with_peer(stage: Stage) -> Netns:
    """A veth interface with addresses in the stage; returns the namespace of its other end."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"),
               ("10.9.0.1/24", "10.9.0.2/24"), ("fd09::1/64", "fd09::2/64"))  # fmt: skip
    return other


@scenario(max_loose=30)
def multicast_v4(stage: Stage) -> None:
    """Three members of an IPv4 group: one record for each of them."""
    group_send(stage, "239.1.2.3", "ve0", with_peer(stage))


@scenario(max_loose=30)
def multicast_v6(stage: Stage) -> None:
    """Three members of an IPv6 group: one record for each of them."""
    group_send(stage, "ff15::1234", "ve0", with_peer(stage))


@scenario(max_loose=30)
def broadcast_v4(stage: Stage) -> None:
    """Three receivers of a broadcast: one record for each of them."""
    group_send(stage, "10.9.0.255", "ve0", with_peer(stage))


MANY = 100


def many_members(worker: Worker, wire: Wire, group: str, interface: str) -> None:
    """One process with many sockets in one group."""
    request = struct.pack("4s4si", socket.inet_aton(group), bytes(4),
                          socket.if_nametoindex(interface))  # fmt: skip
    port, claim = 0, ""
    socks: list[socket.socket] = []
    for _ in range(MANY):
        sock = socket.socket(V4, UDP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(30)
        sock.bind((group, port))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        port = sock.getsockname()[1]
        if socks:
            worker.also(claim, sock)
        else:
            claim = worker.claim(sock, dirs="i", in_=2 * MANY, exact=True)
        socks.append(sock)
    wire.tell(port)
    for sock in socks:
        sock.recv(100)
        sock.recv(100)


@scenario()
def multicast_to_100_sockets(stage: Stage) -> None:
    """As many records as there are receiving sockets, however many."""
    other = with_peer(stage)
    with playing(stage):
        port = stage.spawn("members", many_members, "239.1.2.4", "ve0").hear()
        sock = bound(V4, UDP, "10.9.0.1")
        stage.worker.claim(sock, exact=True, out=2)
        for _ in range(2):
            sock.sendto(b"all", ("239.1.2.4", port))
        stage.worker.claim_nobody(
            proto="udp", lport=port, netns=other.inode, reasons=("no_socket",), dirs="i"
        )


def group_sender(worker: Worker, wire: Wire, group: str, port: int, count: int) -> None:
    sock = bound(V4, UDP, "10.9.0.2")
    request = struct.pack("4s4si", bytes(4), bytes(4), socket.if_nametoindex("ve1"))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
    worker.claim(sock, out=count, exact=True)
    for _ in range(count):
        sock.sendto(b"all", (group, port))


def chooser(worker: Worker, wire: Wire, group: str, source: str, everything: bool) -> None:
    """A socket on the group's port, which may have joined it, from one source or all."""
    sock = socket.socket(V4, UDP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.settimeout(30)
    sock.bind(("", GROUP_PORT))
    sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, everything)
    here = socket.inet_aton("10.9.0.1")
    if source:
        sock.setsockopt(socket.IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP,
                        socket.inet_aton(group) + here + socket.inet_aton(source))  # fmt: skip
    wanted = COUNT if everything or source == "10.9.0.2" else 0
    worker.claim(sock, in_=wanted, exact=True)
    wire.tell("ready")
    for _ in range(wanted):
        sock.recv(100)
    wire.hear()


@scenario(max_loose=2 * COUNT)
def multicast_filtered(stage: Stage) -> None:
    """Source-specific membership and IP_MULTICAST_ALL: only who gets a packet has a record."""
    other = with_peer(stage)
    with playing(stage):
        members = [
            stage.spawn("its", chooser, "239.1.2.6", "10.9.0.2", False),
            stage.spawn("others", chooser, "239.1.2.6", "10.9.0.3", False),
            stage.spawn("never", chooser, "239.1.2.6", "", False),
            stage.spawn("all", chooser, "239.1.2.6", "", True),
        ]
        for child in members:
            child.hear()
        stage.spawn("sender", group_sender, "239.1.2.6", GROUP_PORT, COUNT, netns=other).join()
        for child in members:
            child.tell()
