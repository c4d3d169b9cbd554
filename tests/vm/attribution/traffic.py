# SPDX-License-Identifier: MIT
"""Roles that many scenarios share: a UDP sender and receiver, a TCP server and client.

Each talks to the stage through its wire, so that phases are separated by messages and never
by sleeping.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from .stage import Child, Stage, Unable, Wire, run
from .truth import Worker, now

V4, V6 = socket.AF_INET, socket.AF_INET6
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
HOST: dict[int, str] = {V4: "127.0.0.1", V6: "::1"}
HEADERS: dict[int, int] = {V4: 28, V6: 48}
TCP_QUICKACK = socket.TCP_QUICKACK


def bound(family: int, kind: int, host: str = "", port: int = 0) -> socket.socket:
    """A socket bound to the host (loopback by default)."""
    sock = socket.socket(family, kind)
    sock.settimeout(30)
    if kind == TCP:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host or HOST[family], port))
    return sock


def listening(family: int = V4, host: str = "", port: int = 0, backlog: int = 128) -> socket.socket:
    """A listening TCP socket."""
    sock = bound(family, TCP, host, port)
    sock.listen(backlog)
    return sock


def receive_all(sock: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes, or less at the end of the stream."""
    data = b""
    while len(data) < size:
        part = sock.recv(min(1 << 20, size - len(data)))
        if not part:
            break
        data += part
    return data


def udp_receiver(worker: Worker, wire: Wire, family: int, host: str = "", count: int = 0) -> None:
    """Bind, tell the address, receive ``count`` datagrams (or until told), never send."""
    sock = bound(family, UDP, host)
    claim = worker.claim(sock, exact=True)
    wire.tell(sock.getsockname()[:2])
    for _ in range(count):
        sock.recv(65536)
    worker.count(claim, in_=count)
    wire.tell("done")
    wire.hear()


def udp_echo(worker: Worker, wire: Wire, family: int, count: int, host: str = "") -> None:
    """Bind, tell the address, send each of ``count`` datagrams back."""
    sock = bound(family, UDP, host)
    claim = worker.claim(sock, exact=True)
    wire.tell(sock.getsockname()[:2])
    send_back(worker, claim, sock, count)


def send_back(worker: Worker, claim: str, sock: socket.socket, count: int) -> None:
    """Send each of ``count`` datagrams back, as is claimed."""
    for _ in range(count):
        data, peer = sock.recvfrom(65536)
        sock.sendto(data, peer)
    worker.count(claim, in_=count, out=count)


def serve(worker: Worker, claim: str, listener: socket.socket, count: int = 2) -> None:
    """Accept ``count`` connections, one after the other, and send back what comes on them."""
    for _ in range(count):
        peer, _ = listener.accept()
        worker.also(claim, peer)
        with peer:
            while data := peer.recv(1000):
                peer.sendall(data)


def udp_sender(
    worker: Worker, wire: Wire, peer: tuple[str, int], family: int, count: int, replies: bool
) -> None:
    """Send ``count`` datagrams from an unconnected socket, and read the replies if there are."""
    sock = bound(family, UDP, "0.0.0.0" if family == V4 else "::")
    claim = worker.claim(sock, exact=True)
    for number in range(count):
        sock.sendto(b"x" * (10 + number), tuple(peer))
        if replies:
            sock.recv(65536)
    worker.count(claim, out=count, in_=count if replies else 0)
    wire.tell("done")
    wire.hear()


def tcp_server(
    worker: Worker, wire: Wire, family: int, connections: int, host: str = "", reply: bool = True
) -> None:
    """Listen, tell the address, serve connections one after another: echo until their end."""
    sock = listening(family, host)
    claim = worker.claim(sock, any_address=True)
    wire.tell(sock.getsockname()[:2])
    for _ in range(connections):
        peer, _ = sock.accept()
        worker.also(claim, peer)
        with peer:
            while data := peer.recv(65536):
                if reply:
                    peer.sendall(data)
    # SYN, ACK, data, FIN in; SYN-ACK and one more out at least.
    worker.count(claim, in_=3 * connections, out=2 * connections)


def tcp_client(
    worker: Worker,
    wire: Wire,
    peer: tuple[str, int],
    family: int,
    connections: int,
    exchanges: int,
    pause: float = 0,
) -> None:
    """Connect, wait `pause` seconds, exchange a few messages, close; several times."""
    for _ in range(connections):
        sock = bound(family, TCP)
        claim = worker.claim(sock, any_address=True)
        sock.connect(tuple(peer))
        time.sleep(pause)
        for number in range(exchanges):
            sock.sendall(b"y" * (100 + number))
            receive_all(sock, 100 + number)
        sock.close()
        worker.count(claim, out=3 + exchanges, in_=1 + exchanges)
    wire.tell("done")


def ask(child: Child) -> Any:
    """Hear an address from a worker as a tuple."""
    return tuple(child.hear())


@contextlib.contextmanager
def playing(stage: Stage) -> Iterator[Stage]:
    """Attach the engine, play, then wait for the workers."""
    stage.attach()
    yield stage
    stage.join()


def kill_connection(port: int) -> None:
    """Have `ss -K` end the connection of a local port. Unable when this kernel has no such call."""
    if str(port) not in run("ss", "-nK", "sport", "=", f":{port}"):  # it lists what it killed
        raise Unable("this kernel was built without INET_DIAG_DESTROY")


def handover(worker: Worker, claim: str) -> None:
    """End a claim now."""
    worker.end(claim, now())
