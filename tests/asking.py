# SPDX-License-Identifier: MIT
"""Processes that ask a DNS server for a name and talk to an address, or speak TLS."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nameserver import AAAA, CNAME, A
from nlproto.client.client import DaemonClient
from waiting import there, until

SERVER = "127.0.53.53"

ZONE = {
    "www.example": [("www.example", A, 300, "127.0.53.80")],
    "alias.example": [
        ("alias.example", CNAME, 300, "cdn.example"),
        ("cdn.example", CNAME, 300, "edge.example"),
        ("edge.example", A, 60, "127.0.53.81"),
    ],
    "other.example": [("nobody-asked.example", A, 60, "127.0.53.82")],
    "six.example": [("six.example", AAAA, 300, "::1")],
    "stream.example": [("stream.example", A, 300, "127.0.53.83")],
    "shared.example": [("shared.example", A, 300, "127.0.53.84")],
    "short.example": [("short.example", A, 1, "127.0.53.85")],
}

FALSE = {"www.example": [("www.example", A, 300, "127.0.53.86")]}
"""What somebody sends who does not know the questions."""

CLIENT = """
import socket, sys, time
from nameserver import ask
name, kind, tcp, server, address, port, wait, stay = sys.argv[1:9]
if name:
    ask(name, int(kind), server, tcp == "tcp")
time.sleep(float(wait))
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.socket(family, socket.SOCK_STREAM) as peer:
    peer.connect((address, int(port)))
    print(peer.getsockname()[1], flush=True)
    if stay:
        sys.stdin.readline()
"""

STUB = """
# a resolver as a system has it: it asks another one, and answers whoever asks it
import ctypes, socket, sys
address, port, upstream, comm = sys.argv[1:5]
ctypes.CDLL(None).prctl(15, comm.encode())
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
    here.bind((address, int(port)))
    print(port, flush=True)
    kept = []  # engine packet cannot always name a socket that is closed at once
    while True:
        asked, peer = here.recvfrom(4096)
        kept.append(there := socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        there.connect((upstream, 53))
        there.send(asked)
        here.sendto(there.recv(4096), peer)
"""


class Client:
    """A process that asks for a name and connects to an address, `wait` seconds later.

    `stay`: it ends when it is told to, else at once.
    """

    def __init__(
        self,
        name: str,
        port: int,
        address: str,
        kind: int = A,
        tcp: str = "",
        server: str = SERVER,
        wait: float = 0,
        stay: bool = True,
        inside: Sequence[str] = (),
    ) -> None:
        words = [name, str(kind), tcp, server, address, str(port), str(wait), "stay" * stay]
        self.peer = port
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-c", CLIENT, *words],
            env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the client could not connect"
        self.port = int(line)

    def end(self) -> None:
        self.process.communicate(b"\n", timeout=20)
        assert self.process.returncode == 0


TLS_CLIENT = """
import socket, ssl, sys
name, address, port = sys.argv[1:4]
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
# more than a segment of a small MTU: as with many protocols, or a key share of post-quantum kind
context.set_alpn_protocols([f"h{number:0250}" for number in range(int(sys.argv[4]))])
with socket.socket() as peer:
    peer.connect((address, int(port)))
    with context.wrap_socket(peer, server_hostname=name or None) as secure:
        print(secure.getsockname()[1], flush=True)
        sys.stdin.readline()
"""

TLS_ADDRESS, TLS_PORT = "127.0.53.90", 443


class TlsClient:
    """A process that speaks TLS to tls_server(), and sends `name` in its ClientHello."""

    def __init__(self, name: str, protocols: int = 0) -> None:
        words = [name, TLS_ADDRESS, str(TLS_PORT), str(protocols)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TLS_CLIENT, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        line = there(self.process.stdout).readline()
        assert line, "no connection of TLS"
        self.port = int(line)

    def end(self) -> None:
        self.process.communicate(b"\n", timeout=20)


@contextmanager
def tls_server(directory: Path) -> Iterator[None]:
    """A real server of TLS at TLS_ADDRESS."""
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "1", "-subj",
            "/CN=hidden.example"]  # fmt: skip
    subprocess.run(made, cwd=directory, check=True, capture_output=True)
    command = ["openssl", "s_server", "-accept", f"{TLS_ADDRESS}:{TLS_PORT}", "-quiet",
               "-cert", "cert.pem", "-key", "key.pem"]  # fmt: skip
    server = subprocess.Popen(command, cwd=directory, stdin=subprocess.PIPE)
    try:
        until(_accepts_tls, 20, "a server of TLS")
        yield
    finally:
        server.kill()
        server.communicate()


def _accepts_tls() -> bool:
    try:
        socket.create_connection((TLS_ADDRESS, TLS_PORT)).close()
    except OSError:
        return False
    return True


@contextmanager
def stub(
    address: str, port: int, upstream: str, comm: str, inside: Sequence[str] = ()
) -> Iterator[int]:
    """A resolver that asks `upstream`; yields its pid."""
    process = subprocess.Popen(
        [*inside, sys.executable, "-c", STUB, address, str(port), upstream, comm],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def seen(path: str, client: Any) -> dict[str, Any]:
    """The flow of the client's connection, from its own side."""

    def look() -> dict[str, Any] | None:
        with DaemonClient(path) as asking:
            flows = asking.who(port=client.port)["flows"]
        found = [flow for flow in flows if flow["pid"] == client.process.pid]
        return found[0] if found else None

    found: dict[str, Any] = until(look, 20, "its flow")
    return found


def named(path: str, client: Any, name: str) -> bool:
    """Wait until the client's connection has this name."""
    return bool(until(lambda: seen(path, client)["domain"] == name, 20, f"the name {name}"))
