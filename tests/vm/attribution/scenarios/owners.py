# SPDX-License-Identifier: MIT
"""Sockets that change hands: fork, exec, SCM_RIGHTS, pidfd_getfd, shared listeners."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

from ..catalog import scenario
from ..stage import LIBC, Stage, Unable, Wire, place, rename
from ..traffic import (
    HOST,
    TCP,
    UDP,
    V4,
    V6,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    tcp_client,
    udp_echo,
    udp_sender,
)
from ..truth import Worker, identity_of

COUNT = 10
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 434, 438
SO_ATTACH_REUSEPORT_CBPF = 51


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
        wire.hear()
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
            second.tell()
        stage.worker.count(claim, out=1 + COUNT + (0 if use == "recv" else in_flight))
        first.tell()


@scenario()
def scm_rights_receiver_reads(stage: Stage) -> None:
    """A socket passed over a UNIX socket belongs to who received it."""
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
    for _ in range(2):
        peer, _ = sock.accept()
        worker.also(claim, peer)
        with peer:
            while data := peer.recv(1000):
                peer.sendall(data)


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


CLONE_FILES, SIGCHLD = 0x400, 17
SYS_CLONE = 56 if os.uname().machine == "x86_64" else 220


def shares_its_table(worker: Worker, wire: Wire) -> None:
    """A child of clone(CLONE_FILES) uses one socket, makes another one, and exits."""
    used = bound(V4, UDP)
    started = worker.claim(used, dirs="i")
    wire.tell(used.getsockname())
    peer = tuple(wire.hear())
    ready, done = os.pipe()
    pid = LIBC.syscall(SYS_CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        try:
            rename("sharer")
            worker.role = "sharer"
            worker.again()
            worker.claim(used, dirs="o", out=COUNT, exact=True)
            for _ in range(COUNT):
                used.sendto(b"sharer", peer)
            made = bound(V4, UDP)
            os.write(done, made.detach().to_bytes(4, "little"))
        finally:
            os._exit(0)
    made = socket.socket(fileno=int.from_bytes(os.read(ready, 4), "little"))
    made.settimeout(30)
    os.waitpid(pid, 0)
    worker.end(started)
    claims = [worker.claim(sock, dirs="i", exact=True) for sock in (used, made)]
    wire.tell(made.getsockname())
    for sock, claim in zip((used, made), claims, strict=True):
        for _ in range(COUNT):
            sock.recv(100)
        worker.count(claim, in_=COUNT)


@scenario()
def descriptor_table_shared(stage: Stage) -> None:
    """Two processes with one descriptor table: when one ends, the sockets are the other's."""
    with playing(stage):
        sink = bound(V4, UDP)
        stage.worker.claim(sink)
        other = stage.spawn("table", shares_its_table)
        used = ask(other)
        other.tell(sink.getsockname())
        made = ask(other)
        for peer in (used, made):
            for _ in range(COUNT):
                sink.sendto(b"yours", peer)


def own_table(worker: Worker, wire: Wire, stage: Stage) -> None:
    """A thread takes a descriptor table of its own, and closes the socket in it."""
    sock = bound(V4, UDP)
    number = sock.fileno()
    stage.spawn("idle", idle)
    claim = worker.claim(sock, exact=True, in_=1, out=1)
    sock.sendto(b"mine", sock.getsockname())
    sock.recv(100)

    def part() -> None:
        LIBC.unshare(CLONE_FILES)
        os.close(number)

    thread = threading.Thread(target=part)
    thread.start()
    thread.join()
    worker.end(claim)
    worker.claim(sock, exact=True, in_=COUNT, dirs="i", flags=["not-dead"])
    wire.tell(sock.getsockname())
    for _ in range(COUNT):
        sock.recv(100)


def idle(worker: Worker, wire: Wire) -> None:
    """Holds what it has inherited until its parent ends."""
    wire.end.recv(1)


@scenario()
def descriptor_table_of_a_thread(stage: Stage) -> None:
    """A thread with a descriptor table of its own closes its copy: the process still has it."""
    with playing(stage):
        peer = ask(stage.spawn("process", own_table, stage))
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, False)
        sender.hear()
        sender.tell()


def leaves_to_program(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    sock.set_inheritable(True)
    wire.tell(sock.getsockname())
    claim = worker.claim(sock)
    ready, done = os.pipe()
    never, _ = os.pipe()
    for end in (done, never):
        os.set_inheritable(end, True)
    pid = LIBC.syscall(SYS_CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        says = f"echo >/proc/self/fd/{done}; read x </proc/self/fd/{never}"
        os.execv("/bin/sh", ["sh", "-c", says])
    os.read(ready, 1)  # it runs: its execve() is over
    worker.end(claim)
    worker.claim_port(
        sock.getsockname()[1], dirs="i", in_=COUNT, exact=True, owner=identity_of(pid),
        flags=["not-dead"],
    )  # fmt: skip
    sock.close()
    wire.tell("closed")
    wire.hear()
    os.kill(pid, 9)
    os.waitpid(pid, 0)


@scenario()
def exec_out_of_shared_table(stage: Stage) -> None:
    """A process with another one's descriptor table executes a program: that has a copy of it."""
    with playing(stage):
        child = stage.spawn("table", leaves_to_program)
        peer = ask(child)
        child.hear()
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, False)
        sender.hear()
        sender.tell()
        sender.join()
        child.tell()
