# SPDX-License-Identifier: MIT
"""One user without rights does the worst to a daemon, on 63 connections; root goes on working.

    sudo .venv/bin/python tests/attack.py [SECONDS [WORDS OF THE DAEMON'S COMMAND ...]]

(`make attack`; a shorter one is among tests/host.)

Root sends 3,000 packets a second over loopback, and asks. Prints how long root waited for
`hello`, `who` and `subscribe`, what was lost, and how long SIGTERM took under attack.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlproto.client.client import DaemonClient, Event, StreamBatch
from nlproto.client.frames import Kind, encode_json
from nlproto.errors import Error

RATE = 3000  # packets/s of root's
PREPARING = 12.0  # s that the attackers have before anything is measured
CONNECTIONS = {"filters": 12, "patterns": 4, "questions": 16, "unread": 16, "lookups": 6}
CONNECTIONS |= {"churn": 5, "hellos": 4}
"""Connections of each kind of attack: 63."""
TRAFFIC = ("unheld", "shared")
"""Attacks by sockets alone, whose holders are dear to look for."""


# The attacker


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
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return sender, receiver


def hostile(path: str, uid: int) -> None:
    """Never returns. A user may not be able to read this file: it is read before."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    for kind in TRAFFIC:
        if os.fork() == 0:
            _send_to(_unheld() if kind == "unheld" else _shared())
    for kind, count in CONNECTIONS.items():
        if os.fork() == 0:
            _attack(kind, path, count)
    signal.pause()


def _unheld() -> list[socket.socket]:
    """Sockets that carry, in messages that nobody receives, 1,000 others that nobody else has."""
    kept = []
    for _ in range(20):
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        carried = [_bound() for _ in range(50)]
        socket.send_fds(left, [b"x"], [one.fileno() for one in carried])
        _PORTS.extend(one.getsockname()[1] for one in carried)
        kept += [left, right]
    return kept


def _shared() -> list[socket.socket]:
    """200 sockets that 300 processes have."""
    kept = [_bound() for _ in range(200)]
    _PORTS.extend(one.getsockname()[1] for one in kept)
    for _ in range(300):
        if os.fork() == 0:
            signal.pause()
    return kept


_PORTS: list[int] = []
"""Where an attacker sends to."""


def _bound() -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.bind(("127.0.0.1", 0))
    return one


def _send_to(kept: list[socket.socket]) -> None:
    """500 packets a second, one in ten of another socket. Never returns."""
    while kept:
        for number in range(0, len(_PORTS), 10):
            with _bound() as sender:
                for port in _PORTS[number : number + 10]:
                    sender.sendto(b"x", ("127.0.0.1", port))
            time.sleep(0.02)


def _attack(kind: str, path: str, count: int) -> None:
    """Never returns."""
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
        "patterns": lambda n: [
            _request(i, "subscribe", filter=f'pname "{"[" * 4000}"') for i in range(100)
        ],
        "questions": lambda n: (
            [
                _request(1, "history", limit=10_000),
                _request(2, "who", host="0.0.0.0/0", limit=10_000),
            ]
            * 8
        ),
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
        for _ in range(10 if kind == "filters" else 0):
            sender.sendto(b"x", ("127.0.0.1", port))
        time.sleep(0.05)
        if kind == "unread":
            continue
        for number, one in enumerate(held):
            try:
                _drain(one)
                if kind != "filters":
                    one.send(b"".join(requests(number)))
            except OSError:
                pass


def _cookie(one: socket.socket) -> int:
    return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)  # SO_COOKIE


def _churn(kind: str, path: str, count: int) -> None:
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


@contextlib.contextmanager
def attackers(path: str, uid: int) -> Iterator[None]:
    words = [sys.executable, __file__, "--hostile", path, str(uid)]
    # one session, as a login is: schedulers divide the CPUs among sessions
    all_of_them = subprocess.Popen(words, cwd="/", start_new_session=True)
    try:
        yield
    finally:
        os.killpg(all_of_them.pid, signal.SIGKILL)
        all_of_them.wait()


# Root


@dataclass
class Found:
    """Seconds that root waited, and what became of its records."""

    waited: dict[str, list[float]] = field(
        default_factory=lambda: {"hello": [], "who": [], "subscribe": []}
    )
    failed: list[str] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    received: int = 0
    dropped: int = 0
    term: float = 0.0
    memory: int = 0
    """Most resident memory of the daemon, bytes."""
    stats: dict[str, Any] = field(default_factory=dict)

    def p99(self, name: str) -> float:
        values = sorted(self.waited[name])
        return values[min(len(values) - 1, int(len(values) * 0.99))] if values else float("inf")


