# SPDX-License-Identifier: MIT
"""Sockets that are used by other calls than messages, or that change what they are."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable

from ..catalog import scenario
from ..stage import LIBC, Stage, Unable, Wire, call, run
from ..traffic import TCP, UDP, V4, V6, ask, bound, listening, playing, receive_all, tcp_server
from ..truth import Worker, identity_of, now
from .handover import COUNT, Sender, touch
from .listeners import wait_asleep
from .owners import quiet

# linux/tcp.h, linux/in6.h, linux/aio_abi.h
TCP_ZEROCOPY_RECEIVE, IPV6_ADDRFORM, IOCB_CMD_PREAD = 35, 1, 0
TCP_SAVE_SYN, TCP_SAVED_SYN, WRITTEN = 27, 28, 8_000_000
# linux/userfaultfd.h
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
SYS_USERFAULTFD = 323 if os.uname().machine == "x86_64" else 282
ZEROCOPY = struct.Struct("=QIIIiQiI")
"""struct tcp_zerocopy_receive up to its flags: where, length, ..., copied to, bytes copied."""
PAGES = 16 * 4096
IOCB = struct.Struct("=QIIHhIQQqQII")
SYS_IO_SETUP, SYS_IO_SUBMIT, SYS_IO_GETEVENTS = (
    (206, 209, 208) if os.uname().machine == "x86_64" else (0, 2, 4)
)
T_VERSION, T_ATTACH, T_GETATTR, R_ERROR = 100, 104, 24, 7
"""9P2000.L messages; an answer's type is one more."""


class Mapped:
    """A connection whose data is taken by getsockopt(TCP_ZEROCOPY_RECEIVE) alone (tcp(7))."""

    def __init__(self, sock: socket.socket) -> None:
        LIBC.mmap.restype = ctypes.c_void_p
        self._where = LIBC.mmap(None, ctypes.c_size_t(PAGES), 1, 1, sock.fileno(), 0)
        if self._where == ctypes.c_void_p(-1).value:
            raise OSError("mmap of a TCP socket")
        self._sock = sock

    def take(self) -> int:
        """Bytes that were there; they are thrown away."""
        copy = ctypes.create_string_buffer(4096)
        asked = ZEROCOPY.pack(self._where, PAGES, 0, 0, 0, ctypes.addressof(copy), len(copy), 0)
        about = ctypes.create_string_buffer(asked, len(asked))
        size = ctypes.c_uint(len(asked))
        call("getsockopt", self._sock.fileno(), socket.IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE, about,
             ctypes.byref(size))  # fmt: skip
        _, mapped, skipped, _, _, _, copied, _ = ZEROCOPY.unpack(about.raw)
        if skipped:
            raise Unable("TCP_ZEROCOPY_RECEIVE does not copy less than a page (before Linux 5.12)")
        return int(mapped + copied)


def aio_read(sock: socket.socket) -> Callable[[], int]:
    """Reads by io_submit(2), whose arguments do not name the socket."""
    context = ctypes.c_ulong()
    call("syscall", SYS_IO_SETUP, 8, ctypes.byref(context))
    data = ctypes.create_string_buffer(100)
    where = ctypes.addressof(data)
    block = ctypes.create_string_buffer(
        IOCB.pack(0, 0, 0, IOCB_CMD_PREAD, 0, sock.fileno(), where, len(data), 0, 0, 0, 0)
    )
    blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))

    def read() -> int:
        event = ctypes.create_string_buffer(32)
        call("syscall", SYS_IO_SUBMIT, context, 1, blocks)
        call("syscall", SYS_IO_GETEVENTS, context, 1, 1, event, None)
        result = int(struct.unpack_from("=q", event, 16)[0])
        if result != 5:
            raise RuntimeError(f"{result} of {len(data) + len(block)} bytes")
        return result

    return read


def takes_later(worker: Worker, wire: Wire, sock: socket.socket, way: str) -> None:
    """Has taken something by its own way, and does so with each message."""
    sock.setblocking(True)
    take = Mapped(sock).take if way == "mapped" else aio_read(sock)
    wire.hear()
    take()
    worker.claim(sock, remote=sock.getpeername()[:2], any_address=True, in_=COUNT)
    wire.tell("mine")
    for _ in range(COUNT):
        wire.hear()
        take()
        wire.tell("taken")
    wire.hear()


