# SPDX-License-Identifier: MIT
"""A user without rights does the worst, of many kinds at once (tests/attack.py).

attacking.py SOCKET UID METRICS_PORT CGROUP      0: no metrics; "": no control group to write to
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.idna  # noqa: F401  # a user may not be able to read it later
import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from nameserver import A, answer, question
from nlproto.client.frames import Kind, encode_json

__all__ = ["CONNECTIONS", "TRAFFIC", "hostile"]

CONNECTIONS = {"filters": 11, "patterns": 4, "questions": 16, "unread": 16, "lookups": 6}
CONNECTIONS |= {"churn": 4, "hellos": 4, "flows": 2}
"""Connections of each kind of attack: 63."""


# Attacks by requests


def _name_filter(number: int) -> str:
    words = " or ".join(f'pname "*{number}*{n}*z"' for n in range(125))
    return words[:4000].rpartition(" or ")[0]


def _connect(path: str) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.connect(path)
    one.settimeout(60)
    return one


def _request(number: int, op: str, **fields: object) -> bytes:
    return encode_json(Kind.CONTROL, {"id": number, "op": op, **fields})


def _drain(one: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while one.recv(1 << 20, socket.MSG_DONTWAIT):
            pass


def _traffic() -> tuple[socket.socket, socket.socket]:
    """Own packets for own filters: one socket, 300 holders."""
    receiver = _bound()
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return sender, receiver


_QUESTIONS = [
    _request(1, "history", limit=10_000),
    _request(2, "who", host="0.0.0.0/0", limit=10_000),
    _request(3, "usage", by="domain", since=1e10, limit=10_000),
    _request(4, "news", kind="destination", since=1e9, limit=10_000),
    _request(5, "who", domain="*" * 256, limit=10_000),
    _request(6, "usage", by="container", since=1e10, limit=10_000),
]


def _attack(kind: str, path: str, count: int) -> NoReturn:
    sender, receiver = _traffic()
    port = receiver.getsockname()[1]
    if kind == "lookups":
        for _ in range(300):
            if os.fork() == 0:
                signal.pause()
    if kind == "questions":  # 11,000 own flows
        for number in range(11_000):
            sender.sendto(b"x", (f"127.0.{number >> 8}.{number & 255}", port))
            if number % 10 == 9:
                time.sleep(0.008)
    if kind in ("churn", "hellos"):
        _churn(kind, path, count)
    held = [_connect(path) for _ in range(count)]
    requests: Callable[[int], list[bytes]] = {
        "filters": lambda n: [_request(1, "subscribe", filter=_name_filter(n))],
        "flows": lambda n: [_request(1, "subscribe", flows=True)],
        "patterns": lambda n: [
            _request(i, "subscribe", filter=f'pname "{"[" * 4000}"') for i in range(100)
        ],
        "questions": lambda n: _QUESTIONS * 3,
        "unread": lambda n: [_request(i, "history", limit=10_000) for i in range(16)],
        "lookups": lambda n: (
            [
                _request(1, "lookup", keys=[{"cookie": _cookie(receiver)}] * 1000),
                _request(2, "owner", port=port),
            ]
            * 4
        ),
    }[kind]
    for number, one in enumerate(held):
        with contextlib.suppress(OSError):
            one.setblocking(False)
            one.send(b"".join(requests(number)))
    while True:
        for _ in range(10 if kind in ("filters", "flows") else 0):
            sender.sendto(b"x", ("127.0.0.1", port))
        time.sleep(0.05)
        if kind == "unread":
            continue
        for number, one in enumerate(held):
            try:
                _drain(one)
                if kind not in ("filters", "flows"):
                    one.send(b"".join(requests(number)))
            except OSError:
                pass


def _cookie(one: socket.socket) -> int:
    return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)  # SO_COOKIE


def _churn(kind: str, path: str, count: int) -> NoReturn:
    """Ask and go at once; or ask cheap things without end."""
    burst = _request(1, "history", limit=10_000) * 16
    if kind == "hellos":
        burst = _request(1, "hello", protocol=1) * 1000
        held = [_connect(path) for _ in range(count)]
        for one in held:
            one.setblocking(False)
        while True:
            for one in held:
                with contextlib.suppress(OSError):
                    one.send(burst)
                with contextlib.suppress(OSError):
                    _drain(one)
    while True:
        with contextlib.suppress(OSError):
            held = [_connect(path) for _ in range(count)]
            for one in held:
                one.send(burst)
            for one in held:
                one.close()


# Attacks by what is on the wire, and by who sends it


def _bound() -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.bind(("127.0.0.1", 0))
    return one


def _unheld() -> NoReturn:
    """Sockets that carry, in messages that nobody receives, 1,000 others that nobody else has."""
    kept, ports = [], []
    for _ in range(20):
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        carried = [_bound() for _ in range(50)]
        socket.send_fds(left, [b"x"], [one.fileno() for one in carried])
        ports += [one.getsockname()[1] for one in carried]
        kept += [left, right]
    _send_to(ports)


def _shared() -> NoReturn:
    """200 sockets that 300 processes have."""
    kept = [_bound() for _ in range(200)]
    for _ in range(300):
        if os.fork() == 0:
            signal.pause()
    _send_to([one.getsockname()[1] for one in kept])


def _send_to(ports: list[int]) -> NoReturn:
    """500 packets a second, one in ten of another socket."""
    while True:
        for number in range(0, len(ports), 10):
            with _bound() as sender:
                for port in ports[number : number + 10]:
                    sender.sendto(b"x", ("127.0.0.1", port))
            time.sleep(0.02)


def _new_flows() -> NoReturn:
    """300 new flows a second: each goes to another address, one in ten from another socket."""
    number = 0
    while True:
        with _bound() as sender:
            for _ in range(10):
                number += 1
                address = f"127.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
                sender.sendto(b"x", (address, 9))
        time.sleep(0.033)


def _connections() -> NoReturn:
    """800 open TCP connections that come and go, for whoever asks how connections go."""
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    kept: list[socket.socket] = []
    while True:
        if len(kept) < 400:
            kept += [socket.create_connection(server.getsockname()), server.accept()[0]]
        else:
            kept.pop(random.randrange(len(kept))).close()
        if kept and len(kept) % 20 == 0:
            with contextlib.suppress(OSError):
                kept[random.randrange(len(kept))].send(b"x")
        time.sleep(0.002)


def _names() -> NoReturn:
    """Processes that live a moment and send, with names of 100 KB and of terrible letters."""
    words = [b"\x1b]0;x\x07", b"=cmd()|'", b"\xff\xfe", b"\x0c0::/", b"[/red]<script>", b"a:b:c"]
    number = 0
    while True:
        number += 1
        name = words[number % len(words)] * 12_000
        shell = [name[:100_000], b"-c", b"echo x > /dev/udp/127.0.0.1/9", name[:10_000]]
        child = subprocess.Popen(shell, executable="/bin/bash", stderr=subprocess.DEVNULL)
        child.wait()
        time.sleep(0.2)


def _cgroups(root: str) -> NoReturn:
    """The same from control groups whose names hold what a name can hold."""
    names = [b"a\x0cb", b"a\x0c0::", b"x\x1c\x1d\x1e", b"\xc2\x85\xe2\x80\xa8", b"\xff\r:"]
    names += [b"docker-" + b"0" * 64 + b".scope", b"system.slice", b"sshd.service", b"n" * 255]
    for name in names:
        folder = os.path.join(os.fsencode(root), name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        if os.fork() == 0:
            with open(os.path.join(folder, b"cgroup.procs"), "wb") as file:
                file.write(b"%d" % os.getpid())
            while True:
                with _bound() as sender:
                    sender.sendto(b"x", ("127.0.0.1", 9))
                time.sleep(0.5)
    signal.pause()
    raise AssertionError


_NEW_USER, _NEW_NET = 0x10000000, 0x40000000


def _namespaces() -> NoReturn:
    """60 network namespaces; in them DNS answers and ClientHellos of whatever one likes."""
    libc = ctypes.CDLL(None)
    for number in range(60):
        if os.fork() == 0:
            if libc.unshare(_NEW_USER | _NEW_NET):
                signal.pause()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                up = struct.pack("16sH14x", b"lo", 0x1)
                fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
            _answers(number)
    signal.pause()
    raise AssertionError


def _answers(seed: int) -> NoReturn:
    generator = random.Random(seed)
    server, client = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    server.bind(("127.0.0.1", 53))
    client.bind(("127.0.0.1", 0))
    tls = socket.create_server(("127.0.0.1", 443))
    while True:
        asked = question(f"n{generator.randrange(10**9)}.example")
        client.sendto(asked, ("127.0.0.1", 53))
        records = [
            (f"n{n}.example", A, 60, f"10.{seed}.{generator.randrange(256)}.{n}") for n in range(30)
        ]
        told = answer(asked, records)
        if generator.random() < 0.5:
            told = generator.randbytes(len(told)) if generator.random() < 0.5 else told[:-7]
        server.sendto(told, client.getsockname())
        _drain(client)
        with socket.create_connection(("127.0.0.1", 443)) as one, tls.accept()[0]:
            one.sendall(b"\x16\x03\x01\xff\xff\x01\x00\xff\xfb\x03\x03" + generator.randbytes(900))
        time.sleep(0.3)


def _scrapes(port: int) -> NoReturn:
    """20 clients of the metrics that hardly read."""
    kept: list[socket.socket] = []
    while port:
        try:
            one = socket.create_connection(("127.0.0.1", port), 5)
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
            kept.append(one)
        except OSError:
            pass
        if len(kept) > 20:
            kept.pop(0).close()
        time.sleep(0.05)
    signal.pause()
    raise AssertionError


TRAFFIC: dict[str, Callable[[int, str], NoReturn]] = {
    "unheld": lambda port, root: _unheld(),
    "shared": lambda port, root: _shared(),
    "new flows": lambda port, root: _new_flows(),
    "connections": lambda port, root: _connections(),
    "names": lambda port, root: _names(),
    "namespaces": lambda port, root: _namespaces(),
    "scrapes": lambda port, root: _scrapes(port),
    "cgroups": lambda port, root: _cgroups(root) if root else _new_flows(),
}
"""Attacks that need no connection to the daemon."""


def hostile(path: str, uid: int, metrics: int, root: str) -> NoReturn:
    """Never returns. A user may not be able to read this file: it is read before."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    for work in TRAFFIC.values():
        if os.fork() == 0:
            work(metrics, root)
    for kind, count in CONNECTIONS.items():
        if os.fork() == 0:
            _attack(kind, path, count)
    signal.pause()
    raise AssertionError


if __name__ == "__main__":
    hostile(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
