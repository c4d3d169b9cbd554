# SPDX-License-Identifier: MIT
"""AF_SMC: sockets that the kernel connects by TCP sockets of its own.

Without a device for it a connection falls back: the file gets the TCP socket. The handshake is
the kernel's; who uses the connection then has it.
"""

from __future__ import annotations

import socket

from ..catalog import scenario
from ..stage import Stage, Unable, Wire, run
from ..traffic import TCP, V4, ask, playing, receive_all, tcp_client, tcp_server
from ..truth import Worker

AF_SMC = 43  # linux/socket.h
TIMES = 4
SIZE = 100


def smc_socket() -> socket.socket:
    """An SMC socket that Python takes for a TCP one, as a program under smc_run does."""
    run("modprobe", "smc")
    try:
        made = socket.socket(AF_SMC, TCP, 0)
    except OSError as error:
        raise Unable(f"AF_SMC: {error.strerror}") from error
    sock = socket.socket(V4, TCP, 0, fileno=made.detach())
    sock.settimeout(30)
    sock.bind(("127.0.0.1", 0))
    return sock


def serves(worker: Worker, wire: Wire, connections: int) -> None:
    try:
        sock = smc_socket()
    except Unable as error:
        wire.tell(str(error))
        return
    sock.listen()
    claim = worker.claim_port(sock.getsockname()[1], proto="tcp", dirs="io", reasons=("kernel",))
    wire.tell(sock.getsockname())
    for _ in range(connections):
        peer, _ = sock.accept()
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)
    worker.count(claim, in_=3 * connections, out=2 * connections)


def talks(worker: Worker, wire: Wire, peer: tuple[str, int], connections: int) -> None:
    for _ in range(connections):
        sock = smc_socket()
        port = sock.getsockname()[1]
        before = worker.claim_nobody(proto="tcp", lport=port, reasons=("kernel",))
        sock.connect(tuple(peer))
        worker.end(before)
        claim = worker.claim_port(port, proto="tcp", dirs="io")
        for _ in range(TIMES):
            sock.sendall(bytes(SIZE))
            receive_all(sock, SIZE)
        sock.close()
        worker.count(claim, out=1 + TIMES, in_=TIMES)
    wire.tell("done")


def server_of(stage: Stage, connections: int) -> tuple[str, int]:
    answer = stage.spawn("server", serves, connections).hear()
    if isinstance(answer, str):
        raise Unable(answer)
    return answer[0], answer[1]


@scenario(engines=("module",))
def smc_both_ends(stage: Stage) -> None:
    """Client and server of AF_SMC; the connection falls back to TCP."""
    with playing(stage):
        peer = server_of(stage, 3)
        stage.spawn("client", talks, peer, 3).hear()


@scenario(engines=("module",))
def smc_client_plain_listener(stage: Stage) -> None:
    """The server knows nothing of SMC."""
    with playing(stage):
        server_of(stage, 0)
        peer = ask(stage.spawn("plain", tcp_server, V4, 3))
        stage.spawn("client", talks, peer, 3).hear()


@scenario(engines=("module",))
def smc_listener_plain_client(stage: Stage) -> None:
    """The client knows nothing of SMC."""
    with playing(stage):
        peer = server_of(stage, 3)
        stage.spawn("plain", tcp_client, peer, V4, 3, TIMES).hear()


def heir_talks(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.hear()
    worker.claim_port(sock.getsockname()[1], proto="tcp", dirs="io", out=TIMES, in_=TIMES)
    for _ in range(TIMES):
        sock.sendall(bytes(SIZE))
        receive_all(sock, SIZE)
    wire.tell("done")
    wire.hear()


def leaves(worker: Worker, wire: Wire, stage: Stage, peer: tuple[str, int]) -> None:
    sock = smc_socket()
    before = worker.claim_nobody(proto="tcp", lport=sock.getsockname()[1], reasons=("kernel",))
    sock.connect(tuple(peer))
    worker.end(before)
    child = stage.spawn("heir", heir_talks, sock)
    sock.close()
    child.tell()
    child.hear()
    wire.tell("done")
    child.tell()
    child.join()


@scenario(engines=("module",))
def smc_left_to_a_child(stage: Stage) -> None:
    """The child alone has the connection."""
    with playing(stage):
        peer = server_of(stage, 1)
        stage.spawn("parent", leaves, stage, peer).hear()
