# SPDX-License-Identifier: MIT
"""What happens to sockets on hosts that serve: upgrades, inetd, debuggers, checkpoints."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from ..catalog import scenario
from ..stage import LIBC, Stage, Wire, place, sysctl
from ..traffic import TCP, UDP, V4, ask, bound, listening, playing, receive_all
from ..truth import Worker, identity_of
from .handover import COUNT, SYS_PIDFD_GETFD, SYS_PIDFD_OPEN, Sender, obedient, tell, touch
from .machinery import SYS_EXIT
from .owners import quiet
from .tcp import big_sender, slow_reader

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
DATA = 57
"""IP length of a TCP segment with five bytes of data and timestamps."""
ALIVE = ("not-dead", "not-ambiguous")


def talks_once(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    """One connection: a request when it is told to, and the answer."""
    sock = bound(V4, TCP)
    worker.claim(sock, any_address=True)
    sock.connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    sock.sendall(b"talk!")
    receive_all(sock, 5)
    sock.close()
    quiet()


def serves_in_turn(worker: Worker, wire: Wire, sock: socket.socket, accepts: bool) -> None:
    """One of those who have a listener, from when it is told that it may be named."""
    wire.hear()
    claim = worker.claim(sock, any_address=True)
    wire.tell("mine")
    if accepts:
        wire.hear()
        peer, address = sock.accept()
        worker.also(claim, peer)
        worker.claim(peer, remote=address, any_address=True, in_=2, out=2)
        peer.sendall(receive_all(peer, 5))
        receive_all(peer, 1)
        peer.close()
        quiet()
    wire.hear()
    worker.end(claim)


@scenario(max_loose=10, engines=("module",))
def binary_upgraded(stage: Stage) -> None:
    """As nginx: new master and worker get the listener, the old ones serve, then they leave."""
    with playing(stage):
        sock = listening(V4)
        old, new = (
            [stage.spawn(f"{age}{who}", serves_in_turn, sock, who == "worker")
             for who in ("master", "worker")]
            for age in ("old", "new")
        )  # fmt: skip
        peer = sock.getsockname()
        sock.close()
        for child in (*old, *new):
            child.tell()
            child.hear()
        for generation in (old, new):
            client = stage.spawn("client", talks_once, peer)
            client.hear()
            generation[1].tell()
            client.tell()
            client.join()
            for child in reversed(generation):
                child.tell()
                child.join()


def keeps_in_a_queue(worker: Worker, wire: Wire) -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    sock = bound(V4, UDP)
    touch(sock)
    name = sock.getsockname()
    socket.send_fds(left, [b"x"], [sock.fileno()])
    sock.close()
    claim = worker.claim_port(
        name[1], dirs="i", in_=COUNT, exact=True, flags=["dead"], reasons=["socket_gone"],
    )  # fmt: skip
    wire.tell(name)
    wire.hear()
    worker.end(claim)
    sock = socket.socket(fileno=socket.recv_fds(right, 10, 1)[1][0])
    worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=ALIVE)
    wire.tell("has it again")
    wire.hear()


@scenario(engines=("module",))
def kept_in_a_queue(stage: Stage) -> None:
    """A process puts its descriptor into a queue, and later takes it out: its own again."""
    with playing(stage):
        child = stage.spawn("keeper", keeps_in_a_queue)
        sender = Sender(stage)
        peer = ask(child)
        sender.to(peer)
        child.tell()
        child.hear()
        sender.to(peer)
        child.tell()


def borrows(worker: Worker, wire: Wire, pid: int, number: int) -> None:
    pidfd = LIBC.syscall(SYS_PIDFD_OPEN, pid, 0)
    sock = socket.socket(fileno=LIBC.syscall(SYS_PIDFD_GETFD, pidfd, number, 0))
    claim = worker.claim(sock, dirs="i", in_=COUNT, exact=True)
    wire.tell("has it")
    wire.hear()
    worker.end(claim)
    sock.close()
    wire.tell("closed")
    wire.hear()


def lends(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    touch(sock)
    wire.tell([*sock.getsockname(), sock.fileno()])
    wire.hear()
    worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=ALIVE)
    wire.tell("its own again")
    wire.hear()


@scenario(engines=("module",))
def borrowed_by_a_debugger(stage: Stage) -> None:
    """A debugger takes a socket by pidfd_getfd() and closes it: its process's as before."""
    with playing(stage):
        sender = Sender(stage)
        first = stage.spawn("debugged", lends)
        host, port, number = first.hear()
        second = stage.spawn("debugger", borrows, first.pid, number)
        second.hear()
        sender.to((host, port))
        for child in (second, first):
            child.tell()
            child.hear()
        sender.to((host, port))
        first.tell()
        second.tell()


