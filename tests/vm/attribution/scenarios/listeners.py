# SPDX-License-Identifier: MIT
"""Listeners that several processes have: who accepts, owns."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time
from pathlib import Path

from ..catalog import scenario
from ..stage import Stage, Wire
from ..traffic import (
    HOST,
    TCP,
    V4,
    V6,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    serve,
    tcp_client,
)
from ..truth import Worker
from .owners import COUNT

SO_ATTACH_REUSEPORT_CBPF = 51


def shared_acceptor(worker: Worker, wire: Wire, sock: socket.socket, way: str) -> None:
    worker.claim(sock, any_address=True, t0=1, flags=("ambiguous",) if way == "epoll" else ())
    wire.tell("ready")
    message = wire.hear()
    if message == "leave":
        return
    sock.settimeout(30 if way == "epoll" else None)  # a timeout would make it poll(), not block
    wire.tell("accepting")
    if way == "epoll":
        poller = select.epoll()
        poller.register(sock, select.EPOLLIN)
        poller.poll(30)
    peer, address = sock.accept()
    worker.claim(peer, remote=address, any_address=True, in_=COUNT, out=COUNT)
    peer.sendall(b"hello")
    for _ in range(COUNT):
        peer.sendall(receive_all(peer, 5))
    receive_all(peer, 1)


def patient_client(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, any_address=True, out=COUNT + 3, in_=COUNT + 1)
    sock.connect(tuple(peer))
    receive_all(sock, 5)
    for _ in range(COUNT):
        sock.sendall(b"12345")
        receive_all(sock, 5)


@scenario()
def listener_shared_one_blocks(stage: Stage) -> None:
    """Two processes hold a listener, one is blocked in accept(): that one."""
    with playing(stage):
        sock = listening(V4)
        blocked = stage.spawn("blocked", shared_acceptor, sock, "accept")
        peer = sock.getsockname()
        idle = stage.spawn("idle", idle_holder, sock, keep=[sock])
        idle.hear()
        blocked.hear()
        blocked.tell("go")
        blocked.hear()
        wait_asleep(blocked.pid)
        stage.spawn("client", patient_client, peer).join()
        idle.tell()


def idle_holder(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.tell("ready")
    wire.hear()


def wait_asleep(pid: int) -> None:
    """Wait until a process sleeps (proc(5), field 3)."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S":
            return
        time.sleep(0.005)
    raise RuntimeError(f"process {pid} does not sleep")


@scenario(max_loose=20)
def listener_shared_in_epoll(stage: Stage) -> None:
    """Both wait in epoll: until one accepts, the owner is one of them and marked ambiguous."""
    with playing(stage):
        sock = listening(V4)
        first = stage.spawn("first", shared_acceptor, sock, "epoll")
        second = stage.spawn("second", shared_acceptor, sock, "epoll")
        peer = sock.getsockname()
        sock.close()
        for child in (first, second):
            child.hear()
        first.tell("go")
        first.hear()
        stage.spawn("client", patient_client, peer).join()
        second.tell("leave")


def activator(worker: Worker, wire: Wire, stage: Stage) -> None:
    """Like systemd: makes the listener, keeps it, and starts the service that accepts."""
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname())
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.poll(30000)
    service = stage.spawn("service", activated, sock)
    worker.also(claim, sock)
    wire.tell("activated")
    service.join()


def activated(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    peer, address = sock.accept()
    worker.claim(peer, remote=address, any_address=True, in_=COUNT, out=COUNT)
    peer.sendall(b"hello")
    for _ in range(COUNT):
        peer.sendall(receive_all(peer, 5))
    receive_all(peer, 1)


@scenario()
def socket_activation(stage: Stage) -> None:
    """A listener held by its maker, accepted by the service: the maker's until then."""
    with playing(stage):
        peer = ask(stage.spawn("activator", activator, stage))
        stage.spawn("client", patient_client, peer)


def listener_maker(worker: Worker, wire: Wire, link: socket.socket) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname())
    wire.hear()
    socket.send_fds(link, [b"x"], [sock.fileno()])
    sock.close()
    wire.tell("passed")
    wire.hear()
    worker.end(claim)
    wire.tell("over")
    wire.hear()


