# SPDX-License-Identifier: MIT
"""Sockets that a process has by an io_uring alone, and lets go of."""

from __future__ import annotations

import os

from ..catalog import scenario
from ..stage import Stage, Unable
from ..traffic import UDP, V4, bound, playing
from ..truth import identity_of

COUNT = 6


def let_go(stage: Stage, way: str) -> None:
    with playing(stage):
        sender = bound(V4, UDP)
        stage.worker.claim(sender, dirs="o")
        child = stage.command("ring", "ringhold", way, COUNT)
        port = child.hear()
        if port < 0:
            raise Unable(f"io_uring_setup: {os.strerror(-port)}")
        for data in (b"first", b"second"):
            for _ in range(COUNT):
                sender.sendto(data, ("127.0.0.1", port))
            child.tell()
            if data == b"first":
                child.hear()


@scenario(engines=("module",))
def ring_ends_with_its_process(stage: Stage) -> None:
    """A process uses a socket by its ring alone and exits: a child has the only descriptor."""
    let_go(stage, "exit")


@scenario(engines=("module",))
def ring_closed(stage: Stage) -> None:
    """The same when it closes the ring."""
    let_go(stage, "close")


@scenario(engines=("module",))
def ring_unregisters_its_files(stage: Stage) -> None:
    """The same when it takes all files out of the ring."""
    let_go(stage, "unregister")


@scenario(engines=("module",))
def ring_forgets_one_file(stage: Stage) -> None:
    """The same when it takes this one out of the ring, which lets go of it a second later."""
    let_go(stage, "update")


@scenario(engines=("module",))
def ring_closed_by_exec(stage: Stage) -> None:
    """The same when it executes a program, which closes the ring."""
    let_go(stage, "exec")


@scenario(engines=("module",))
def ring_closed_another_keeps(stage: Stage) -> None:
    """It closes one of two rings that have the socket: it still has it."""
    let_go(stage, "one_of_two")


@scenario(engines=("module",))
def ring_closes_one_file(stage: Stage) -> None:
    """The same by an operation of the ring: IORING_OP_CLOSE of the ring's own number."""
    let_go(stage, "op_close")


@scenario(engines=("module",))
def ring_replaces_one_file(stage: Stage) -> None:
    """The same by IORING_OP_FILES_UPDATE."""
    let_go(stage, "op_update")


@scenario(engines=("module",))
def ring_has_what_was_closed(stage: Stage) -> None:
    """It closes its descriptor, the ring has the socket: its own, before it is used that way."""
    let_go(stage, "waits")


@scenario(engines=("module",))
def ring_without_a_descriptor(stage: Stage) -> None:
    """It closes the ring's descriptor too, which the kernel knows by another number: its own."""
    let_go(stage, "ring_fd")


@scenario(engines=("module",))
def ring_in_the_table_of_a_thread(stage: Stage) -> None:
    """A thread with a table of its own has the ring, and closes its descriptor: its own."""
    let_go(stage, "thread")


@scenario(engines=("module",))
def socket_without_a_descriptor(stage: Stage) -> None:
    """A ring makes a socket that never has a descriptor: its process's, whatever that closes."""
    with playing(stage):
        sock = bound(V4, UDP)
        stage.worker.claim(sock)
        child = stage.command("direct", "ringhold", "direct", sock.getsockname()[1])
        if number := child.hear():
            raise Unable(f"IORING_OP_SOCKET: {os.strerror(-number)}")
        _, peer = sock.recvfrom(100)
        stage.worker.claim_port(
            peer[1], dirs="io", t0=1, out=1, in_=COUNT, exact=True, owner=identity_of(child.pid),
            flags=["not-dead"],
        )  # fmt: skip
        for _ in range(COUNT):
            sock.sendto(b"yours", peer)
        child.tell()
