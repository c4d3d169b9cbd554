# SPDX-License-Identifier: MIT
"""Sockets that the last user lets go of while others have them, or that never arrive."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import threading
import time
from pathlib import Path

from ..catalog import scenario
from ..stage import LIBC, Child, Stage, Wire
from ..traffic import TCP, UDP, V4, ask, bound, listening, playing, receive_all
from ..truth import Worker
from .listeners import wait_asleep
from .owners import quiet

COUNT = 6
CLONE_FILES, SIGCHLD = 0x400, 17
SYS_CLONE = 56 if os.uname().machine == "x86_64" else 220
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD, SYS_CLOSE_RANGE = 434, 438, 436
CLOSE_RANGE_UNSHARE = 2


def touch(sock: socket.socket) -> None:
    """Use a socket, but take nothing from it."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.recv(1)


def obedient(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Does with a socket that it has inherited what it is told, and says when it is done."""
    claim = ""
    while (order := wire.hear()) != "end":
        word, *words = order
        if word == "claim":
            claim = worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=words)
        elif word == "give up":
            worker.end(claim)
        elif word == "try":
            touch(sock)
        elif word == "close":
            sock.close()
        elif word == "dup2":
            other = os.open("/dev/null", os.O_RDONLY)
            os.dup2(other, sock.fileno())
        elif word == "close_range":
            for number in (200, 201):
                os.dup2(sock.fileno(), number)
            sock.close()
            if LIBC.syscall(SYS_CLOSE_RANGE, 200, 201, 0):
                raise OSError("close_range")
        wire.tell("done")


def tell(child: Child, *order: str) -> None:
    child.tell(order)
    child.hear()


class Sender:
    """The stage's own socket, and what it sends."""

    def __init__(self, stage: Stage) -> None:
        self.sock = bound(V4, UDP)
        stage.worker.claim(self.sock, dirs="o")

    def to(self, peer: tuple[str, int], count: int = COUNT) -> None:
        for _ in range(count):
            self.sock.sendto(b"yours", peer)


def play_turns(stage: Stage, way: str) -> None:
    """first and second use the socket in turn, idle never does; then second lets go of it."""
    with playing(stage):
        sock = bound(V4, UDP)
        peer = sock.getsockname()
        sender = Sender(stage)
        first, second = (stage.spawn(name, obedient, sock) for name in ("first", "second"))
        idle = stage.spawn("idle", obedient, sock, keep=[sock])
        for child in (first, second):
            tell(child, "try")
            tell(child, "claim")
            sender.to(peer)
            tell(child, "give up")
        if way == "exit":
            second.tell("end")
            second.join()
        else:
            tell(second, way)
        tell(first, "claim", "not-dead", "not-ambiguous")
        sender.to(peer)
        tell(first, "give up")
        for child in (first, idle) if way == "exit" else (first, idle, second):
            child.tell("end")


@scenario(engines=("module",))
def last_user_exits(stage: Stage) -> None:
    """Of those who still have a socket the one that used it last owns it, not the youngest."""
    play_turns(stage, "exit")


@scenario(engines=("module",))
def last_user_closes(stage: Stage) -> None:
    """The same when it closes the socket."""
    play_turns(stage, "close")


@scenario(engines=("module",))
def last_user_closes_by_dup2(stage: Stage) -> None:
    """The same when another file takes the descriptor's place."""
    play_turns(stage, "dup2")


@scenario(engines=("module",))
def last_user_closes_a_range(stage: Stage) -> None:
    """The same with close_range()."""
    play_turns(stage, "close_range")


def keeper(worker: Worker, wire: Wire, link: socket.socket) -> None:
    """Uses its socket once, lets another one try to get it, and only looks at it from then."""
    sock = bound(V4, UDP)
    touch(sock)
    worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
    wire.tell([*sock.getsockname(), sock.fileno()])
    wire.hear()
    socket.send_fds(link, [b"x"], [sock.fileno()])
    wire.tell("sent")
    wire.hear()


def poor(worker: Worker, wire: Wire, link: socket.socket, pid: int, number: int) -> None:
    """Has no room for one more descriptor."""
    wire.hear()
    pidfd = LIBC.syscall(SYS_PIDFD_OPEN, pid, 0)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    if link is not None:
        _, fds, _, _ = socket.recv_fds(link, 10, 1)
        got = bool(fds)
    else:
        got = LIBC.syscall(SYS_PIDFD_GETFD, pidfd, number, 0) >= 0
    wire.tell("got it" if got else "nothing")
    wire.hear()


def play_refused(stage: Stage, by_pidfd: bool) -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with playing(stage):
        first = stage.spawn("keeper", keeper, left)
        host, port, number = first.hear()
        second = stage.spawn("poor", poor, None if by_pidfd else right, first.pid, number)
        left.close()
        right.close()
        first.tell()
        first.hear()
        second.tell()
        if second.hear() != "nothing":
            raise RuntimeError("the descriptor arrived")
        Sender(stage).to((host, port))
        first.tell()
        second.tell()


@scenario(engines=("module",))
def scm_rights_without_room(stage: Stage) -> None:
    """Who has no room for a descriptor that is passed to it does not get the socket."""
    play_refused(stage, by_pidfd=False)


@scenario(engines=("module",))
def pidfd_getfd_without_room(stage: Stage) -> None:
    """Nor does who takes it by pidfd_getfd()."""
    play_refused(stage, by_pidfd=True)


def split_table(worker: Worker, wire: Wire, way: str) -> None:
    """Two processes with one table: the child takes a copy, the parent closes the socket."""
    sock = bound(V4, UDP)
    touch(sock)
    ready, done = os.pipe()
    pid = LIBC.syscall(SYS_CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        try:
            if way == "unshare":
                LIBC.unshare(CLONE_FILES)
            else:
                LIBC.syscall(SYS_CLOSE_RANGE, 1 << 20, 1 << 21, CLOSE_RANGE_UNSHARE)
            worker.again()
            worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
            os.write(done, b"x")
            wire.hear()
        finally:
            os._exit(0)
    os.read(ready, 1)
    name = sock.getsockname()
    sock.close()
    wire.tell(name)
    os.waitpid(pid, 0)


@scenario(engines=("module",))
def shared_table_unshared(stage: Stage) -> None:
    """A table of two processes becomes two by unshare(); one closes: the other one's socket."""
    with playing(stage):
        child = stage.spawn("table", split_table, "unshare")
        Sender(stage).to(ask(child))
        child.tell()


@scenario(engines=("module",))
def shared_table_split_by_close_range(stage: Stage) -> None:
    """The same by close_range(CLOSE_RANGE_UNSHARE)."""
    with playing(stage):
        child = stage.spawn("table", split_table, "close_range")
        Sender(stage).to(ask(child))
        child.tell()


def partner(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """A user of a socket whose partner in the descriptor table closes it."""
    touch(sock)
    heir = os.fork()
    if heir == 0:
        worker.again()
        wire.hear()
        worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
        wire.tell("mine")
        wire.hear()
        os._exit(0)
    pid = LIBC.syscall(SYS_CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os.close(sock.fileno())
        os._exit(0)
    os.waitpid(pid, 0)
    wire.tell("closed")
    os.waitpid(heir, 0)
    sock.detach()


@scenario(engines=("module",))
def partner_in_table_closes(stage: Stage) -> None:
    """The other process with the same table closes the socket: its user has lost it, too."""
    with playing(stage):
        sock = bound(V4, UDP)
        peer = sock.getsockname()
        child = stage.spawn("partner", partner, sock, keep=[sock])
        child.hear()
        child.tell()
        child.hear()
        Sender(stage).to(peer)
        child.tell()


def thread_keeps(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """A thread with a table of its own keeps the socket that all others close, and then ends."""
    touch(sock)
    ready, done = os.pipe()
    heir = os.fork()
    if heir == 0:
        worker.again()
        os.read(ready, 1)
        worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
        wire.tell("mine")
        wire.hear()
        os._exit(0)
    split, go = threading.Event(), threading.Event()

    def part() -> None:
        LIBC.unshare(CLONE_FILES)
        split.set()
        go.wait()

    thread = threading.Thread(target=part)
    thread.start()
    split.wait()
    claim = worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
    sock.close()
    wire.tell("closed")
    wire.hear()
    worker.end(claim)
    go.set()
    thread.join()
    while len(os.listdir("/proc/self/task")) > 1:
        time.sleep(0.01)
    os.write(done, b"x")
    os.waitpid(heir, 0)


@scenario(engines=("module",))
def thread_with_the_last_table_ends(stage: Stage) -> None:
    """A thread alone has its process's descriptor: the process's socket until the thread ends."""
    with playing(stage):
        sock = bound(V4, UDP)
        peer = sock.getsockname()
        sender = Sender(stage)
        child = stage.spawn("threads", thread_keeps, sock, keep=[sock])
        child.hear()
        sender.to(peer)
        child.tell()
        child.hear()
        sender.to(peer)
        child.tell()


def splicing(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Moves what arrives into a pipe, and never calls recv()."""
    claim = worker.claim(sock, remote=sock.getpeername(), any_address=True, in_=COUNT + 1)
    ends = os.pipe()
    wire.tell("mine")
    while moved := os.splice(sock.fileno(), ends[1], 100):
        os.read(ends[0], moved)
        wire.tell("moved")
    quiet()
    worker.end(claim)


def splicing_parent(worker: Worker, wire: Wire, stage: Stage) -> None:
    listener = listening(V4)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname())
    sock, _ = listener.accept()
    worker.also(claim, sock)
    receive_all(sock, 5)
    quiet()
    child = stage.spawn("splicer", splicing, sock)
    child.hear()
    wait_asleep(child.pid)
    wire.tell("ready")
    for _ in range(COUNT):
        child.hear()
        wire.tell("moved")
    child.join()
    sock.close()


@scenario(engines=("module",))
def splice_from_shared_socket(stage: Stage) -> None:
    """A child moves data by splice() out of a connection that its parent had read from."""
    with playing(stage):
        parent = stage.spawn("parent", splicing_parent, stage)
        peer = ask(parent)
        sock = bound(V4, TCP)
        stage.worker.claim(sock, any_address=True)
        sock.connect(peer)
        send_in_turns(sock, parent)


def send_in_turns(sock: socket.socket, parent: Child) -> None:
    """Send, and wait each time until `parent` has seen it moved."""
    sock.sendall(b"first")
    parent.hear()
    for _ in range(COUNT):
        sock.sendall(b"later")
        parent.hear()
    sock.close()
    parent.join()


def messages_told() -> bool:
    """Whether the module follows send and receive calls (ftrace's own list)."""
    tracing = Path("/sys/kernel/tracing")
    if not (tracing / "enabled_functions").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(tracing)], check=True)
    return "security_socket_recvmsg" in (tracing / "enabled_functions").read_text()


def wait_told(told: bool) -> None:
    deadline = time.monotonic() + 120
    while messages_told() != told:
        if time.monotonic() > deadline:
            raise RuntimeError(f"after 120 s calls are {'not ' if told else ''}told")
        time.sleep(0.1)


def waits_before(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Is in recv() already when somebody begins to listen."""
    worker.claim(sock, dirs="i", in_=COUNT, exact=True)
    wire.tell()
    for _ in range(COUNT):
        sock.recv(100)
    wire.tell()
    wire.hear()


@scenario(engines=("module",))
def late_reader_of_a_call(stage: Stage) -> None:
    """A child waits in recv() on its parent's socket, and then somebody begins to listen."""
    wait_told(False)
    sock = bound(V4, UDP)
    sock.settimeout(None)
    sock.sendto(b"parent", sock.getsockname())
    sock.recv(100)
    child = stage.spawn("waits", waits_before, sock)
    child.hear()
    wait_asleep(child.pid)
    with playing(stage):
        Sender(stage).to(sock.getsockname())
        child.hear()
        child.tell()


def uses_before(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Has used the socket, and is in no call on it when somebody begins to listen."""
    wire.hear()
    touch(sock)
    worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-ambiguous"])
    wire.tell()
    wire.hear()


@scenario(engines=("module",))
def late_reader_of_shared_socket(stage: Stage) -> None:
    """A child has used its parent's socket some time ago, and then somebody begins to listen."""
    wait_told(False)
    sock = bound(V4, UDP)
    child = stage.spawn("uses", uses_before, sock)
    touch(sock)
    wait_told(True)
    child.tell()
    child.hear()
    with playing(stage):
        Sender(stage).to(sock.getsockname())
        child.tell()


@scenario(engines=("module",))
def late_reader_of_a_heir(stage: Stage) -> None:
    """While nobody listens a parent sends, forks and ends: the child is the socket's user then."""
    wait_told(False)
    stage_end, heir_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = stage.spawn("leaves", leaves_to_child, Wire(heir_end))
    peer = ask(parent)
    parent.join()
    heir = Wire(stage_end)
    heir.hear()
    with playing(stage):
        Sender(stage).to(peer)
        heir.tell()
        heir.hear()


def leaves_to_child(worker: Worker, wire: Wire, heir: Wire) -> None:
    """Uses a socket that no call but send() was made on, and leaves it to its child."""
    sock = socket.socket(V4, UDP)
    sock.sendto(b"first", ("127.0.0.1", 9))
    port = sock.getsockname()[1]
    parent = os.getpid()
    if os.fork() == 0:
        worker.again()
        worker.claim(sock, dirs="i", in_=COUNT, any_address=True, flags=["not-dead"])
        while os.getppid() == parent:
            time.sleep(0.01)
        heir.tell()
        heir.hear()
        heir.tell()
        os._exit(0)
    wire.tell(("127.0.0.1", port))
