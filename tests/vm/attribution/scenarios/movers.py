# SPDX-License-Identifier: MIT
"""Data that a process moves into or out of a shared socket without a message of its own."""

from __future__ import annotations

import os
import socket

from ..catalog import scenario
from ..stage import Stage, Unable, Wire, run
from ..traffic import TCP, V4, V6, ask, bound, listening, playing, receive_all
from ..truth import Worker
from .handover import send_in_turns
from .listeners import wait_asleep
from .owners import quiet
from .programs import CRYPTO_INFO, SOL_TLS, TCP_ULP, TLS_TX

COUNT = 6
TLS_RX = 2
BEFORE, AFTER = 40000, 60000
"""Bytes that the parent and its child leave in the socket; the receiver's window takes few."""


def fills(worker: Worker, wire: Wire, stage: Stage, family: int, way: str, path: str) -> None:
    """Sends until the window is closed; a child adds to that, and the parent does nothing more."""
    listener = listening(family)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname()[:2])
    sock, _ = listener.accept()
    worker.also(claim, sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    # until its child has told that it has added something, either may be named
    mine = worker.claim(sock, remote=sock.getpeername()[:2], any_address=True)
    sock.sendall(bytes(BEFORE))
    quiet()
    child = stage.spawn("adder", adds, sock, way, path)
    child.hear()
    worker.end(mine)
    worker.end(claim)
    wire.tell("full")
    wire.hear()
    # the socket is its own again as soon as the child ends: what leaves around then is either's
    worker.claim(sock, remote=sock.getpeername()[:2], any_address=True)
    child.tell()
    child.join()
    sock.close()


def adds(worker: Worker, wire: Wire, sock: socket.socket, way: str, path: str) -> None:
    worker.claim(sock, remote=sock.getpeername()[:2], any_address=True, in_=5, out=5)
    sock.setblocking(False)
    with open(path, "rb") as file:
        left = AFTER
        ends = os.pipe()
        while left:
            if way == "sendfile":
                left -= os.sendfile(sock.fileno(), file.fileno(), AFTER - left, left)
                continue
            moved = os.splice(file.fileno(), ends[1], min(left, 8192))
            left -= moved
            while moved:
                moved -= os.splice(ends[0], sock.fileno(), moved)
    wire.tell("added")
    wire.hear()


def reads_late(worker: Worker, wire: Wire, peer: tuple[str, int], family: int) -> None:
    sock = bound(family, TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    worker.claim(sock, any_address=True, in_=10, out=10)
    sock.connect(tuple(peer))
    wire.hear()
    if len(receive_all(sock, BEFORE + AFTER)) != BEFORE + AFTER:
        raise RuntimeError("data lost")
    quiet()
    wire.tell("read")
    wire.hear()


def closed_window(stage: Stage, family: int, way: str) -> None:
    path = stage.directory / "file"
    path.write_bytes(bytes(AFTER))
    with playing(stage):
        parent = stage.spawn("parent", fills, stage, family, way, str(path))
        client = stage.spawn("client", reads_late, ask(parent), family)
        parent.hear()
        client.tell()
        client.hear()
        parent.tell()
        parent.join()
        client.tell()


@scenario(max_loose=6)
def sendfile_into_closed_window(stage: Stage) -> None:
    """A child adds to a full socket by sendfile(): what leaves when the window opens is its own."""
    closed_window(stage, V4, "sendfile")


@scenario(max_loose=6)
def sendfile_into_closed_window_v6(stage: Stage) -> None:
    """The same over IPv6."""
    closed_window(stage, V6, "sendfile")


@scenario(max_loose=6)
def splice_into_closed_window(stage: Stage) -> None:
    """The same by splice() out of a pipe."""
    closed_window(stage, V4, "splice")


def moves_out(worker: Worker, wire: Wire, sock: socket.socket, number: int) -> None:
    """Moves what arrives into a pipe, and never calls recv()."""
    worker.claim(sock, remote=sock.getpeername()[:2], any_address=True, in_=number + 1)
    ends = os.pipe()
    sock.setblocking(True)
    wire.tell("mine")
    while moved := os.splice(sock.fileno(), ends[1], 100):
        os.read(ends[0], moved)
        wire.tell("moved")


def reads_first(worker: Worker, wire: Wire, stage: Stage, family: int, encrypted: bool) -> None:
    """Accepts and reads; then a child moves the rest."""
    listener = listening(family)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname()[:2])
    sock, _ = listener.accept()
    worker.also(claim, sock)
    if encrypted:
        secure(sock, TLS_RX)
    wire.tell("accepted")
    receive_all(sock, 5)
    quiet()
    child = stage.spawn("mover", moves_out, sock, COUNT)
    child.hear()
    wait_asleep(child.pid)
    worker.end(claim)
    wire.tell("ready")
    for left in reversed(range(COUNT)):
        child.hear()
        if not left:
            # the child ends with the far end's FIN, whose acknowledgement may come later: either's
            worker.claim(sock, remote=sock.getpeername()[:2], any_address=True)
        wire.tell("moved")
    child.join()
    sock.close()


def secure(sock: socket.socket, direction: int) -> None:
    """Let the kernel encrypt or decrypt from here on."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        sock.setsockopt(SOL_TLS, direction, CRYPTO_INFO)
    except OSError as error:
        raise Unable(f"kernel TLS: {error.strerror}") from error


def moved_out(stage: Stage, family: int, encrypted: bool = False) -> None:
    if encrypted:
        run("modprobe", "tls")
    with playing(stage):
        parent = stage.spawn("parent", reads_first, stage, family, encrypted)
        sock = bound(family, TCP)
        stage.worker.claim(sock, any_address=True)
        sock.connect(ask(parent))
        parent.hear()
        if encrypted:
            secure(sock, TLS_TX)
        send_in_turns(sock, parent)


@scenario(max_loose=4, engines=("module",))
def splice_from_shared_socket_v6(stage: Stage) -> None:
    """A child moves data by splice() out of a connection over IPv6."""
    moved_out(stage, V6)


@scenario(max_loose=4, engines=("module",))
def splice_from_kernel_tls(stage: Stage) -> None:
    """The same where the kernel decrypts: that has a splice() of its own."""
    moved_out(stage, V4, encrypted=True)
