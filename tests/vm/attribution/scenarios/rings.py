# SPDX-License-Identifier: MIT
"""Sockets that a process has by an io_uring alone, and lets go of."""

from __future__ import annotations

import os

from ..catalog import scenario
from ..stage import Stage, Unable
from ..traffic import UDP, V4, bound, playing

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