def reads_what_comes(worker: Worker, wire: Wire, port: int, peer: tuple[str, int] | None) -> None:
    """One of two sockets on a port; the connected one has what its peer sends."""
    sock = socket.socket(V4, UDP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    if peer:
        sock.connect(peer)
    worker.claim(sock, dirs="i", remote=peer, in_=COUNT, exact=True, flags=ALIVE)
    wire.tell(sock.getsockname())
    wire.hear()


@scenario(engines=("module",))
def udp_connected_beside_unconnected(stage: Stage) -> None:
    """Two processes on one port: the connected socket has its peer's datagrams, the other the rest.

    Which of them bound first makes no difference.
    """
    with playing(stage):
        one, other = Sender(stage), Sender(stage)
        for connected_first in (False, True):
            port = 0
            children = []
            for connected in (connected_first, not connected_first):
                name = one.sock.getsockname() if connected else None
                children.append(stage.spawn(f"on{connected:d}", reads_what_comes, port, name))
                port = ask(children[-1])[1]
            for sender in (one, other):
                sender.to(("127.0.0.1", port))
            for child in children:
                child.tell()


@scenario(engines=("module",))
def orphan_alone_in_its_namespace(stage: Stage) -> None:
    """What a process left unsent is all that its network namespace still has: its own."""
    size = 150_000
    other = stage.beside()
    with playing(stage):
        server = stage.spawn("server", slow_reader, size, "10.9.0.1")
        stage.spawn("orphaning", big_sender, ask(server), size, "10.9.0.2", netns=other).join()
        os.kill(other.pid, signal.SIGKILL)
        os.waitpid(other.pid, 0)
        stage.keepers.remove(other.pid)
        server.tell()


def sequence(sock: socket.socket, queue: int, number: int | None = None) -> int:
    """The number of the next byte of a queue of a connection in repair; set if given."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
    if number is not None:
        # as the signed number that setsockopt() takes
        sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, number.to_bytes(4, "little"))
        return number
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF


def checkpointed(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    claim = worker.claim(sock, any_address=True)
    sock.connect(tuple(peer))
    sock.sendall(b"first")
    receive_all(sock, 5)
    quiet()
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    wire.tell([sock.getsockname()[1], sequence(sock, SEND_QUEUE), sequence(sock, RECEIVE_QUEUE)])
    sock.close()
    worker.end(claim)
    wire.tell("closed")
    wire.hear()


def restored(worker: Worker, wire: Wire, peer: tuple[str, int], state: list[int]) -> None:
    port, sent, received = state
    sock = socket.socket(V4, TCP)
    sock.settimeout(30)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    sock.bind(("127.0.0.1", port))
    sequence(sock, SEND_QUEUE, sent)
    sequence(sock, RECEIVE_QUEUE, received)
    worker.claim(sock, any_address=True)
    mine = worker.claim(sock, any_address=True, lens=[45], flags=ALIVE)
    sock.connect(tuple(peer))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    for _ in range(COUNT):
        sock.sendall(b"later")
        receive_all(sock, 5)
    worker.count(mine, out=COUNT, in_=COUNT)
    wire.tell("done")
    wire.hear()


def echoes(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    while data := peer.recv(100):
        peer.sendall(data)


@scenario(engines=("module",))
def checkpointed_and_restored(stage: Stage) -> None:
    """A connection goes over to another process by TCP_REPAIR (CRIU): it is that one's."""
    for name in ("tcp_timestamps", "tcp_window_scaling", "tcp_sack"):
        sysctl(f"net.ipv4.{name}", 0)
    with playing(stage):
        peer = ask(stage.spawn("server", echoes))
        first = stage.spawn("first", checkpointed, peer)
        state = first.hear()
        first.hear()
        second = stage.spawn("second", restored, peer, state)
        second.hear()
        first.tell()
        second.tell()


def without_first_thread(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Only its second thread is left, and never uses the socket."""

    def live_on() -> None:
        try:
            wire.tell("alone")
            wire.hear()
            worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=ALIVE)
            wire.tell("mine")
            wire.hear()
        finally:
            os._exit(0)

    threading.Thread(target=live_on).start()
    LIBC.syscall(SYS_EXIT, 0)  # of this thread alone


def uses_and_leaves(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    touch(sock)
    wire.hear()


@scenario(engines=("module",))
def heir_without_its_first_thread(stage: Stage) -> None:
    """The first thread of the only one who still has a socket has exited: it is the heir."""
    with playing(stage):
        sock = bound(V4, UDP)
        peer = sock.getsockname()
        heir = stage.spawn("headless", without_first_thread, sock)
        last = stage.spawn("leaves", uses_and_leaves, sock, keep=[sock])
        heir.hear()
        last.tell()
        last.join()
        heir.tell()
        heir.hear()
        Sender(stage).to(peer)
        heir.tell()


def reads_the_rest(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.hear()
    worker.claim(sock, remote=sock.getpeername(), any_address=True)
    worker.claim(sock, dirs="i", lens=[DATA], any_address=True, in_=1, flags=ALIVE)
    wire.tell("mine")
    receive_all(sock, 5 * COUNT)
    wire.tell("read")
    wire.hear()


def accepts_and_leaves(worker: Worker, wire: Wire, stage: Stage) -> None:
    """Accepts, closes its half of the connection, and leaves the other half to a child."""
    listener = listening(V4)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname())
    sock, _ = listener.accept()
    worker.also(claim, sock)
    sock.shutdown(socket.SHUT_WR)
    quiet()
    worker.end(claim)
    parent = os.getpid()
    if os.fork() == 0:
        status = 1
        try:
            while os.getppid() == parent:
                time.sleep(0.005)
            worker.role = "reader"
            worker.again()
            wire.tell("left")
            reads_the_rest(worker, wire, sock)
            status = 0
        finally:
            os._exit(status)
    os._exit(0)


@scenario(engines=("module",))
def half_closed_and_left(stage: Stage) -> None:
    """Who shut down one half of a connection exits, its child reads the other half."""
    with playing(stage):
        server = stage.spawn("server", accepts_and_leaves, stage)
        peer = ask(server)
        sock = bound(V4, TCP)
        stage.worker.claim(sock, any_address=True)
        sock.connect(peer)
        server.hear()
        server.tell()
        server.hear()
        for _ in range(COUNT):
            sock.sendall(b"later")
        server.hear()
        quiet()
        sock.close()
        server.tell()
        server.join()


def starts_programs(worker: Worker, wire: Wire) -> None:
    """As inetd: accepts, starts a program with the connection as its input and output."""
    listener = listening(V4)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname())
    sock, peer = listener.accept()
    worker.also(claim, sock)
    quiet()
    number = sock.fileno()
    pid = os.posix_spawn(
        "/bin/cat", ["cat"], {},
        file_actions=[(os.POSIX_SPAWN_DUP2, number, 0), (os.POSIX_SPAWN_DUP2, number, 1)],
    )  # fmt: skip
    # a parent goes on before its child has the program's name
    while (child := identity_of(pid)).comm != "cat":
        time.sleep(0.001)
    for lens, count, flags in (((), 0, ()), ((DATA,), COUNT, ("not-dead",))):
        worker.claim_port(
            sock.getsockname()[1], proto="tcp", dirs="io", rport=peer[1], lens=lens, in_=count,
            out=count, owner=child, flags=flags,
        )  # fmt: skip
    sock.close()
    wire.tell("started")
    os.waitpid(pid, 0)


@scenario(engines=("module",))
def inetd_starts_a_program(stage: Stage) -> None:
    """A connection is a program's standard input and output: its own once its maker closed it."""
    with playing(stage):
        server = stage.spawn("inetd", starts_programs)
        sock = bound(V4, TCP)
        stage.worker.claim(sock, any_address=True)
        sock.connect(ask(server))
        server.hear()
        for _ in range(COUNT):
            sock.sendall(b"later")
            receive_all(sock, 5)
        sock.close()
        server.join()
        quiet()


def accepts_what_waits(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.hear()
    claims = [
        worker.claim(sock, any_address=True),
        worker.claim(sock, any_address=True, lens=[DATA], in_=1, flags=["not-dead"]),
    ]
    wire.tell("mine")
    wire.hear()
    peer, _ = sock.accept()
    for claim in claims:
        worker.also(claim, peer)
    receive_all(peer, 5 * COUNT)
    wire.tell("read")
    receive_all(peer, 1)
    quiet()


def claims_and_leaves(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    sock.listen(8)
    claim = worker.claim(sock, any_address=True, in_=2, out=1)
    wire.tell("mine")
    wire.hear()
    worker.end(claim)


@scenario(engines=("module",))
def queued_connection_inherited(stage: Stage) -> None:
    """A connection waits at a listener whose user exits: it is who still has the listener."""
    with playing(stage):
        listener = bound(V4, TCP)
        heir = stage.spawn("heir", accepts_what_waits, listener)
        last = stage.spawn("last", claims_and_leaves, listener)
        peer = listener.getsockname()
        listener.close()
        last.hear()
        sock = bound(V4, TCP)
        stage.worker.claim(sock, any_address=True)
        sock.connect(peer)
        quiet()
        last.tell()
        last.join()
        heir.tell()
        heir.hear()
        for _ in range(COUNT):
            sock.sendall(b"later")
        quiet()
        heir.tell()
        heir.hear()
        sock.close()
        heir.join()


def becomes_a_program(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Uses a socket that its new program will not have, and executes that."""
    touch(sock)
    wire.hear()
    place({wire.end.fileno(): 9})
    os.set_blocking(9, True)
    os.execv("/bin/sh", ["sh", "-c", "printf '\"gone\"' >&9; head -c1 <&9 >/dev/null"])


@scenario(engines=("module",))
def last_user_closes_by_exec(stage: Stage) -> None:
    """The last user executes a program, which closes its descriptor: a child has it still."""
    with playing(stage):
        sock = bound(V4, UDP)
        peer = sock.getsockname()
        first = stage.spawn("first", obedient, sock)
        tell(first, "try")
        second = stage.spawn("second", becomes_a_program, sock, keep=[sock])
        second.tell()
        second.hear()
        tell(first, "claim", *ALIVE)
        Sender(stage).to(peer)
        first.tell("end")
        second.tell()
