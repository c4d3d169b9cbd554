# SPDX-License-Identifier: MIT
"""TCP: whole connections, and the parts of them where a socket is not there (yet, or any more)."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np

from nlproto.records.wire import how_name

from ..catalog import scenario
from ..stage import Stage, Unable, Wire, sysctl
from ..traffic import (
    TCP,
    V4,
    V6,
    ask,
    bound,
    kill_connection,
    listening,
    playing,
    receive_all,
    serve,
    tcp_client,
    tcp_server,
)
from ..truth import Worker

RST_AT_CLOSE = struct.pack("ii", 1, 0)
MSG_FASTOPEN, TCP_FASTOPEN = 0x20000000, 23


def echo(stage: Stage, family: int, pause: float = 0) -> None:
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, family, 4))
        stage.spawn("client", tcp_client, peer, family, 4, 4, pause).hear()


@scenario()
def tcp_v4(stage: Stage) -> None:
    """Connections over IPv4, from SYN to the last ACK."""
    echo(stage, V4)


@scenario()
def tcp_v6(stage: Stage) -> None:
    """Connections over IPv6, from SYN to the last ACK."""
    echo(stage, V6)


@scenario()
def tcp_syn_cookies(stage: Stage) -> None:
    """SYN cookies: SYN-ACKs without a socket belong to the listener's owner."""
    sysctl("net.ipv4.tcp_syncookies", 2)
    # an ACK and data that come at once make two connections on 5.10 (fixed in 5.11: 01770a166165)
    echo(stage, V4, pause=0.05)


def send_and_exit(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=3, in_=1)
    sock.connect(tuple(peer))
    sock.sendall(b"bye")
    os._exit(0)


@scenario()
def tcp_connect_send_exit(stage: Stage) -> None:
    """connect(), send(), _exit(): also what follows the exit is named."""
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 15, "", False))
        for _ in range(15):
            stage.spawn("leaver", send_and_exit, peer)


def accept_many(worker: Worker, wire: Wire, count: int) -> None:
    sock = listening(V4, backlog=4096)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname()[1])
    for _ in range(count):
        peer, _ = sock.accept()
        worker.also(claim, peer)
        with peer:
            receive_all(peer, 1 << 16)


@scenario()
def tcp_500_at_once(stage: Stage) -> None:
    """500 processes connect, send and exit at the same moment."""
    count = max(20, int(500 * stage.scale))
    sysctl("net.core.somaxconn", 4096)
    with playing(stage):
        server = stage.spawn("server", accept_many, count)
        stage.command("swarm", "swarm", "tcp", server.hear(), count)


def lingering_client(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=3, in_=3)
    sock.connect(tuple(peer))
    sock.sendall(b"a" * 10)
    receive_all(sock, 10)
    os._exit(0)


def late_closer(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=3, out=3)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.sendall(receive_all(peer, 10))
    wire.hear()
    peer.close()  # our FIN meets FIN_WAIT2 of a process that has exited
    wire.tell("closed")
    wire.hear()


@scenario()
def tcp_fin_wait2_and_time_wait(stage: Stage) -> None:
    """The client has exited; its FIN_WAIT2 and TIME_WAIT answers are still its own."""
    with playing(stage):
        server = stage.spawn("server", late_closer)
        peer = ask(server)
        client = stage.spawn("client", lingering_client, peer)
        client.join()
        server.tell()
        server.hear()
        time.sleep(0.1)  # the last ACK has no reader to wait for
        server.tell()


def big_sender(
    worker: Worker, wire: Wire, peer: tuple[str, int], size: int, host: str = ""
) -> None:
    sock = bound(V4, TCP, host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size)
    worker.claim(sock, out=5, in_=2)
    sock.connect(tuple(peer))
    sock.sendall(b"o" * size)
    os._exit(0)


