# SPDX-License-Identifier: MIT
"""Programs that come between a process and its sockets: BPF, seccomp supervisors, kernel TLS."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from ..bpf import (
    ADD,
    ATTACH_SK_LOOKUP,
    ATTACH_SK_MSG_VERDICT,
    CALL,
    EQUAL,
    EXIT,
    LINK_CREATE,
    LOAD,
    MAP_LOOKUP_ELEM,
    MOV,
    MOV_REG,
    MSG_REDIRECT_MAP,
    PROG_ATTACH,
    SK_ASSIGN,
    SK_LOOKUP,
    SK_MSG,
    SK_RELEASE,
    STORE,
    UNEQUAL,
    bpf,
    enter_socket,
    load_map,
    load_program,
    op,
    sockmap,
)
from ..catalog import scenario
from ..stage import LIBC, Stage, Unable, Wire, call, run, sysctl
from ..traffic import TCP, UDP, V4, ask, bound, listening, playing, receive_all, tcp_server
from ..truth import Worker
from .owners import quiet

COUNT = 10
STEERED_PORT = 7777
# struct bpf_sk_lookup
OFFSET_PROTOCOL, OFFSET_LOCAL_PORT = 12, 60


def steering_program(map_fd: int) -> int:
    """sk_lookup: what comes for STEERED_PORT is the map's first socket's (TCP) or second's."""
    rest = [
        op(MOV, 2, value=0),
        op(LOAD, 3, 6, OFFSET_PROTOCOL),
        op(EQUAL, 3, offset=1, value=socket.IPPROTO_TCP),
        op(MOV, 2, value=1),
        op(STORE, 10, 2, -4),
        op(MOV_REG, 2, 10) + op(ADD, 2, value=-4),
        load_map(1, map_fd),
        op(CALL, value=MAP_LOOKUP_ELEM),
    ]
    found = [
        op(MOV_REG, 7, 0) + op(MOV_REG, 1, 6) + op(MOV_REG, 2, 7) + op(MOV, 3, value=0),
        op(CALL, value=SK_ASSIGN),
        op(MOV_REG, 1, 7) + op(CALL, value=SK_RELEASE),
    ]
    size = len(b"".join(found)) // 8
    rest += [op(EQUAL, 0, offset=size, value=0), *found]
    size = len(b"".join(rest)) // 8
    head = op(MOV_REG, 6, 1) + op(LOAD, 2, 6, OFFSET_LOCAL_PORT)
    head += op(UNEQUAL, 2, offset=size, value=STEERED_PORT)
    passes = op(MOV, 0, value=1) + op(EXIT)
    return load_program(SK_LOOKUP, head + b"".join(rest) + passes, ATTACH_SK_LOOKUP)


def steered(worker: Worker, wire: Wire, map_fd: int) -> None:
    sock, datagrams = listening(V4), bound(V4, UDP)
    enter_socket(map_fd, 0, sock)
    enter_socket(map_fd, 1, datagrams)
    worker.claim_port(STEERED_PORT, proto="tcp", dirs="io", in_=8, out=6)
    worker.claim_port(STEERED_PORT, proto="udp", dirs="i", in_=COUNT, exact=True)
    worker.claim(datagrams, dirs="o", out=COUNT, exact=True)
    wire.tell()
    for _ in range(COUNT):
        data, peer = datagrams.recvfrom(100)
        datagrams.sendto(data, peer)
    wire.hear()
    for _ in range(2):
        connection, _ = sock.accept()
        with connection:
            while data := connection.recv(1000):
                connection.sendall(data)


def steer(stage: Stage, cookies: int) -> None:
    sysctl("net.ipv4.tcp_syncookies", cookies)
    map_fd = sockmap(2)
    program = steering_program(map_fd)
    netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    bpf(LINK_CREATE, "=IIII", program, netns, ATTACH_SK_LOOKUP, 0)
    there = ("127.0.0.1", STEERED_PORT)
    with playing(stage):
        server = stage.spawn("steered", steered, map_fd)
        server.hear()
        asker = bound(V4, UDP)
        stage.worker.claim(asker, exact=True, out=COUNT, in_=COUNT)
        for number in range(COUNT):
            asker.sendto(b"u" * (9 + number), there)
            asker.recv(100)
        clients = [bound(V4, TCP) for _ in range(2)]
        for sock in clients:
            stage.worker.claim(sock, out=4, in_=3)
            sock.connect(there)
            sock.sendall(b"early")  # nobody has accepted it yet
        quiet()
        server.tell()
        for sock in clients:
            receive_all(sock, 5)
            sock.close()


@scenario()
def steered_by_sk_lookup(stage: Stage) -> None:
    """A BPF sk_lookup program gives a port's packets to sockets that are bound to others."""
    steer(stage, 1)


@scenario()
def steered_under_syn_cookies(stage: Stage) -> None:
    """The same, the listener sending SYN cookies."""
    steer(stage, 2)


def redirects(worker: Worker, wire: Wire, peer: tuple[str, int], map_fd: int) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=2, in_=1)
    sock.connect(tuple(peer))
    enter_socket(map_fd, 0, sock)
    wire.tell()
    wire.hear()
    for number in range(COUNT):
        sock.sendall(b"r" * (30 + number))
    wire.tell()