class _Sender(threading.Thread):
    """RATE packets a second to a socket of our own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver.bind(("127.0.0.1", 0))
        self.port = self.receiver.getsockname()[1]
        self.sent = 0
        self.ended = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(("127.0.0.1", self.port))
            while not self.ended.wait(0.01):
                due = int((time.monotonic() - began) * RATE) - self.sent
                for _ in range(due):
                    sender.send(b"x" * 100)
                self.sent += due


def measure(path: str, pid: int, seconds: float, uid: int, preparing: float = PREPARING) -> Found:
    """Attack the daemon at `path` for `seconds` s as `uid`, then end its process `pid`."""
    found, sender = Found(), _Sender()
    with DaemonClient(path, timeout=60) as watching:
        before = watching.stats()["account"]
        watching.start(f"udp dst port {sender.port} and outbound")
        sender.start()
        reader = threading.Thread(target=_read, args=(watching, sender, found), daemon=True)
        reader.start()
        with attackers(path, uid):
            time.sleep(preparing)
            until = time.monotonic() + seconds
            askers = [
                threading.Thread(target=_ask, args=(path, what, found, until, sender.port))
                for what in found.waited
            ]
            for one in askers:
                one.start()
            for one in askers:
                one.join()
            sender.ended.set()
            sender.join()
            reader.join(120)
            with DaemonClient(path, timeout=120) as client:
                found.stats = client.stats()
            account = found.stats["account"]
            for place, value in account["lost"].items():
                found.lost[place] = value - before["lost"].get(place, 0)
            found.memory = _peak(pid)
            found.term = _end(pid)
    return found


def _read(client: DaemonClient, sender: _Sender, found: Found) -> None:
    try:
        while not sender.ended.is_set():
            found.received += _records_in(client.read(0.1))
        sender.join()
        end = client.unsubscribe()
        found.received += _records_in(client.read(0))
        found.sent, found.dropped = sender.sent, end["dropped"]
    except Error as error:
        found.failed.append(f"watching: {error}")


def _records_in(events: Iterable[Event]) -> int:
    return sum(len(one.batch.records) for one in events if isinstance(one, StreamBatch))


def _ask(path: str, what: str, found: Found, until: float, port: int) -> None:
    asked: dict[str, Callable[[DaemonClient], object]] = {
        "hello": lambda client: None,
        "who": lambda client: client.who(port=port),
        "subscribe": lambda client: client.start("udp port 9"),
    }
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            with DaemonClient(path, timeout=60) as client:
                if what != "hello":
                    began = time.monotonic()
                asked[what](client)
        except Error as error:
            found.failed.append(f"{what}: {error}")
        found.waited[what].append(time.monotonic() - began)
        time.sleep(0.05)


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().split("\n"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _end(pid: int) -> float:
    """Seconds that the process takes to end after SIGTERM; 60 at most."""
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    while time.monotonic() - began < 60 and _lives(pid):
        time.sleep(0.01)
    return time.monotonic() - began


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main() -> int:
    if sys.argv[1:2] == ["--hostile"]:
        hostile(sys.argv[2], int(sys.argv[3]))
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    command = sys.argv[2:] or [sys.executable, "-I", "-m", "daemon"]
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = f"{directory}/daemon.sock"
        log = open(f"{directory}/log", "w+")
        command = [*command, "--engine", "packet", "--foreground", "--socket", path]
        daemon = subprocess.Popen(command, stderr=log, stdout=log, cwd="/", start_new_session=True)
        try:
            until = time.monotonic() + 30
            while "serving" not in Path(log.name).read_text():
                if daemon.poll() is not None or time.monotonic() > until:
                    print(Path(log.name).read_text())
                    return 1
                time.sleep(0.05)
            found = measure(path, daemon.pid, seconds, 60000 + os.getpid() % 5000)
        finally:
            daemon.kill()
            daemon.wait()
        for name, values in found.waited.items():
            most = max(values, default=0.0)
            print(
                f"{name:10} {len(values):4} times, p99 {found.p99(name) * 1000:8.1f} ms,"
                f" most {most * 1000:8.1f} ms"
            )
        print(f"records    {found.sent} sent, {found.received} received, {found.dropped} dropped")
        print(f"lost       {json.dumps(found.lost)}")
        print(f"memory     {found.memory >> 20} MiB at most")
        print(f"SIGTERM    obeyed after {found.term:.1f} s")
        print(f"clients    {json.dumps(found.stats.get('clients'))}")
        for line in sorted(set(found.failed)):
            print(f"failed     {found.failed.count(line)} times: {line}")
        print(Path(log.name).read_text()[-1500:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