def reads_once(worker: Worker, wire: Wire, stage: Stage, way: str) -> None:
    """Accepts and reads; from then on its child takes what comes, by calls that are no recv()."""
    listener = listening(V4)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname())
    sock, _ = listener.accept()
    worker.also(claim, sock)
    before = worker.claim(sock, remote=sock.getpeername(), any_address=True)
    receive_all(sock, 5)
    child = stage.spawn("taker", takes_later, sock, way)
    wire.tell("sends")
    wire.hear()
    quiet()
    child.tell()
    child.hear()
    worker.end(before)
    wire.tell("its child's")
    for _ in range(COUNT):
        wire.hear()
        child.tell()
        child.hear()
        wire.tell("taken")
    wire.hear()
    child.tell()
    child.join()
    worker.claim(sock, remote=sock.getpeername(), any_address=True)
    sock.close()


def taken(stage: Stage, way: str) -> None:
    with playing(stage):
        parent = stage.spawn("parent", reads_once, stage, way)
        sock = bound(V4, TCP)
        stage.worker.claim(sock, any_address=True)
        sock.connect(ask(parent))
        sock.sendall(b"first")
        parent.hear()
        sock.sendall(b"other")
        parent.tell()
        parent.hear()
        for _ in range(COUNT):
            sock.sendall(b"later")
            quiet()
            parent.tell()
            parent.hear()
        quiet()
        parent.tell()
        parent.join()


@scenario(max_loose=4, engines=("module",))
def taken_from_a_mapping(stage: Stage) -> None:
    """A child takes its parent's data by TCP_ZEROCOPY_RECEIVE, which is no message to it."""
    taken(stage, "mapped")


@scenario(max_loose=4, engines=("module",))
def read_by_aio(stage: Stage) -> None:
    """The same by io_submit(), whose arguments do not name the socket."""
    taken(stage, "aio")


def shuts_down(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.hear()
    worker.claim(sock, remote=sock.getpeername(), any_address=True, out=1)
    sock.shutdown(socket.SHUT_WR)
    quiet()
    wire.tell("shut down")
    wire.hear()


@scenario(max_loose=4, engines=("module",))
def shut_down_by_a_child(stage: Stage) -> None:
    """A child's only call is shutdown(): the FIN and what follows are its own."""
    with playing(stage):
        server = stage.spawn("server", tcp_server, V4, 1)
        client = bound(V4, TCP)
        peer = ask(server)
        claim = stage.worker.claim(client)
        client.connect(peer)
        client.sendall(b"first")
        receive_all(client, 5)
        quiet()
        child = stage.spawn("shutter", shuts_down, client)
        stage.worker.end(claim)
        child.tell()
        child.hear()
        server.join()
        client.close()
        child.tell()


@scenario(engines=("module",))
def socket_becomes_ipv4(stage: Stage) -> None:
    """IPV6_ADDRFORM makes an IPv4 socket of an IPv6 one: its process's as before."""
    with playing(stage):
        sender = Sender(stage)
        sock = socket.socket(V6, UDP)
        sock.bind(("::", 0))
        stage.worker.claim_port(sock.getsockname()[1], dirs="io", out=1, in_=2 * COUNT, exact=True)
        peer = ("127.0.0.1", sock.getsockname()[1])
        sender.to(peer)
        sock.connect(("::ffff:127.0.0.1", sender.sock.getsockname()[1]))
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_ADDRFORM, socket.AF_INET)
        sender.to(peer)
        stage.worker.claim(sender.sock)
        sock.send(b"x")
        sender.sock.recv(10)


def takes_port(worker: Worker, wire: Wire, port: int) -> None:
    sock = bound(V4, UDP, port=port)
    worker.claim(sock, exact=True, in_=COUNT)
    wire.tell(sock.getsockname())
    wire.hear()


