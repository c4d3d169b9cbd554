# SPDX-License-Identifier: MIT
"""Descriptor tables that processes share without being threads, and that split."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

from ..catalog import scenario
from ..stage import LIBC, Stage, Wire, rename
from ..traffic import UDP, V4, ask, bound, playing, udp_sender
from ..truth import Worker, identity_of
from .handover import (
    CLONE_FILES,
    CLOSE_RANGE_UNSHARE,
    COUNT,
    SIGCHLD,
    SYS_CLONE,
    SYS_CLOSE_RANGE,
    Sender,
    touch,
)

TIMES = 10
ALIVE = ("not-dead", "not-ambiguous")


class Partner:
    """A process with the table of its maker, which does one thing at a time as it is told."""

    def __init__(self, worker: Worker, role: str) -> None:
        self._orders, orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = LIBC.syscall(SYS_CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0)
        if self.pid == 0:
            try:
                rename(role)
                worker.role = role
                worker.again()
                for work in self.works:
                    os.read(self._orders, 1)
                    work()
                    os.write(answers, b"x")
                os.read(self._orders, 1)
            finally:
                os._exit(0)
        self._tells = orders

    works: tuple[Callable[[], object], ...] = ()

    def next(self) -> None:
        """Have it do the next thing."""
        os.write(self._tells, b"x")
        os.read(self._answers, 1)

    def end(self) -> None:
        """Have it exit, and wait for that."""
        os.write(self._tells, b"x")
        os.waitpid(self.pid, 0)


def partner(worker: Worker, role: str, *works: Callable[[], object]) -> Partner:
    made: Partner = type(role, (Partner,), {"works": works})(worker, role)
    return made


def part() -> None:
    """Take a copy of the table."""
    if LIBC.unshare(CLONE_FILES):
        raise OSError("unshare")


def mine(worker: Worker, sock: socket.socket, *flags: str) -> Callable[[], object]:
    """What is to come is the caller's."""
    return lambda: worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=flags or ALIVE)


def used(wire: Wire) -> socket.socket:
    """A socket that this process was the last to use; its address is told."""
    sock = bound(V4, UDP)
    touch(sock)
    wire.tell(sock.getsockname())
    return sock


def has_it(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    """Claim what comes next, and wait until it has come."""
    mine(worker, sock)()
    wire.tell("mine")
    wire.hear()


def bursts(stage: Stage, work: Callable[[Worker, Wire], None], count: int = 1) -> None:
    """A process says where to send to, and each time that the next datagrams may come."""
    with playing(stage):
        child = stage.spawn("table", work)
        sender = Sender(stage)
        peer = tuple(child.hear())
        for _ in range(count):
            child.hear()
            sender.to(peer)
            child.tell()


def user_parts_and_closes(worker: Worker, wire: Wire) -> None:
    sock = used(wire)
    number = sock.fileno()
    other = partner(worker, "partner", lambda: touch(sock), part, lambda: os.close(number))
    for _ in range(3):
        other.next()
    has_it(worker, wire, sock)
    other.end()


@scenario(engines=("module",))
def partner_parts_and_closes(stage: Stage) -> None:
    """Who used the socket last takes a copy of the table and closes in it: the other one's."""
    bursts(stage, user_parts_and_closes)


def user_exits(worker: Worker, wire: Wire) -> None:
    """Leaves its socket to a partner that has taken a copy of the table."""
    sock = used(wire)
    ready, done = os.pipe()
    pid = LIBC.syscall(SYS_CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        try:
            parent = os.getppid()
            part()
            os.write(done, b"x")
            while os.getppid() == parent:
                time.sleep(0.005)
            rename("partner")
            worker.role = "partner"
            worker.again()
            has_it(worker, wire, sock)
        finally:
            os._exit(0)
    os.read(ready, 1)
    os._exit(0)


@scenario(engines=("module",))
def user_exits_after_partner_parts(stage: Stage) -> None:
    """A partner takes a copy of the table; then the socket's user exits."""
    bursts(stage, user_exits)


def partner_of_three(worker: Worker, wire: Wire) -> None:
    """Three share a table; one takes a copy, and another one closes in that of the two."""
    sock = used(wire)
    number = sock.fileno()
    first = partner(worker, "first", part, mine(worker, sock))
    second = partner(worker, "second", lambda: os.close(number))
    first.next()
    second.next()
    first.next()
    wire.tell("the first one's")
    wire.hear()
    sock.detach()
    first.end()
    second.end()


@scenario(engines=("module",))
def partner_of_three_has_a_copy(stage: Stage) -> None:
    """One of three with one table takes a copy; another one closes in the table of the two."""
    bursts(stage, partner_of_three)


def copy_made_while_closing(worker: Worker, wire: Wire) -> None:
    sock = used(wire)
    number = sock.fileno()

    def leave() -> None:
        touch(sock)
        if LIBC.syscall(SYS_CLOSE_RANGE, number, number, CLOSE_RANGE_UNSHARE):
            raise OSError("close_range")

    other = partner(worker, "partner", leave)
    other.next()
    has_it(worker, wire, sock)
    other.end()


@scenario(engines=("module",))
def partner_closes_in_a_copy(stage: Stage) -> None:
    """close_range(CLOSE_RANGE_UNSHARE) closes the last user's descriptor in a copy it makes."""
    bursts(stage, copy_made_while_closing)


def copy_survives(worker: Worker, wire: Wire) -> None:
    sock = used(wire)
    number = sock.fileno()
    heir = os.fork()
    if heir == 0:
        try:
            rename("heir")
            worker.role = "heir"
            worker.again()
            wire.hear()
            has_it(worker, wire, sock)
        finally:
            os._exit(0)

    def close() -> None:
        for other in (200, 201):
            os.dup2(number, other)
        os.close(number)
        if LIBC.syscall(SYS_CLOSE_RANGE, 200, 201, 0):
            raise OSError("close_range")

    other = partner(worker, "partner", close)
    other.next()
    wire.tell("closed")
    os.waitpid(heir, 0)
    sock.detach()
    other.end()


@scenario(engines=("module",))
def partner_closes_a_range(stage: Stage) -> None:
    """The other process with the same table closes all by close_range(): a child has it still."""
    with playing(stage):
        child = stage.spawn("table", copy_survives)
        sender = Sender(stage)
        peer = tuple(child.hear())
        child.hear()
        child.tell()
        child.hear()
        sender.to(peer)
        child.tell()


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
            worker.claim(used, dirs="o", out=TIMES, exact=True)
            for _ in range(TIMES):
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
        for _ in range(TIMES):
            sock.recv(100)
        worker.count(claim, in_=TIMES)


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
            for _ in range(TIMES):
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
    worker.claim(sock, exact=True, in_=TIMES, dirs="i", flags=["not-dead"])
    wire.tell(sock.getsockname())
    for _ in range(TIMES):
        sock.recv(100)


def idle(worker: Worker, wire: Wire) -> None:
    """Holds what it has inherited until its parent ends."""
    wire.end.recv(1)


@scenario()
def descriptor_table_of_a_thread(stage: Stage) -> None:
    """A thread with a descriptor table of its own closes its copy: the process still has it."""
    with playing(stage):
        peer = ask(stage.spawn("process", own_table, stage))
        sender = stage.spawn("sender", udp_sender, peer, V4, TIMES, False)
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
        sock.getsockname()[1], dirs="i", in_=TIMES, exact=True, owner=identity_of(pid),
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
        sender = stage.spawn("sender", udp_sender, peer, V4, TIMES, False)
        sender.hear()
        sender.tell()
        sender.join()
        child.tell()
