# SPDX-License-Identifier: MIT
"""UDP: senders, receivers, groups, and sockets that do not live long."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import threading

from ..bpf import EXIT, MOV, SOCKET_FILTER, load_program, op
from ..catalog import scenario
from ..stage import LIBC, Stage, Wire
from ..traffic import (
    HEADERS,
    HOST,
    UDP,
    V4,
    V6,
    ask,
    bound,
    playing,
    udp_echo,
    udp_receiver,
    udp_sender,
)
from ..truth import Worker, now

COUNT = 20
SO_REUSEPORT = 15
SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF = 51, 52


def exchange(stage: Stage, family: int) -> None:
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, family, COUNT))
        sender = stage.spawn("sender", udp_sender, peer, family, COUNT, True)
        sender.hear()
        sender.tell()


@scenario()
def udp_v4(stage: Stage) -> None:
    """Request and reply over IPv4: each side its own."""
    exchange(stage, V4)


@scenario()
def udp_v6(stage: Stage) -> None:
    """Request and reply over IPv6: each side its own."""
    exchange(stage, V6)


def connected(worker: Worker, wire: Wire, peer: tuple[str, int], family: int) -> None:
    t0 = now()
    sock = socket.socket(family, UDP)
    sock.settimeout(30)
    sock.connect(tuple(peer))
    claim = worker.claim(sock, t0=t0, remote=(peer[0], peer[1]), exact=True)
    for _ in range(COUNT):
        sock.send(b"c" * 40)
        sock.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


@scenario()
def udp_connected(stage: Stage) -> None:
    """A connected UDP socket, IPv4 and IPv6."""
    with playing(stage):
        for family in (V4, V6):
            peer = ask(stage.spawn("echo", udp_echo, family, COUNT))
            stage.spawn("connected", connected, peer, family)


@scenario()
def udp_receive_only(stage: Stage) -> None:
    """A process that only receives is named from its first datagram."""
    with playing(stage):
        receiver = stage.spawn("receiver", udp_receiver, V4, "", COUNT)
        peer = ask(receiver)
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, False)
        for child in (sender, receiver):
            child.hear()
            child.tell()


def threaded(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True)
    wire.tell(sock.getsockname())

    def receive() -> None:
        for _ in range(COUNT):
            sock.recv(100)

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    worker.count(claim, in_=COUNT)


@scenario()
def udp_thread_receives(stage: Stage) -> None:
    """One thread binds, another receives: the process is named, not the thread."""
    with playing(stage):
        peer = ask(stage.spawn("threaded", threaded))
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, False)
        sender.hear()
        sender.tell()


def send_and_exit(worker: Worker, wire: Wire, peer: tuple[str, int], taken: list[int]) -> None:
    """From a port that none of the others had: each claims what comes to its own."""
    sock = bound(V4, UDP)
    while sock.getsockname()[1] in taken:
        sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True, out=1)
    port = sock.getsockname()[1]
    wire.tell([port, claim])
    wire.hear()
    sock.sendto(b"bye", tuple(peer))
    os._exit(0)


@scenario()
def udp_send_then_exit(stage: Stage) -> None:
    """sendto() then _exit(): the datagram is named; the reply to a dead port has no socket."""
    with playing(stage):
        sock = bound(V4, UDP)
        claim = stage.worker.claim(sock, exact=True)
        taken: list[int] = []
        for _ in range(15):
            child = stage.spawn("leaver", send_and_exit, sock.getsockname(), taken)
            port, theirs = child.hear()
            taken.append(port)
            child.tell()
            child.join()
            stage.worker.end(theirs)
            stage.worker.claim_nobody(
                proto="udp", lport=port, t0=now(), dirs="i", in_=1, exact=True,
                reasons=("no_socket", "socket_gone"),
            )  # fmt: skip
            _, peer = sock.recvfrom(100)
            sock.sendto(b"too late", peer)
        stage.worker.count(claim, in_=15, out=15)


def use_inherited(worker: Worker, wire: Wire, sock: socket.socket, peer: tuple[str, int]) -> None:
    wire.hear()
    claim = worker.claim(sock, exact=True)
    for _ in range(COUNT):
        sock.sendto(b"child", tuple(peer))
        sock.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


def bind_then_fork(worker: Worker, wire: Wire, stage: Stage, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    child = stage.spawn("child", use_inherited, sock, peer)
    child.tell()
    if child.join():
        raise RuntimeError("the child failed")


@scenario()
def udp_parent_binds_child_sends(stage: Stage) -> None:
    """The parent binds and keeps the socket, the child uses it: the last user wins."""
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        stage.spawn("parent", bind_then_fork, stage, peer)


# Classic programs that choose a socket of a group by its index (linux/filter.h). They see the
# datagram from its payload on.
CBPF = {
    # by the first byte: ldb [0]; ret a
    "cbpf": ((0x30, 0, 0, 0), (0x16, 0, 0, 0)),
    # at random: ld rand; mod #3; ret a
    "random": ((0x20, 0, 0, 0xFFFFF000 + 56), (0x94, 0, 0, 3), (0x16, 0, 0, 0)),
}


def reuseport_receiver(worker: Worker, wire: Wire, port: int, program: str) -> None:
    sock = socket.socket(V4, UDP)
    sock.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    if program in CBPF:
        code = b"".join(struct.pack("=HBBI", *op) for op in CBPF[program])
        buffer = ctypes.create_string_buffer(code, len(code))
        option = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, option)
    elif program == "ebpf":
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, always_second())
    worker_claims: dict[bytes, str] = {}
    wire.tell(sock.getsockname()[1])
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(wire.end, select.POLLIN)
    # Which socket gets a datagram is the kernel's choice: each has its own length, and its
    # receiver claims it once it has it.
    while True:
        ready = {fd for fd, _ in poller.poll(30000)}
        if sock.fileno() in ready:
            data = sock.recv(2000)
            length = struct.unpack("!H", data[1:3])[0]
            claim = worker.claim(
                sock, t0=1, lens=[length + HEADERS[V4]], in_=1, exact=True, dirs="i"
            )
            worker_claims[data] = claim
            continue
        if wire.end.fileno() in ready:
            wire.hear()
            break
    wire.tell(len(worker_claims))


def always_second() -> int:
    """An eBPF program that chooses the second socket; returns its descriptor."""
    return load_program(SOCKET_FILTER, op(MOV, value=1) + op(EXIT))


def reuseport(stage: Stage, program: str) -> None:
    with playing(stage):
        port = 0
        receivers = []
        for number in range(3):
            child = stage.spawn(f"receiver{number}", reuseport_receiver, port, program)
            port = child.hear()
            receivers.append(child)
        got = 0
        for number in range(30):
            sock = bound(V4, UDP)
            claim = stage.worker.claim(sock, exact=True, out=1, dirs="o")
            length = 20 + number
            data = bytes([number % 3]) + struct.pack("!H", length)
            sock.sendto(data.ljust(length, b"."), ("127.0.0.1", port))
            stage.worker.end(claim)
            sock.close()
        shares = []
        for child in receivers:
            child.tell()
            shares.append(child.hear())
            got += shares[-1]
        if got != 30:
            raise RuntimeError(f"{got} of 30 datagrams arrived")
        if program == "cbpf" and shares != [10, 10, 10]:
            raise RuntimeError(f"the program did not choose: {shares}")
        if program == "ebpf" and shares != [0, 30, 0]:
            raise RuntimeError(f"the program did not choose: {shares}")


@scenario()
def udp_reuseport(stage: Stage) -> None:
    """Three processes share a port by SO_REUSEPORT: the one that gets the datagram is named."""
    reuseport(stage, "")


@scenario()
def udp_reuseport_cbpf(stage: Stage) -> None:
    """The same with a classic BPF program that chooses by payload."""
    reuseport(stage, "cbpf")


@scenario()
def udp_reuseport_random(stage: Stage) -> None:
    """The same with a program that chooses at random: it is asked once, by the engine or not."""
    reuseport(stage, "random")


@scenario()
def udp_reuseport_ebpf(stage: Stage) -> None:
    """The same with an eBPF program that always chooses the second."""
    reuseport(stage, "ebpf")


def reconnecting(worker: Worker, wire: Wire, peers: list[tuple[str, int]]) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True)
    for _ in range(5):
        for peer in peers:
            sock.connect(tuple(peer))
            sock.send(b"r")
            sock.recv(100)
    worker.count(claim, out=10, in_=10)


@scenario()
def udp_reconnected(stage: Stage) -> None:
    """One socket connected to two peers in turn keeps its owner."""
    with playing(stage):
        peers = [ask(stage.spawn(f"echo{n}", udp_echo, V4, 5)) for n in range(2)]
        stage.spawn("reconnecting", reconnecting, peers)


def quick_user(worker: Worker, wire: Wire, port: int, size: int, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP, "", port)
    claim = worker.claim(sock, exact=True, t0=1, lens=[size + HEADERS[V4]])
    sock.sendto(b"q" * size, tuple(peer))
    sock.recv(2000)
    worker.count(claim, out=1, in_=1)


@scenario()
def udp_port_reused(stage: Stage) -> None:
    """Twenty processes use one port within milliseconds of each other: each its own packets."""
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        with bound(V4, UDP) as sock:
            port = sock.getsockname()[1]
        for number in range(COUNT):
            stage.spawn(f"user{number}", quick_user, port, 100 + number, peer).join()


@scenario()
def udp_2000_processes(stage: Stage) -> None:
    """2,000 processes that send one datagram and exit at once: all named."""
    count = max(50, int(2000 * stage.scale))
    with playing(stage):
        receiver = stage.spawn("receiver", big_receiver, count)
        port = receiver.hear()
        child = stage.command("swarm", "swarm", "udp", port, count)
        if child.join():
            raise RuntimeError("the swarm failed")
        receiver.tell()


def big_receiver(worker: Worker, wire: Wire, count: int) -> None:
    sock = bound(V4, UDP)
    worker.claim(sock, exact=True, in_=count)
    wire.tell(sock.getsockname()[1])
    wire.hear(timeout=400)  # 2,000 processes come and go meanwhile


def many_messages(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    sock.connect(tuple(peer))
    claim = worker.claim(sock, exact=True)

    class IoVec(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

    class Message(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_void_p), ("namelen", ctypes.c_uint32),
            ("iov", ctypes.POINTER(IoVec)), ("iovlen", ctypes.c_size_t),
            ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t),
            ("flags", ctypes.c_int), ("padding", ctypes.c_int),
            ("done", ctypes.c_uint32), ("more_padding", ctypes.c_int),
        ]  # fmt: skip

    buffer = ctypes.create_string_buffer(b"m" * 50, 50)
    vector = IoVec(ctypes.addressof(buffer), 50)
    messages = (Message * COUNT)()
    for message in messages:
        message.iov, message.iovlen = ctypes.pointer(vector), 1
    sent = LIBC.sendmmsg(sock.fileno(), messages, COUNT, 0)
    worker.count(claim, out=sent)
    wire.tell("done")
    wire.hear()


@scenario()
def udp_sendmmsg(stage: Stage) -> None:
    """Many datagrams by one sendmmsg()."""
    with playing(stage):
        receiver = stage.spawn("receiver", udp_receiver, V4, "", COUNT)
        peer = ask(receiver)
        sender = stage.spawn("sender", many_messages, peer)
        for child in (sender, receiver):
            child.hear()
            child.tell()


def duplicating(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True)
    spare = os.open("/dev/null", os.O_RDWR)
    os.dup2(sock.fileno(), spare)
    sock.close()
    again = socket.socket(fileno=spare)
    again.settimeout(30)
    for _ in range(COUNT):
        again.sendto(b"dup", tuple(peer))
        again.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


@scenario()
def udp_dup2_close(stage: Stage) -> None:
    """dup2() and close of the original descriptor: the process still holds the socket."""
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        stage.spawn("duplicating", duplicating, peer)


def to_itself(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True)
    for _ in range(COUNT):
        sock.sendto(b"me", sock.getsockname())
        sock.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


@scenario()
def udp_to_itself(stage: Stage) -> None:
    """A socket that sends to its own port."""
    with playing(stage):
        stage.spawn("narcissus", to_itself)


def v4_mapped_sender(worker: Worker, wire: Wire, port: int) -> None:
    sock = socket.socket(V6, UDP)
    sock.settimeout(30)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    claim = worker.claim(sock, exact=True)
    for _ in range(COUNT):
        sock.sendto(b"map", ("::ffff:127.0.0.1", port))
        sock.recv(100)
    worker.count(claim, out=COUNT, in_=COUNT)


@scenario()
def udp_v4_mapped(stage: Stage) -> None:
    """IPv4 packets through an IPv6 socket."""
    with playing(stage):
        _, port = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        stage.spawn("mapped", v4_mapped_sender, port)


def bound_to_device(worker: Worker, wire: Wire, device: str, port: int) -> None:
    sock = socket.socket(V4, UDP)
    sock.settimeout(30)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    sock.bind(("0.0.0.0", port))
    size = {"lo": 60, "ve0": 61}[device]
    claim = worker.claim(sock, t0=1, lens=[size + 28], exact=True)
    wire.tell(sock.getsockname()[1])
    data, peer = sock.recvfrom(100)
    sock.sendto(data, peer)
    worker.count(claim, in_=1, out=1)


def asker(worker: Worker, wire: Wire, peer: tuple[str, int], size: int) -> None:
    sock = socket.socket(V4, UDP)
    sock.settimeout(30)
    sock.bind(("0.0.0.0", 0))
    claim = worker.claim(sock, exact=True)
    sock.sendto(b"d" * size, tuple(peer))
    sock.recv(100)
    worker.count(claim, in_=1, out=1)


@scenario()
def udp_bound_to_devices(stage: Stage) -> None:
    """Two processes on one port, each bound to another interface: told apart by interface."""
    other = stage.beside()
    with playing(stage):
        first = stage.spawn("onlo", bound_to_device, "lo", 0)
        port = first.hear()
        stage.spawn("onveth", bound_to_device, "ve0", port).hear()
        stage.spawn("asker", asker, (HOST[V4], port), 60)
        stage.spawn("far", asker, ("10.9.0.1", port), 61, netns=other)


def with_options(worker: Worker, wire: Wire, family: int, peer: tuple[str, int]) -> None:
    sock = bound(family, UDP)
    if family == V4:  # router alert
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((148, 4, 0, 0)))
    else:  # 4 bytes of padding in each of both headers
        for option in (socket.IPV6_HOPOPTS, socket.IPV6_DSTOPTS):
            sock.setsockopt(socket.IPPROTO_IPV6, option, bytes((0, 0, 1, 4, 0, 0, 0, 0)))
    length = 20 + HEADERS[family] + (4 if family == V4 else 16)
    claim = worker.claim(sock, dirs="o", lens=[length], out=COUNT, exact=True)
    answers = worker.claim(sock, dirs="i")
    for _ in range(COUNT):
        sock.sendto(bytes(20), tuple(peer))
        sock.recv(100)
    worker.end(claim)
    worker.end(answers)


@scenario()
def udp_with_ip_options(stage: Stage) -> None:
    """IPv4 options, IPv6 hop-by-hop and destination options: ports and lengths behind them."""
    with playing(stage):
        for family in (V4, V6):
            peer = ask(stage.spawn("echo", udp_echo, family, COUNT))
            stage.spawn("sender", with_options, family, peer)
