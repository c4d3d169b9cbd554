# SPDX-License-Identifier: MIT
"""Several processes that wait for what comes to one socket."""

from __future__ import annotations

import select
import socket

from ..catalog import scenario
from ..stage import Stage, Wire
from ..traffic import UDP, V4, V6, bound, playing
from ..truth import Worker
from .handover import COUNT
from .listeners import wait_asleep

WORKERS = 3


def answers(worker: Worker, wire: Wire, sock: socket.socket, header: int, polls: bool) -> None:
    """Claims each datagram that it was given, and the answer."""
    sock.setblocking(not polls)
    poller = select.epoll()
    if polls:
        poller.register(sock, select.EPOLLIN)
    worker.claim(sock, dirs="i", flags=["ambiguous"] * polls)
    worker.claim(sock, dirs="i", lens=[header + 3])
    wire.tell("ready")
    while True:
        if polls:
            poller.poll()
        try:
            data, peer = sock.recvfrom(1000)
        except BlockingIOError:
            continue
        if data == b"end":
            return
        dirs = "o" if polls else "io"
        worker.claim(sock, dirs=dirs, lens=[header + len(data)], t0=1, out=1)
        sock.sendto(data, peer)


def prefork(stage: Stage, family: int, polls: bool = False) -> None:
    header = 28 if family == V4 else 48
    with playing(stage):
        shared, sock = bound(family, UDP), bound(family, UDP)
        peer = shared.getsockname()
        stage.worker.claim(sock)
        workers = [
            stage.spawn(f"worker{number}", answers, shared, header, polls)
            for number in range(WORKERS)
        ]
        shared.close()
        for child in workers:
            child.hear()
        for number in range(2 * COUNT):
            for child in workers:
                wait_asleep(child.pid)
            sock.sendto(b"x" * (10 + number), peer)
            sock.recv(100)
        for _ in workers:
            sock.sendto(b"end", peer)


@scenario(max_loose=WORKERS, engines=("module",))
def datagrams_for_who_waits(stage: Stage) -> None:
    """Three workers wait in recv() on one socket: a datagram is whose call waited longest."""
    prefork(stage, V4)


@scenario(max_loose=2 * COUNT + WORKERS, engines=("module",))
def datagrams_for_who_polls(stage: Stage) -> None:
    """They wait in epoll: one of them gets it, which is marked ambiguous."""
    prefork(stage, V6, True)