@scenario(engines=("module",))
def port_given_up_by_disconnecting(stage: Stage) -> None:
    """A disconnected socket has another port at its next use; another process has the first."""
    with playing(stage):
        sender = Sender(stage)
        stage.worker.claim(sender.sock)
        sock = socket.socket(V4, UDP)
        sock.connect(sender.sock.getsockname())
        port = sock.getsockname()[1]
        first = stage.worker.claim_port(port, dirs="io", out=1, in_=COUNT, exact=True)
        sock.send(b"x")
        sender.to(("127.0.0.1", port))
        call("connect", sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)
        stage.worker.end(first)
        other = stage.spawn("other", takes_port, port)
        sender.to(ask(other))
        sock.connect(sender.sock.getsockname())
        port = sock.getsockname()[1]
        stage.worker.claim_port(port, dirs="io", out=1, in_=COUNT, exact=True)
        sock.send(b"x")
        sender.to(("127.0.0.1", port))
        other.tell()


def is_reset(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    with contextlib.suppress(ConnectionResetError):
        peer.recv(1)


def listens_on(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.hear()
    sock.bind(("127.0.0.1", 0))
    sock.listen(8)
    claim = worker.claim(sock, any_address=True, in_=4, out=2)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    receive_all(peer, 5)
    peer.close()
    wire.tell("served")
    wire.hear()


@scenario(max_loose=2, engines=("module",))
def client_becomes_listener(stage: Stage) -> None:
    """A socket that was connected is disconnected, and a child listens on it: the child's."""
    with playing(stage):
        server = stage.spawn("server", is_reset)
        sock = bound(V4, TCP)
        stage.worker.claim(sock)
        sock.connect(ask(server))
        call("connect", sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)
        quiet()
        child = stage.spawn("child", listens_on, sock)
        child.tell()
        client = bound(V4, TCP)
        stage.worker.claim(client)
        client.connect(ask(child))
        client.sendall(b"hello")
        child.hear()
        client.close()
        quiet()
        child.tell()


def execs_in_a_thread(worker: Worker, wire: Wire) -> None:
    """Another thread than the first executes a program, which reads the socket."""
    sock = bound(V4, UDP)
    sock.set_inheritable(True)
    wire.end.set_inheritable(True)
    touch(sock)
    wire.tell(sock.getsockname())
    script = (
        "import os, socket\n"
        f"sock, wire = socket.socket(fileno={sock.fileno()}), {wire.end.fileno()}\n"
        "sock.setblocking(True)\n"
        "os.write(wire, b'0')\n"
        f"for _ in range({COUNT}): sock.recv(100)\n"
        "os.read(wire, 100)\n"
    )
    argv = ["python3", "-c", script]
    threading.Thread(target=os.execv, args=("/usr/bin/python3", argv)).start()
    threading.Event().wait()


@scenario(engines=("module",))
def program_executed_by_a_thread(stage: Stage) -> None:
    """Another thread than the first calls execve(): the pid stays, and so does the socket."""
    with playing(stage):
        child = stage.spawn("threads", execs_in_a_thread)
        sender = Sender(stage)
        peer = ask(child)
        child.hear()
        wait_asleep(child.pid)
        stage.worker.claim_port(
            peer[1], dirs="i", in_=COUNT, exact=True, owner=identity_of(child.pid)
        )
        sender.to(peer)
        child.tell()


def file_server(worker: Worker, wire: Wire) -> None:
    """9P2000.L as far as a mount goes; everything else is an error."""
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=5, out=4)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.settimeout(60)
    while head := receive_all(peer, 7):
        size, kind, tag = struct.unpack("<IBH", head)
        body = receive_all(peer, size - 7)
        if kind == T_VERSION:
            answer = body
        elif kind == T_ATTACH:
            answer = struct.pack("<BIQ", 0x80, 0, 1)
        elif kind == T_GETATTR:
            answer = struct.pack("<QBIQ", 0x7FF, 0x80, 0, 1)
            answer += struct.pack("<IIIQQQQQ", 0o40755, 0, 0, 2, 0, 0, 4096, 0) + bytes(80)
        else:
            kind, answer = R_ERROR - 1, struct.pack("<I", 2)
        peer.sendall(struct.pack("<IBH", 7 + len(answer), kind + 1, tag) + answer)


def mounts(worker: Worker, wire: Wire, peer: tuple[str, int], where: str) -> None:
    """Gives its connection to a mounted file system, and exits."""
    sock = bound(V4, TCP)
    claim = worker.claim(sock, out=3, in_=2)
    wire.tell(sock.getsockname())
    sock.connect(tuple(peer))
    sock.setblocking(True)
    number = sock.fileno()
    options = f"trans=fd,rfdno={number},wfdno={number},version=9p2000.L".encode()
    call("mount", b"none", where.encode(), b"9p", 0, options)
    quiet()
    worker.end(claim)


@scenario(max_loose=0, engines=("module",))
def mounted_by_who_has_exited(stage: Stage) -> None:
    """A process gives its socket to a file system of the kernel and exits: it is the kernel's."""
    run("modprobe", "-a", "9p", "9pnet_fd")
    where = stage.directory / "mounted"
    where.mkdir()
    call("unshare", 0x20000)
    run("mount", "--make-rprivate", "/")
    with playing(stage):
        server = stage.spawn("server", file_server)
        mounter = stage.spawn("mounter", mounts, ask(server), str(where))
        port = ask(mounter)[1]
        if mounter.join():
            raise Unable("9P over a descriptor cannot be mounted")
        stage.worker.claim_nobody(proto="tcp", lport=port, reasons=["kernel"], in_=COUNT,
                                  out=COUNT, t0=now())  # fmt: skip
        for number in range(COUNT):
            (where / f"file{number}").exists()
        quiet()
        run("umount", str(where))
        quiet()


class Look:
    """getsockopt(TCP_SAVED_SYN), into a page that is not there: it holds the socket's lock."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._fault = call("syscall", SYS_USERFAULTFD, os.O_CLOEXEC)
        fcntl.ioctl(self._fault, UFFDIO_API, struct.pack("=QQQ", 0xAA, 0, 0))
        LIBC.mmap.restype = ctypes.c_void_p
        self._where = LIBC.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, 0)
        fcntl.ioctl(self._fault, UFFDIO_REGISTER, struct.pack("=QQQQ", self._where, 4096, 1, 0))
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        os.read(self._fault, 32)

    def _look(self) -> None:
        size = ctypes.c_uint(100)
        where = ctypes.c_void_p(self._where)
        call("getsockopt", self._sock.fileno(), socket.IPPROTO_TCP, TCP_SAVED_SYN, where,
             ctypes.byref(size))  # fmt: skip

    def end(self) -> None:
        fcntl.ioctl(self._fault, UFFDIO_ZEROPAGE, struct.pack("=QQQq", self._where, 4096, 0, 0))
        self._thread.join()


def writes(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    worker.claim(sock, remote=sock.getpeername(), any_address=True)
    wire.tell("mine")
    sock.sendall(bytes(WRITTEN))


def looks_at(worker: Worker, wire: Wire, stage: Stage) -> None:
    """Accepts; its child writes, and it looks while answers to that arrive."""
    listener = listening(V4)
    listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
    claim = worker.claim(listener, any_address=True)
    wire.tell(listener.getsockname())
    sock, _ = listener.accept()
    worker.also(claim, sock)
    child = stage.spawn("writer", writes, sock)
    child.hear()
    wait_asleep(child.pid)
    look = Look(sock)
    wire.tell("looks")
    wire.hear()
    look.end()
    sock.close()
    child.join()


@scenario(max_loose=4, engines=("module",))
def looked_at_while_another_writes(stage: Stage) -> None:
    """Its parent's getsockopt() delays answers to what a child writes: the child's as before."""
    with playing(stage):
        parent = stage.spawn("parent", looks_at, stage)
        sock = bound(V4, TCP)
        stage.worker.claim(sock)
        sock.connect(ask(parent))
        parent.hear()
        taken = len(sock.recv(WRITTEN, socket.MSG_DONTWAIT))
        parent.tell()
        receive_all(sock, WRITTEN - taken)
