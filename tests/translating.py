# SPDX-License-Identifier: MIT
"""A host that translates addresses, a container behind it and a client, in network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from nlproto.client.client import DaemonClient
from waiting import patient, until

SERVER = """
import socket, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
kind = socket.SOCK_DGRAM if sys.argv[3] == "udp" else socket.SOCK_STREAM
server = socket.socket(family, kind)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((sys.argv[1], int(sys.argv[2])))
print(server.getsockname()[1], flush=True)
def serve(peer):
    with peer:
        while data := peer.recv(100):
            peer.sendall(data)
if kind == socket.SOCK_DGRAM:
    while True:
        server.sendto(*server.recvfrom(100))
server.listen()
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""

CLIENT = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
kind = socket.SOCK_DGRAM if sys.argv[3] == "udp" else socket.SOCK_STREAM
with socket.socket(family, kind) as peer:
    peer.settimeout(300)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    peer.bind(("", int(sys.argv[4])))
    peer.connect((sys.argv[1], int(sys.argv[2])))
    while True:
        peer.send(b"question")
        assert peer.recv(100) == b"question"
        print(*peer.getsockname()[:2], flush=True)
        if not sys.stdin.readline():
            break
"""


def sh(line: str, text: str | None = None) -> str:
    return subprocess.run(
        line.split(), input=text, check=True, capture_output=True, text=True
    ).stdout


@dataclass
class Process:
    """A client or a server; `port` is its own."""

    child: subprocess.Popen[str]
    port: int = 0
    address: str = ""

    @property
    def pid(self) -> int:
        return self.child.pid

    def again(self) -> None:
        """Let a client ask and be answered once more."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        assert self.child.stdout.readline()

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


@dataclass
class Place:
    """Namespaces HOST (10.88.0.1, 10.77.0.1), BOX (10.88.0.2) and FAR (10.77.0.2), IPv6 fd88, fd77.

    `box` and `far` are beside `host`, which forwards between them. INNER (10.99.0.2), if wanted, is
    behind `box`.
    """

    names: dict[str, str]
    processes: list[Process] = field(default_factory=list)

    def run(self, where: str, line: str, text: str | None = None) -> str:
        return sh(f"ip netns exec {self.names[where]} {line}", text)

    def rules(self, text: str, where: str = "host") -> None:
        """Give it these chains of NAT, for both families."""
        self.run(where, "nft -f -", f"table inet nat {{\n{text}\n}}\n")

    def inode(self, where: str) -> int:
        return os.stat(f"/run/netns/{self.names[where]}").st_ino

    def start(self, where: str, code: str, *words: object) -> Process:
        command = [sys.executable, "-c", code, *map(str, words)]
        process = Process(
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[where], *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self.processes.append(process)
        assert process.child.stdout is not None
        line = process.child.stdout.readline().split()
        assert line, "it could not begin"
        process.address, process.port = line[0], int(line[-1])
        return process

    def end_all(self) -> None:
        while self.processes:
            self.processes.pop().end()

    def server(self, where: str, port: int, proto: str = "tcp", address: str = "") -> Process:
        return self.start(where, SERVER, address, port, proto)

    def client(
        self, where: str, address: str, port: int, proto: str = "tcp", own: int = 0
    ) -> Process:
        """One that was answered once."""
        return self.start(where, CLIENT, address, port, proto, own)


PUBLISHED = """
chain pre {
  type nat hook prerouting priority -100
  tcp dport 8080 dnat ip to 10.88.0.2:80
  udp dport 8080 dnat ip to 10.88.0.2:80
  tcp dport 8082 redirect to :9090
  tcp dport 8081 dnat ip6 to [fd88::2]:80
}
chain out {
  type nat hook output priority -100
  tcp dport 8080 dnat ip to 10.88.0.2:80
}
chain post {
  type nat hook postrouting priority 100
  ip saddr 10.88.0.0/24 ip daddr != 10.88.0.0/24 masquerade
  ip saddr 10.88.0.2 ip daddr 10.88.0.2 masquerade
  ip saddr 127.0.0.0/8 ip daddr 10.88.0.2 masquerade
}
"""


def ask(path: str, **question: Any) -> list[dict[str, Any]]:
    """The flows that fit the question, from the daemon at `path`."""
    with DaemonClient(path, timeout=patient(10)) as asking:
        flows: list[dict[str, Any]] = asking.who(**question)["flows"]
    return flows


def flow_of(path: str, process: Process, **question: object) -> dict[str, Any]:
    """The flow of a process among those that fit the question, from the daemon at `path`."""

    def look() -> dict[str, Any] | None:
        return next((one for one in ask(path, **question) if one["pid"] == process.pid), None)

    found: dict[str, Any] = until(look, 20, f"a flow of {process.pid} for {question}")
    return found


def became(flow: Mapping[str, Any]) -> tuple[Any, ...]:
    """What NAT made of a flow's ends."""
    return tuple(flow[name] for name in ("nat_local", "nat_lport", "nat_remote", "nat_rport"))


@contextmanager
def place(inner: bool = False) -> Iterator[Place]:
    links = {"box": ("host", 88), "far": ("host", 77)} | ({"inner": ("box", 99)} if inner else {})
    names = {one: f"ph{os.getpid()}{one}{'i' * inner}" for one in ("host", *links)}
    found = Place(names)
    try:
        for name in names.values():
            sh(f"ip netns add {name}")
            sh(f"ip -n {name} link set lo up")
        for other, (by, net) in links.items():
            near = names[by]
            sh(f"ip -n {near} link add {other} type veth peer name eth0 netns {names[other]}")
            for name, link, number in ((near, other, 1), (names[other], "eth0", 2)):
                sh(f"ip -n {name} addr add 10.{net}.0.{number}/24 dev {link}")
                sh(f"ip -n {name} -6 addr add fd{net}::{number}/64 dev {link} nodad")
                sh(f"ip -n {name} link set {link} up")
            sh(f"ip -n {names[other]} route add default via 10.{net}.0.1")
            sh(f"ip -n {names[other]} -6 route add default via fd{net}::1")
        switches = "ipv4/ip_forward ipv6/conf/all/forwarding ipv4/conf/all/route_localnet"
        words = "tee " + " ".join(f"/proc/sys/net/{one}" for one in switches.split())
        for by in {by for by, _ in links.values()}:
            found.run(by, words, "1")
        yield found
    finally:
        found.end_all()
        for name in names.values():
            with suppress(subprocess.CalledProcessError):
                sh(f"ip netns del {name}")
