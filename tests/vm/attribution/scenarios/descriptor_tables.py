# SPDX-License-Identifier: MIT
"""Descriptor tables that tasks share, and part with."""

from __future__ import annotations

import os
import socket
import threading

from ..catalog import scenario
from ..stage import LIBC, Stage, Wire, rename
from ..traffic import (
    UDP,
    V4,
    ask,
    bound,
    playing,
    udp_sender,
)
from ..truth import Worker, identity_of
from .owners import COUNT

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