def listener_taker(worker: Worker, wire: Wire, link: socket.socket) -> None:
    _, fds, _, _ = socket.recv_fds(link, 10, 1)
    sock = socket.socket(fileno=fds[0])
    sock.settimeout(30)
    wire.tell("got it")
    wire.hear()
    claim = worker.claim(sock, any_address=True, in_=6, out=4)
    wire.tell("mine")
    serve(worker, claim, sock)


@scenario()
def listener_passed(stage: Stage) -> None:
    """A listener passed to another process: its connections are the receiver's, SYN included."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with playing(stage):
        first = stage.spawn("maker", listener_maker, left)
        second = stage.spawn("taker", listener_taker, right)
        left.close()
        right.close()
        peer = ask(first)
        first.tell()
        first.hear()
        second.hear()
        first.tell()
        first.hear()
        second.tell()
        second.hear()
        stage.spawn("client", tcp_client, peer, V4, 2, 3).hear()
        first.tell()


def prefork(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    worker.claim(sock, any_address=True, t0=1)
    wire.tell("ready")
    sock.settimeout(None)
    served = 0
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(wire.end, select.POLLIN)
    sock.setblocking(False)
    while True:
        ready = {fd for fd, _ in poller.poll(30000)}
        if wire.end.fileno() in ready:
            break
        try:
            peer, address = sock.accept()
        except BlockingIOError:
            continue
        peer.setblocking(True)
        worker.claim(peer, remote=address, any_address=True, in_=COUNT, out=COUNT)
        peer.sendall(b"hello")
        for _ in range(COUNT):
            peer.sendall(receive_all(peer, 5))
        receive_all(peer, 1)
        served += 1


@scenario(max_loose=120)
def prefork_server(stage: Stage) -> None:
    """Three workers wait on one listener: after accept(), each connection is its acceptor's."""
    with playing(stage):
        sock = listening(V4)
        workers = [stage.spawn(f"prefork{n}", prefork, sock) for n in range(3)]
        peer = sock.getsockname()
        sock.close()
        for child in workers:
            child.hear()
        for number in range(6):
            stage.spawn(f"client{number}", patient_client, peer).join()
        for child in workers:
            child.tell()


def reuseport_server(worker: Worker, wire: Wire, family: int, port: int, program: bool) -> None:
    sock = socket.socket(family, TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.settimeout(30)
    sock.bind((HOST[family], port))
    sock.listen(16)
    if program:  # always the second: ret #1
        buffer = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 1), 8)
        option = struct.pack("@HP", 1, ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, option)
    wire.tell(sock.getsockname()[1])
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(wire.end, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll(30000)}
        if sock.fileno() in ready:
            t0 = 1  # from the SYN on, which chose this listener
            peer, address = sock.accept()
            claim = worker.claim(peer, t0=t0, remote=address[:2], any_address=True, in_=3, out=2)
            worker.also(claim, sock)
            with peer:
                while data := peer.recv(100):
                    peer.sendall(data)
        elif wire.end.fileno() in ready:
            break


def tcp_group(stage: Stage, family: int, program: bool) -> None:
    with playing(stage):
        port = 0
        servers = []
        for number in range(3):
            child = stage.spawn(f"server{number}", reuseport_server, family, port, program)
            port = child.hear()
            servers.append(child)
        stage.spawn("client", tcp_client, (HOST[family], port), family, 9, 2).join()
        for child in servers:
            child.tell()


@scenario()
def tcp_reuseport(stage: Stage) -> None:
    """Three listeners on one port by SO_REUSEPORT: the chosen one's owner, from the SYN on."""
    tcp_group(stage, V4, program=False)


@scenario()
def tcp_reuseport_cbpf(stage: Stage) -> None:
    """The same over IPv6 with a classic BPF program, which sees what follows the TCP header."""
    tcp_group(stage, V6, program=True)