def slow_reader(worker: Worker, wire: Wire, size: int, host: str = "") -> None:
    sock = listening(V4, host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    claim = worker.claim(sock, any_address=True, in_=5, out=2)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    wire.hear()
    if len(receive_all(peer, size + 1)) != size:
        raise RuntimeError("data lost")


@scenario()
def tcp_orphan_sends(stage: Stage) -> None:
    """A process exits with data unsent: what the kernel sends on its behalf is still its own."""
    size = 150_000
    with playing(stage):
        server = stage.spawn("server", slow_reader, size)
        peer = ask(server)
        stage.spawn("orphaning", big_sender, peer, size).join()
        server.tell()


def talk_early(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=3, in_=2)
    sock.connect(tuple(peer))
    sock.sendall(b"early")
    wire.tell("sent")
    receive_all(sock, 5)


def accept_late(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=3, out=2)
    wire.tell(sock.getsockname())
    wire.hear()
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.sendall(receive_all(peer, 5))
    receive_all(peer, 1)


@scenario()
def tcp_data_before_accept(stage: Stage) -> None:
    """Data arrives before accept(): the listener's owner."""
    with playing(stage):
        server = stage.spawn("server", accept_late)
        client = stage.spawn("client", talk_early, ask(server))
        client.hear()
        server.tell()


def fast_opener(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    for _ in range(3):
        sock = bound(V4, TCP)
        worker.claim(sock, out=2, in_=2)
        sock.sendto(b"fast!", MSG_FASTOPEN, tuple(peer))
        receive_all(sock, 5)
        sock.close()


def fast_server(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, TCP)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
    sock.listen(16)
    claim = worker.claim(sock, any_address=True, in_=6, out=6)
    wire.tell(sock.getsockname())
    for _ in range(3):
        peer, _ = sock.accept()
        worker.also(claim, peer)
        with peer:
            peer.sendall(receive_all(peer, 5))
            receive_all(peer, 1)


@scenario()
def tcp_fast_open(stage: Stage) -> None:
    """TCP Fast Open with data in the SYN."""
    sysctl("net.ipv4.tcp_fastopen", 0x207)
    with playing(stage):
        stage.spawn("client", fast_opener, ask(stage.spawn("server", fast_server)))


def refused(worker: Worker, wire: Wire, port: int) -> None:
    for _ in range(5):
        sock = bound(V4, TCP)
        worker.claim(sock, remote=("127.0.0.1", port), out=1, in_=1, exact=True)
        try:
            sock.connect(("127.0.0.1", port))
        except ConnectionRefusedError:
            continue
        raise RuntimeError("somebody listens there")


@scenario()
def tcp_refused(stage: Stage) -> None:
    """A closed port: the SYN is the client's, the RST nobody's."""
    with playing(stage):
        with bound(V4, TCP) as sock:
            port = sock.getsockname()[1]
        stage.worker.claim_nobody(proto="tcp", lport=port, reasons=("no_socket",), out=5, in_=5)
        stage.spawn("refused", refused, port)


def resetting(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=4, in_=2)
    sock.connect(tuple(peer))
    sock.sendall(b"reset")
    receive_all(sock, 5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_AT_CLOSE)
    sock.close()


def survive_reset(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=4, out=2)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.sendall(receive_all(peer, 5))
    try:
        peer.recv(10)
    except ConnectionResetError:
        return
    raise RuntimeError("no reset came")


@scenario()
def tcp_reset_by_close(stage: Stage) -> None:
    """close() with SO_LINGER 0: the RST belongs to the closing process, and reaches its peer."""
    with playing(stage):
        stage.spawn("resetting", resetting, ask(stage.spawn("server", survive_reset)))


def reset_client(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=3, in_=3)
    sock.connect(tuple(peer))
    sock.sendall(b"reset")
    try:
        sock.recv(10)
    except ConnectionResetError:
        wire.tell(sock.getsockname())
        wire.hear()


def late_segment(
    worker: Worker, wire: Wire, source: tuple[str, int], target: tuple[str, int]
) -> None:
    """As one that was long on its way: from the end that is closed, to the one that was reset."""
    ends = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    header = struct.pack("!HHIIBBHHH", source[1], target[1], 1, 1, 5 << 4, 0x18, 99, 0, 0) + b"late"
    words = struct.unpack("!18H", ends + struct.pack("!HH", 6, len(header)) + header)
    check = sum(words) % 0xFFFF ^ 0xFFFF  # RFC 1071
    header = header[:16] + struct.pack("!H", check) + header[18:]
    worker.claim_port(source[1], proto="tcp", dirs="o", rport=target[1], lens=[44], out=1)
    with socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(header, (target[0], 0))


def late_and_answer(records: np.ndarray, recorder: object, directory: Path) -> list[str]:
    found = [int(one["dir"]) for one in records if how_name(int(one["how"])) == "no_socket"]
    return [] if sorted(found) == [1, 2] else [f"no_socket in directions {found}, not in and out"]


@scenario(engines=("module",), check=late_and_answer)
def tcp_late_after_reset(stage: Stage) -> None:
    """A segment that comes after the reset, and the reset that answers it, have no socket."""
    with playing(stage):
        sock = listening(V4)
        claim = stage.worker.claim(sock, any_address=True)
        client = stage.spawn("client", reset_client, sock.getsockname())
        peer, _ = sock.accept()
        stage.worker.also(claim, peer)
        receive_all(peer, 5)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_AT_CLOSE)
        peer.close()
        stage.spawn("late", late_segment, sock.getsockname(), client.hear()).join()
        client.tell()


def reusing(worker: Worker, wire: Wire, port: int, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP, "", port)
    claim = worker.claim(sock, remote=(peer[0], peer[1]), out=4, in_=2)
    sock.connect(tuple(peer))
    sock.sendall(b"reuse")
    receive_all(sock, 5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_AT_CLOSE)
    sock.close()
    worker.end(claim)


def reset_server(worker: Worker, wire: Wire, count: int) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname())
    for _ in range(count):
        peer, _ = sock.accept()
        worker.also(claim, peer)
        with peer:
            try:
                peer.sendall(receive_all(peer, 5))
                peer.recv(10)
            except ConnectionResetError:
                pass