def redirected(worker: Worker, wire: Wire, peer: tuple[str, int], map_fd: int) -> None:
    sock = bound(V4, TCP)
    # the stack may put some of what waits into one segment
    worker.claim(sock, out=3, in_=1)
    sock.connect(tuple(peer))
    enter_socket(map_fd, 0, sock)
    wire.tell()
    wire.hear()


def reads_two(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=5)
    wire.tell(sock.getsockname())
    peers = [sock.accept()[0] for _ in range(2)]
    for peer in peers:
        worker.also(claim, peer)
    for peer in peers:
        while peer.recv(1000):
            pass


@scenario()
def redirected_by_sockmap(stage: Stage) -> None:
    """What one process sends leaves by the socket of another (BPF sk_msg), whose packets it is."""
    sources, targets = sockmap(1), sockmap(1)
    code = load_map(2, targets) + op(MOV, 3) + op(MOV, 4)
    program = load_program(SK_MSG, code + op(CALL, value=MSG_REDIRECT_MAP) + op(EXIT))
    bpf(PROG_ATTACH, "=IIII", sources, program, ATTACH_SK_MSG_VERDICT, 0)
    with playing(stage):
        peer = ask(stage.spawn("server", reads_two))
        target = stage.spawn("target", redirected, peer, targets)
        target.hear()
        source = stage.spawn("source", redirects, peer, sources)
        source.hear()
        source.tell()
        source.hear()
        quiet()
        target.tell()


# linux/seccomp.h, linux/filter.h: connect() goes to the descriptor's holder, the rest goes on
SYS_SECCOMP, SYS_CONNECT = 317, 42
SET_MODE_FILTER, FLAG_NEW_LISTENER, PR_SET_NO_NEW_PRIVS = 1, 8, 38
TELLS_OF_CONNECT = ((0x20, 0, 0, 0), (0x15, 0, 1, SYS_CONNECT), (0x06, 0, 0, 0x7FC00000),
                    (0x06, 0, 0, 0x7FFF0000))  # fmt: skip
NOTIF_RECV, NOTIF_SEND, NOTIF_ADDFD, ADDFD_SETFD = 0xC0502100, 0xC0182101, 0x40182103, 1


def be_supervised(link: socket.socket) -> None:
    """Let the process behind `link` decide on each connect() of ours (seccomp)."""
    code = b"".join(struct.pack("=HBBI", *one) for one in TELLS_OF_CONNECT)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = LIBC.syscall(SYS_SECCOMP, SET_MODE_FILTER, FLAG_NEW_LISTENER, program)
    if listener < 0:
        raise Unable("this kernel's seccomp tells no supervisor")
    socket.send_fds(link, [b"x"], [listener])
    os.close(listener)


def watched(worker: Worker, wire: Wire, link: socket.socket, peer: tuple[str, int]) -> None:
    sock = socket.socket(V4, TCP)
    be_supervised(link)
    sock.connect(tuple(peer))  # is another socket afterwards
    claim = worker.claim(sock, any_address=True, t0=1)
    for number in range(COUNT):
        sock.sendall(b"q" * (50 + number))
        receive_all(sock, 50 + number)
    worker.count(claim, out=COUNT, in_=COUNT)
    sock.close()


def supervisor(worker: Worker, wire: Wire, link: socket.socket, peer: tuple[str, int]) -> None:
    listener = socket.recv_fds(link, 1, 1)[1][0]
    note = bytearray(80)
    fcntl.ioctl(listener, NOTIF_RECV, note)
    (ident,) = struct.unpack_from("=Q", note)
    (number,) = struct.unpack_from("=Q", note, 32)  # connect()'s first argument
    sock = bound(V4, TCP)
    claim = worker.claim(sock, remote=(peer[0], peer[1]), out=2, in_=1)
    sock.connect(tuple(peer))
    sock.setblocking(True)
    quiet()
    worker.end(claim)
    fcntl.ioctl(
        listener, NOTIF_ADDFD, struct.pack("=QIIII", ident, ADDFD_SETFD, sock.fileno(), number, 0)
    )
    sock.close()
    fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", ident, 0, 0, 0))
    wire.hear()


@scenario()
def socket_replaced_by_supervisor(stage: Stage) -> None:
    """A seccomp supervisor puts a connected socket of its own in place of a process's."""
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 1))
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        other = stage.spawn("supervisor", supervisor, theirs, peer)
        stage.spawn("watched", watched, ours, peer).join()
        other.tell()


# linux/tls.h: TLS 1.2 with AES-GCM-128, all keys zero
TCP_ULP, SOL_TLS, TLS_TX = 31, 282, 1
CRYPTO_INFO = struct.pack("=HH36x", 0x303, 51)


def encrypts(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=COUNT + 3)
    sock.connect(tuple(peer))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each write by itself
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        sock.setsockopt(SOL_TLS, TLS_TX, CRYPTO_INFO)
    except OSError as error:
        raise Unable(f"kernel TLS: {error.strerror}") from error
    for number in range(COUNT):
        sock.sendall(b"t" * (100 + number))
    sock.close()


@scenario()
def kernel_tls(stage: Stage) -> None:
    """Kernel TLS: what a process writes leaves encrypted, now or later, and is its own."""
    run("modprobe", "tls")
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 1, "", False))
        stage.spawn("tls", encrypts, peer)
