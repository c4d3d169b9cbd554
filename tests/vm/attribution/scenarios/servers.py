# SPDX-License-Identifier: MIT
"""Servers in the kernel, on sockets that a process has made and handed to them."""

from __future__ import annotations

import select
import socket
import struct
import time
from pathlib import Path

from ..catalog import scenario
from ..stage import CLONE_NEWNS, Stage, Unable, Wire, call, run
from ..traffic import HOST, TCP, UDP, V4, V6, bound, playing, receive_all
from ..truth import Worker
from .owners import quiet

COUNT = 5
NFSD = Path("/proc/fs/nfsd")
# RFC 5531: a call of procedure 0 of the NFS program, without credentials
NFS_PROGRAM, AUTH_NONE = 100003, 0
LAST = 1 << 31
"""Marks the last fragment of a record"""
FIN_WAIT2 = "05"
"""As in /proc/net/tcp"""
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def null_call(number: int, version: int) -> bytes:
    """A call that every version answers."""
    return struct.pack(">10I", number, 0, 2, NFS_PROGRAM, version, 0, AUTH_NONE, 0, AUTH_NONE, 0)


def mount_control() -> None:
    """The control files of this network namespace's NFS server; it ends with their mount."""
    run("modprobe", "nfsd")
    call("unshare", CLONE_NEWNS)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"nfsd", bytes(NFSD), b"nfsd", 0, None)


def port_mapper(worker: Worker, wire: Wire) -> None:
    """Has no objection to what the kernel tells it (rpcbind), on connections of the kernel's."""
    listener = bound(V4, TCP, "127.0.0.1", 111)
    listener.listen(64)
    claim = worker.claim(listener, any_address=True)
    wire.tell("ready")
    poller = select.poll()
    socks = {listener.fileno(): listener, wire.end.fileno(): wire.end}
    for number in socks:
        poller.register(number, select.POLLIN)
    while True:
        for number, _ in poller.poll():
            sock = socks[number]
            if sock is wire.end:
                return
            if sock is listener:
                peer, name = listener.accept()
                worker.also(claim, peer)
                worker.claim_nobody(proto="tcp", lport=name[1], reasons=("kernel",))
                socks[peer.fileno()] = peer
                poller.register(peer, select.POLLIN)
            elif head := receive_all(sock, 4):
                message = receive_all(sock, struct.unpack(">I", head)[0] & ~LAST)
                # accepted, done; a true answer where one is wanted
                reply = (
                    message[:4] + struct.pack(">6I", 1, 0, 0, 0, 0, 1)[: 24 if message[23] else 20]
                )
                sock.sendall(struct.pack(">I", LAST | len(reply)) + reply)
            else:
                _await_kernels_close(sock.getpeername()[1])
                poller.unregister(sock)
                del socks[number]
                sock.close()


def _await_kernels_close(port: int) -> None:
    """Until the kernel has let its own connection from `port` go, for 2 s at most.

    So our FIN finds what may be a TIME_WAIT: the kernel's, though nothing of the socket says so.
    """
    end = time.monotonic() + 2
    while time.monotonic() < end:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        own = [row for row in rows if int(row[1].rpartition(":")[2], 16) == port]
        if all(row[3] == FIN_WAIT2 and row[9] == "0" for row in own):
            return
        time.sleep(0.01)


def nfs_maker(worker: Worker, wire: Wire, family: int, kind: int, keeps: bool) -> None:
    """Like rpc.nfsd: makes the server's socket, hands it over, starts the server, and exits."""
    sock = socket.socket(family, kind)
    if family == V6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((HOST[family], 0))
    if kind == TCP:
        sock.listen(64)
    try:
        (NFSD / "versions").write_text("-2 -3 +4\n")
        (NFSD / "portlist").write_text(f"{sock.fileno()}\n")
        (NFSD / "threads").write_text("1\n")
    except OSError as error:
        raise Unable(f"no NFS server: {error}") from error
    wire.tell(sock.getsockname()[:2])
    if keeps:
        wire.hear()


def nfs_client(worker: Worker, wire: Wire, peer: tuple[str, int], family: int, kind: int) -> None:
    """Calls a few times, and stays until it is told to go."""
    sock = bound(family, kind)
    worker.claim(sock, any_address=True, out=COUNT, in_=COUNT)
    sock.connect(tuple(peer))
    for number in range(COUNT):
        message = null_call(number, 4)
        if kind == UDP:
            sock.send(message)
            reply = sock.recv(1000)
        else:
            sock.sendall(struct.pack(">I", LAST | len(message)) + message)
            size = struct.unpack(">I", receive_all(sock, 4))[0] & ~LAST
            reply = receive_all(sock, size)
        if struct.unpack_from(">II", reply) != (number, 1):
            raise RuntimeError("no reply of the NFS server")
    wire.tell("done")
    wire.hear()


def serve(stage: Stage, family: int, kind: int, keeps: bool = False, stops: bool = False) -> None:
    """A server of the kernel, on a socket that a process made; its packets are nobody's."""
    mount_control()
    with playing(stage):
        mapper = stage.spawn("rpcbind", port_mapper)
        mapper.hear()
        maker = stage.spawn("maker", nfs_maker, family, kind, keeps)
        peer = maker.hear()
        if not keeps:
            maker.join()
        stage.worker.claim_nobody(
            proto="tcp" if kind == TCP else "udp", lport=peer[1],
            reasons=("kernel",),
            in_=2 * COUNT, out=2 * COUNT,
        )  # fmt: skip
        clients = [stage.spawn("client", nfs_client, peer, family, kind) for _ in range(2)]
        for client in clients:
            client.hear()
        if stops:
            (NFSD / "threads").write_text("0\n")
            quiet()
        for client in clients:
            client.tell()
            client.join()
        quiet()
        if keeps:
            maker.tell()
        (NFSD / "threads").write_text("0\n")
        quiet()
        mapper.tell()


@scenario(engines=("module",))
def nfs_listener_handed_over(stage: Stage) -> None:
    """rpc.nfsd makes the listener and exits: from the SYN on it is the kernel that serves."""
    serve(stage, V4, TCP)


@scenario(engines=("module",))
def nfs_listener_handed_over_v6(stage: Stage) -> None:
    """The same over IPv6."""
    serve(stage, V6, TCP)


@scenario(engines=("module",))
def nfs_listener_kept_by_its_maker(stage: Stage) -> None:
    """The same while its maker still has the listener: it does not serve."""
    serve(stage, V4, TCP, keeps=True)


@scenario(engines=("module",))
def nfs_datagrams_handed_over(stage: Stage) -> None:
    """A UDP socket that is handed to the NFS server by a process that exits."""
    serve(stage, V4, UDP)


@scenario(engines=("module",))
def nfs_stopped_under_its_clients(stage: Stage) -> None:
    """The server stops while clients are connected: what still comes is nobody's else."""
    serve(stage, V4, TCP, stops=True)