@scenario()
def tcp_port_reused(stage: Stage) -> None:
    """Fifteen processes use the same four-tuple one after another, within milliseconds."""
    with playing(stage):
        peer = ask(stage.spawn("server", reset_server, 15))
        with bound(V4, TCP) as sock:
            port = sock.getsockname()[1]
        for number in range(15):
            stage.spawn(f"user{number}", reusing, port, peer).join()


def mapped_server(worker: Worker, wire: Wire) -> None:
    sock = socket.socket(V6, TCP)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    sock.listen(8)
    sock.settimeout(30)
    claim = worker.claim(sock, any_address=True, in_=6, out=4)
    wire.tell(sock.getsockname()[1])
    serve(worker, claim, sock)


@scenario()
def tcp_v4_mapped(stage: Stage) -> None:
    """An IPv6 listener serves IPv4 clients."""
    with playing(stage):
        port = stage.spawn("server", mapped_server).hear()
        stage.spawn("client", tcp_client, ("127.0.0.1", port), V4, 2, 3).hear()


def self_connected(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, TCP)
    claim = worker.claim(sock, out=3, in_=3)
    sock.connect(sock.getsockname())
    sock.sendall(b"myself")
    receive_all(sock, 6)
    worker.count(claim, out=1, in_=1)


@scenario()
def tcp_connects_to_itself(stage: Stage) -> None:
    """A socket connected to itself (simultaneous open)."""
    with playing(stage):
        stage.spawn("ouroboros", self_connected)


def killed_client(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=3, in_=1)
    sock.connect(tuple(peer))
    sock.sendall(b"12345")
    receive_all(sock, 5)
    wire.tell(sock.getsockname()[1])
    wire.hear()
    try:
        if sock.recv(10):
            raise RuntimeError("data out of nowhere")
    except ConnectionAbortedError:
        return
    raise RuntimeError("the connection was not killed")


@scenario()
def tcp_killed_by_ss(stage: Stage) -> None:
    """`ss -K` sends a RST from its own context: it belongs to the socket's owner, not to ss."""
    with playing(stage):
        server = stage.spawn("server", reset_server, 1)
        client = stage.spawn("client", killed_client, ask(server))
        port = client.hear()
        kill_connection(port)
        client.tell()


def threads_share(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=3, out=1)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    copy = peer.dup()
    thread = threading.Thread(target=receive_all, args=(copy, 1 << 20))
    thread.start()
    wire.tell("reading")
    wire.hear()
    peer.close()
    thread.join()


def two_bursts(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=4, in_=2)
    sock.connect(tuple(peer))
    sock.sendall(b"1" * 100)
    wire.tell("sent")
    wire.hear()
    sock.sendall(b"2" * 100)


@scenario()
def tcp_thread_closes_another_reads(stage: Stage) -> None:
    """One thread closes its descriptor while another reads from a duplicate."""
    with playing(stage):
        server = stage.spawn("server", threads_share)
        client = stage.spawn("client", two_bursts, ask(server))
        server.hear()
        client.hear()
        server.tell()
        client.tell()


def file_sender(worker: Worker, wire: Wire, peer: tuple[str, int], path: str) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, out=5, in_=3)
    sock.connect(tuple(peer))
    with open(path, "rb") as file:
        sock.settimeout(None)
        sent = os.sendfile(sock.fileno(), file.fileno(), 0, 65536)
        while sent < 65536:
            sent += os.sendfile(sock.fileno(), file.fileno(), sent, 65536 - sent)
        reader, writer = os.pipe()
        file.seek(0)
        moved = os.splice(file.fileno(), writer, 4096)
        while moved:
            moved -= os.splice(reader, sock.fileno(), moved)
    if len(receive_all(sock, 65536 + 4096)) != 65536 + 4096:
        raise RuntimeError("data lost")


@scenario()
def tcp_sendfile_and_splice(stage: Stage) -> None:
    """Data sent by sendfile() and splice()."""
    path = stage.directory / "file"
    path.write_bytes(bytes(65536))
    with playing(stage):
        if not hasattr(os, "splice"):
            raise Unable("this Python has no os.splice")
        server = stage.spawn("server", tcp_server, V4, 1)
        stage.spawn("filesender", file_sender, ask(server), str(path))
