# SPDX-License-Identifier: MIT
"""Descriptors that are sent and do not arrive: their sender still has the socket."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Callable

from ..bpf import refuse
from ..catalog import scenario
from ..stage import LIBC, Stage, Wire
from ..traffic import UDP, V4, bound, playing
from ..truth import Worker
from .handover import COUNT, SYS_PIDFD_GETFD, SYS_PIDFD_OPEN, Sender, touch
from .programs import (
    NOTIF_ADDFD,
    NOTIF_RECV,
    NOTIF_SEND,
    be_supervised,
)

Taker = Callable[[socket.socket, int, int], bool]


def sends_two(worker: Worker, wire: Wire, link: socket.socket) -> None:
    """Uses its socket once, sends it after another file, and only looks at it from then."""
    sock = bound(V4, UDP)
    touch(sock)
    worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
    socket.send_fds(link, [b"x"], [0, sock.fileno()])
    wire.tell([*sock.getsockname(), sock.fileno()])
    wire.hear()


def takes(worker: Worker, wire: Wire, link: socket.socket, take: Taker) -> None:
    pid, number = wire.hear()
    before = len(os.listdir("/proc/self/fd"))
    sockets = take(link, pid, number)
    wire.tell("a socket" if sockets else len(os.listdir("/proc/self/fd")) - before)
    wire.hear()


def play(stage: Stage, take: Taker, others: int, prepare: Callable[[], int] | None = None) -> None:
    """`others` files arrive, and no socket. `prepare` gives a descriptor to keep meanwhile."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with playing(stage):
        first = stage.spawn("sender", sends_two, left)
        second = stage.spawn("taker", takes, right, take)
        host, port, number = first.hear()
        kept = prepare() if prepare else -1
        second.tell([first.pid, number])
        got = second.hear()
        if kept >= 0:
            os.close(kept)
        if got != others:
            raise RuntimeError(f"{got} arrived")
        Sender(stage).to((host, port))
        first.tell()
        second.tell()


def with_little_space(link: socket.socket, pid: int, number: int) -> bool:
    """Takes one descriptor of two."""
    _, fds, _, _ = socket.recv_fds(link, 10, 1)
    return len(fds) != 1


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Message(ctypes.Structure):
    """struct msghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_size", ctypes.c_uint32), ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t), ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t), ("flags", ctypes.c_int),
    )  # fmt: skip


def at_a_bad_address(link: socket.socket, pid: int, number: int) -> bool:
    """Asks for the descriptors at an address that nobody can write to."""
    data = ctypes.create_string_buffer(10)
    vector = Vector(ctypes.addressof(data), len(data))
    # below what may be mapped
    message = Message(None, 0, ctypes.addressof(vector), 1, 4096, 1024, 0)
    LIBC.recvmsg(link.fileno(), ctypes.byref(message), 0)
    return False


def as_ever(link: socket.socket, pid: int, number: int) -> bool:
    """Takes both by a message."""
    try:
        return bool(socket.recv_fds(link, 10, 2)[1])
    except OSError:
        return False


def by_pidfd(link: socket.socket, pid: int, number: int) -> bool:
    """Takes the socket by pidfd_getfd()."""
    pidfd = LIBC.syscall(SYS_PIDFD_OPEN, pid, 0)
    got: int = LIBC.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    os.close(pidfd)
    return got >= 0


@scenario(engines=("module",))
def scm_rights_cut_short(stage: Stage) -> None:
    """Who has room in its message for one descriptor of two does not get the second."""
    play(stage, with_little_space, 1)


@scenario(engines=("module",))
def scm_rights_at_bad_address(stage: Stage) -> None:
    """Who cannot be told the descriptor's number does not get it."""
    play(stage, at_a_bad_address, 0)


@scenario(engines=("module",))
def scm_rights_refused_by_lsm(stage: Stage) -> None:
    """A security module refuses what is passed: its sender still has it."""
    play(stage, as_ever, 0, lambda: refuse("file_receive", errno.EACCES))


@scenario(engines=("module",))
def pidfd_getfd_refused_by_lsm(stage: Stage) -> None:
    """The same for pidfd_getfd()."""
    play(stage, by_pidfd, 0, lambda: refuse("file_receive", errno.EACCES))


def supervised(worker: Worker, wire: Wire, link: socket.socket) -> None:
    """Has no room for the descriptor that its supervisor puts into its table."""
    other = socket.socket(socket.AF_UNIX)
    be_supervised(link)
    lowest = os.dup(0)
    os.close(lowest)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    other.connect_ex("/nowhere")
    wire.hear()


def supervises(worker: Worker, wire: Wire, link: socket.socket) -> None:
    listener = socket.recv_fds(link, 1, 1)[1][0]
    note = bytearray(80)
    fcntl.ioctl(listener, NOTIF_RECV, note)
    (ident,) = struct.unpack_from("=Q", note)
    sock = bound(V4, UDP)
    touch(sock)
    worker.claim(sock, dirs="i", in_=COUNT, exact=True, flags=["not-dead"])
    try:
        fcntl.ioctl(listener, NOTIF_ADDFD, struct.pack("=QIIII", ident, 0, sock.fileno(), 0, 0))
        raise RuntimeError("the descriptor arrived")
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", ident, 0, 0, 0))
    wire.tell(sock.getsockname())
    wire.hear()


@scenario(engines=("module",))
def addfd_without_room(stage: Stage) -> None:
    """A seccomp supervisor cannot put its socket into a full table: it still has it."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with playing(stage):
        first = stage.spawn("supervisor", supervises, left)
        second = stage.spawn("supervised", supervised, right)
        Sender(stage).to(tuple(first.hear()))
        first.tell()
        second.tell()
