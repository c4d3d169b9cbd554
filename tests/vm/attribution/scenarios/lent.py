# SPDX-License-Identifier: MIT
"""Sockets of a process that the kernel uses for others: KCM and L2TP."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

from ..bpf import EXIT, MOV, SOCKET_FILTER, load_program, op
from ..catalog import scenario
from ..stage import Netns, Stage, Unable, Wire, run
from ..traffic import TCP, UDP, V4, ask, bound, playing, tcp_server
from ..truth import Worker, netns_inode
from .namespaces import COUNT, LEFT_PORT, RIGHT_PORT, far_asker, far_echo
from .owners import quiet

# linux/kcm.h; linux/sockios.h: SIOCPROTOPRIVATE
AF_KCM, SIOCKCMATTACH = 41, 0x89E0
SIZE = 5
# linux/netlink.h, linux/genetlink.h, linux/l2tp.h
NETLINK_GENERIC, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME = 16, 16, 3, 2
TUNNEL_CREATE, SESSION_CREATE, PWTYPE_ETH = 1, 5, 5
PW_TYPE, ENCAP_TYPE, VERSION, IFNAME, CONN, PEER_CONN, SESSION, PEER_SESSION, FD = (
    1, 2, 7, 8, 9, 10, 11, 12, 23,
)  # fmt: skip
OUTER_PORT = 1701


def multiplexer(sock: socket.socket) -> socket.socket:
    """A KCM socket whose messages are SIZE bytes each (Documentation/networking/kcm.rst)."""
    run("modprobe", "kcm")
    try:
        kcm = socket.socket(AF_KCM, socket.SOCK_DGRAM, 0)
    except OSError as error:
        raise Unable(f"AF_KCM: {error.strerror}") from error
    parser = load_program(SOCKET_FILTER, op(MOV, 0, value=SIZE) + op(EXIT))
    fcntl.ioctl(kcm, SIOCKCMATTACH, struct.pack("=ii", sock.fileno(), parser))
    os.close(parser)
    return kcm


def says_by(kcm: socket.socket) -> None:
    for _ in range(COUNT):
        kcm.send(bytes(SIZE))
        kcm.recv(SIZE)


def attaches(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=COUNT, in_=COUNT)
    sock.connect(tuple(peer))
    says_by(multiplexer(sock))
    wire.tell("done")
    wire.hear()


@scenario(engines=("module",))
def multiplexed_by_kernel(stage: Stage) -> None:
    """A process talks on its connection by a KCM socket alone."""
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 1))
        child = stage.spawn("talker", attaches, peer)
        child.hear()
        child.tell()


def has_the_multiplexer(
    worker: Worker, wire: Wire, kcm: socket.socket, name: tuple[str, int]
) -> None:
    wire.hear()
    worker.claim_port(name[1], proto="tcp", dirs="io", out=COUNT, in_=COUNT)
    says_by(kcm)
    wire.tell("done")
    wire.hear()


def leaves_the_multiplexer(worker: Worker, wire: Wire, stage: Stage, peer: tuple[str, int]) -> None:
    """Its child has the KCM socket, and nobody a descriptor of the connection."""
    sock = bound(V4, TCP)
    claim = worker.claim(sock)
    sock.connect(tuple(peer))
    kcm = multiplexer(sock)
    name = sock.getsockname()
    child = stage.spawn("heir", has_the_multiplexer, kcm, name)
    sock.close()
    kcm.close()
    quiet()
    worker.end(claim)
    wire.tell("left")
    wire.hear()
    child.tell()
    child.hear()
    quiet()
    child.tell()
    child.join()


@scenario(engines=("module",))
def multiplexer_left_to_a_child(stage: Stage) -> None:
    """The only handle of a connection is a KCM socket that a child has inherited."""
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 1))
        child = stage.spawn("parent", leaves_the_multiplexer, stage, peer)
        child.hear()
        child.tell()


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def generic(sock: socket.socket, family: int, command: int, *attributes: bytes) -> bytes:
    """One Generic Netlink request; its answer."""
    body = struct.pack("=BBH", command, 1, 0) + b"".join(attributes)
    sock.send(struct.pack("=IHHII", 16 + len(body), family, 5, 1, 0) + body)
    answer = sock.recv(65536)
    length, kind = struct.unpack_from("=IH", answer)
    if kind == 2 and (number := -struct.unpack_from("=i", answer, 16)[0]):
        raise Unable(f"l2tp, command {command}: {os.strerror(number)}")
    return answer[:length]


def lends(worker: Worker, wire: Wire, here: str, there: str, inner: str) -> None:
    """Makes a socket and gives it to the kernel, which tunnels all that `le0` sends through it."""
    run("modprobe", "l2tp_eth")
    sock = bound(V4, UDP, here, OUTER_PORT)
    sock.connect((there, OUTER_PORT))
    worker.claim(sock, out=COUNT, in_=COUNT)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as link:
        link.bind((0, 0))
        found = generic(link, GENL_ID_CTRL, CTRL_CMD_GETFAMILY,
                        attribute(CTRL_ATTR_FAMILY_NAME, b"l2tp\0"))  # fmt: skip
        link.recv(65536)
        place = 20
        while struct.unpack_from("=H", found, place + 2)[0] != 1:
            place += (struct.unpack_from("=H", found, place)[0] + 3) & ~3
        family = struct.unpack_from("=H", found, place + 4)[0]
        ids = [attribute(kind, struct.pack("=I", 7)) for kind in (CONN, PEER_CONN)]
        lent = attribute(FD, struct.pack("=I", sock.fileno()))
        how = (attribute(VERSION, b"\3"), attribute(ENCAP_TYPE, bytes(2)), lent)
        generic(link, family, TUNNEL_CREATE, *ids, *how)
        ids += [attribute(kind, struct.pack("=I", 9)) for kind in (SESSION, PEER_SESSION)]
        ethernet = attribute(PW_TYPE, struct.pack("=H", PWTYPE_ETH))
        generic(link, family, SESSION_CREATE, *ids, ethernet, attribute(IFNAME, b"le0\0"))
    Path("/proc/sys/net/ipv6/conf/le0/disable_ipv6").write_text("1")  # it talks by itself
    run("ip", "-batch", "-", data=f"addr add {inner}/24 dev le0\nlink set le0 up\n")
    wire.tell("lent")
    wire.hear()


@scenario(engines=("module",))
def tunnel_over_a_lent_socket(stage: Stage) -> None:
    """L2TP: the outer packets belong to the lender of the socket, the inner to the applications."""
    other: Netns = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    with playing(stage):
        assert netns_inode() == stage.netns
        left = stage.spawn("left", lends, "10.9.0.1", "10.9.0.2", "10.7.0.1")
        right = stage.spawn("right", lends, "10.9.0.2", "10.9.0.1", "10.7.0.2", netns=other)
        for daemon in (left, right):
            daemon.hear()
        stage.spawn("far", far_echo, "10.7.0.2", RIGHT_PORT, COUNT, netns=other).hear()
        near = stage.spawn("near", far_asker, "10.7.0.1", LEFT_PORT, ("10.7.0.2", RIGHT_PORT), 50)
        near.join()
        quiet()
        for daemon in (left, right):
            daemon.tell()
