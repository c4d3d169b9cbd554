# SPDX-License-Identifier: MIT
"""Sockets that change hands: fork, exec, SCM_RIGHTS, pidfd_getfd."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Any

from ..catalog import scenario
from ..stage import LIBC, Stage, Unable, Wire, place, rename
from ..traffic import (
    TCP,
    UDP,
    V4,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    udp_echo,
)
from ..truth import Worker, identity_of

COUNT = 10
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 434, 438


def talker(worker: Worker, wire: Wire, peer: tuple[str, int], rounds: int) -> None:
    """A client that sends one message each time it is told to, and waits for the reply."""
    sock = bound(V4, TCP)
    claim = worker.claim(sock, any_address=True, out=2, in_=1)
    sock.connect(tuple(peer))
    wire.tell(sock.getsockname())
    for _ in range(rounds):
        wire.hear()
        sock.sendall(b"talk!")
        receive_all(sock, 5)
        worker.count(claim, out=1, in_=1)
        wire.tell("done")


def quiet() -> None:
    """Wait until delayed ACKs have gone out, so that no packet falls into a handover."""
    time.sleep(0.08)


def serve_connection(worker: Worker, wire: Wire, sock: socket.socket, rounds: int) -> None:
    wire.hear()
    worker.claim(sock, remote=sock.getpeername(), in_=rounds, out=rounds, any_address=True)
    wire.tell("mine")
    for _ in range(rounds):
        sock.sendall(receive_all(sock, 5))
    receive_all(sock, 1)


def accept_fork_close(worker: Worker, wire: Wire, stage: Stage, rounds: int) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=2, out=1)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    wire.hear()
    child = stage.spawn("child", serve_connection, peer, rounds, keep=[peer])
    child.tell()
    child.hear()
    wire.tell("handed over")
    if child.join():
        raise RuntimeError("the child failed")


@scenario()
def tcp_accept_fork_close(stage: Stage) -> None:
    """The parent accepts, forks and closes: from then on the child, which alone has it."""
    with playing(stage):
        server = stage.spawn("parent", accept_fork_close, stage, 5)
        client = stage.spawn("client", talker, ask(server), 5)
        client.hear()
        quiet()
        server.tell()
        server.hear()
        for _ in range(5):
            client.tell()
            client.hear()


def passer(worker: Worker, wire: Wire, link: socket.socket) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock)
    wire.tell(sock.getsockname())
    data = sock.recv(100)
    worker.count(claim, in_=1)
    wire.hear()
    socket.send_fds(link, [data], [sock.fileno()])
    sock.close()
    worker.end(claim)
    wire.tell("passed")
    wire.hear()


def taker(worker: Worker, wire: Wire, link: socket.socket, use: str) -> None:
    wire.hear()
    _, fds, _, _ = socket.recv_fds(link, 100, 1)
    sock = socket.socket(fileno=fds[0])
    sock.settimeout(30)
    claim = worker.claim(sock, exact=True)
    wire.tell("mine")
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if use == "recv":
        for _ in range(COUNT):
            sock.recv(100)
    else:
        poller.poll(30000)
        for _ in range(wire.hear()):  # all are on their way: the socket stays until they are in
            sock.recv(100)
    worker.count(claim, in_=COUNT)


def pass_socket(stage: Stage, use: str, in_flight: int = 0) -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with playing(stage):
        first = stage.spawn("passer", passer, left)
        second = stage.spawn("taker", taker, right, use)
        left.close()
        right.close()
        peer = ask(first)
        sock = bound(V4, UDP)
        claim = stage.worker.claim(sock, exact=True)
        sock.sendto(b"1", peer)
        first.tell()
        first.hear()
        if in_flight:
            stage.worker.claim_port(
                peer[1], dirs="i", lens=[28 + 9], in_=in_flight, exact=True, flags=["dead"],
                reasons=["socket_gone"], owner=identity_of(first.pid),
            )  # fmt: skip
            for _ in range(in_flight):
                sock.sendto(b"in flight", peer)
        second.tell()
        second.hear()
        for _ in range(COUNT - in_flight if use == "recv" else COUNT):
            sock.sendto(b"2", peer)
        if use != "recv":
            second.tell(in_flight + COUNT)
        stage.worker.count(claim, out=1 + COUNT + (0 if use == "recv" else in_flight))
        first.tell()


@scenario()
def scm_rights_receiver_reads(stage: Stage) -> None:
    """A socket passed over a UNIX socket belongs to the receiver."""
    pass_socket(stage, "recv")


@scenario()
def scm_rights_receiver_polls(stage: Stage) -> None:
    """The same when the receiver never reads, only polls."""
    pass_socket(stage, "poll")


@scenario()
def scm_rights_in_flight(stage: Stage) -> None:
    """While nobody holds it but a queue: its last owner, marked dead, or honestly nobody."""
    pass_socket(stage, "poll", in_flight=4)


def robbed(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock)
    wire.tell([*sock.getsockname(), sock.fileno()])
    wire.hear()
    sock.close()
    worker.end(claim)
    wire.tell("closed")
    wire.hear()


def robber(worker: Worker, wire: Wire, pid: int, number: int) -> None:
    pidfd = LIBC.syscall(SYS_PIDFD_OPEN, pid, 0)
    fd = LIBC.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        wire.tell("unable")
        return
    sock = socket.socket(fileno=fd)
    wire.tell("got it")
    wire.hear()
    sock.settimeout(30)
    claim = worker.claim(sock, exact=True)
    wire.tell("mine")
    for _ in range(COUNT):
        _, peer = sock.recvfrom(100)
    sock.sendto(b"back", peer)
    worker.count(claim, in_=COUNT, out=1)


@scenario()
def pidfd_getfd(stage: Stage) -> None:
    """A socket taken by pidfd_getfd() belongs to the taker once the first has closed it."""
    with playing(stage):
        first = stage.spawn("robbed", robbed)
        host, port, number = first.hear()
        second = stage.spawn("robber", robber, first.pid, number)
        if second.hear() != "got it":
            first.tell()
            first.hear()
            first.tell()
            raise Unable("this kernel has no pidfd_getfd")
        first.tell()
        first.hear()
        second.tell()
        second.hear()
        sock = bound(V4, UDP)
        claim = stage.worker.claim(sock, exact=True)
        for _ in range(COUNT):
            sock.sendto(b"z", (host, port))
        stage.worker.count(claim, out=COUNT, in_=1)
        first.tell()


def execing(worker: Worker, wire: Wire, path: str, truth: str, way: str, peer: Any) -> None:
    sock = bound(V4, UDP)
    claim = worker.claim(sock, exact=True, out=1, in_=1)
    sock.sendto(b"before", tuple(peer))
    sock.recv(100)
    worker.end(claim)
    sock.setblocking(True)
    place({wire.end.fileno(): 4, sock.fileno(): 5})
    if way == "exec":
        os.execv(path, ["after", truth, "use", str(peer[1]), str(COUNT)])
    os.execv(path, ["vforking", truth, "vfork", str(peer[1]), str(COUNT)])


@scenario()
def exec_after_socket(stage: Stage) -> None:
    """exec keeps pid and socket, and takes a new name."""
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, 1 + COUNT))
        path, truth = stage.program("inherit"), str(stage.writer.path)
        stage.spawn("before", execing, path, truth, "exec", peer)


@scenario()
def vfork_exec_inherited(stage: Stage) -> None:
    """vfork() and exec with an inherited socket: the new program uses it."""
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, 1 + COUNT))
        path, truth = stage.program("inherit"), str(stage.writer.path)
        stage.spawn("before", execing, path, truth, "vfork", peer)


def grandparent(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    """Connects, then leaves the socket to a grandchild and exits."""
    sock = bound(V4, TCP)
    claim = worker.claim(sock, any_address=True, out=2, in_=1)
    sock.connect(tuple(peer))
    quiet()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            heir(worker, wire, sock)
        os._exit(0)
    os.waitpid(middle, 0)
    worker.end(claim)
    os._exit(0)


def heir(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    status = 1
    try:
        rename("heir")
        worker.role = "heir"
        worker.again()
        wire.hear()
        worker.claim(sock, any_address=True, out=COUNT, in_=COUNT)
        for _ in range(COUNT):
            sock.sendall(b"heir!")
            receive_all(sock, 5)
        wire.tell("done")
        wire.hear()
        status = 0
    finally:
        os._exit(status)


def fixed_echo(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=COUNT, out=COUNT)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    while data := peer.recv(100):
        peer.sendall(data)


@scenario()
def grandchild_sends(stage: Stage) -> None:
    """One process connects and exits, its grandchild sends."""
    with playing(stage):
        peer = ask(stage.spawn("server", fixed_echo))
        elder = stage.spawn("elder", grandparent, peer)
        os.waitpid(elder.pid, 0)
        elder.status = 0
        elder.tell()
        elder.hear()
        elder.tell()
