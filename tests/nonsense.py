# SPDX-License-Identifier: MIT
"""make nonsense: 10 million bytes of nonsense for a real daemon, which neither dies nor grows.

nonsense.py [BYTES [SEED]]        root (engine packet); the seed is printed
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nlproto.client.client import DaemonClient
from nlproto.client.frames import HEAD, Kind, encode_json
from nlproto.errors import Error

OPS = ("hello", "who", "lookup", "stats", "subscribe", "unsubscribe", "history", "owner", "reboot")
NAMES = ("port", "proto", "host", "pid", "pname", "since", "at", "limit", "keys", "filter", "uid")
WORDS = ("", "tcp", "x" * 300, "\x1b[31m")
VALUES: tuple[object, ...] = (0, -1, 53, 2**64, 1.5, True, None, *WORDS, [], [{}], {"a": {}})
FILTERS = ("tcp", "port", "(((", "not not udp", "host 1.2.3", "pid 1 or " * 400, "pname \x00")
GROWTH = 16 << 20  # bytes: what tables and allocator may take that were not warm before


def nonsense(generator: random.Random) -> bytes:
    """What one connection sends: noise, frames of noise, requests, changed requests."""
    kind = generator.randrange(5)
    if kind == 0:
        return generator.randbytes(generator.randrange(1, 20_000))
    if kind == 1:
        body = generator.randbytes(generator.randrange(60_000))
        return HEAD.pack(len(body) + 4, generator.choice([1, 1, 1, 9]), b"\0\0\0") + body
    if kind == 2:
        return (
            HEAD.pack(60_004, 1, b"\0\0\0") + generator.choice([b"[", b'{"id":', b"\xff"]) * 60_000
        )
    data = b"".join(_request(generator) for _ in range(generator.randrange(1, 200)))
    if kind == 3:
        return data
    changed = bytearray(data)
    for _ in range(generator.randrange(1, 20)):
        changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


def _request(generator: random.Random) -> bytes:
    fields = {
        name: generator.choice(VALUES) for name in generator.sample(NAMES, generator.randrange(4))
    }
    if generator.random() < 0.3:
        fields["filter"] = generator.choice(FILTERS)
    return encode_json(Kind.CONTROL, {"id": 1, "op": generator.choice(OPS), **fields})


def fuzz(path: str, count: int, generator: random.Random) -> None:
    """Send `count` bytes of nonsense to the daemon at `path`, some answers read, some not."""
    sent = 0
    while sent < count:
        data = nonsense(generator)
        sent += len(data)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.settimeout(2)
            try:
                raw.connect(path)
                raw.sendall(data)
                if generator.random() < 0.5:
                    raw.recv(1 << 16)
            except OSError:
                pass  # it hung up, or waits for us to read: both are its right


def resident(pid: int) -> int:
    """Bytes of memory that process `pid` has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check(path: str, pid: int, count: int, seed: int, say: Callable[[str], None] = print) -> None:
    """Fuzz the daemon `pid`; a tenth first, so that what is made once is there."""
    generator = random.Random(seed)
    fuzz(path, count // 10, generator)
    before = _answering(path, pid)
    fuzz(path, count, generator)
    after = _answering(path, pid)
    say(f"{count:,} bytes (seed {seed}): {before >> 10:,} KiB before, {after >> 10:,} KiB after")
    assert after - before < GROWTH, f"grew by {after - before:,} bytes"


def _answering(path: str, pid: int) -> int:
    """Resident bytes once all other clients are gone. Fails when it does not answer."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with DaemonClient(path) as client:
                if client.stats()["clients"]["connected"] == 1:
                    return resident(pid)
        except Error:
            pass
        time.sleep(0.1)
    raise AssertionError("the daemon does not answer any more, or keeps clients that are gone")


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**32
    with tempfile.TemporaryDirectory() as directory:
        path, log = f"{directory}/daemon.sock", Path(directory, "log")
        command = [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--foreground"]
        with log.open("wb") as output:
            daemon = subprocess.Popen([*command, "--socket", path], stderr=output, cwd="/")
        try:
            deadline = time.monotonic() + 60
            while "serving" not in log.read_text():
                if daemon.poll() is not None or time.monotonic() > deadline:
                    print(f"fuzz: the daemon did not start: {log.read_text()}", file=sys.stderr)
                    return 1
                time.sleep(0.05)
            check(path, daemon.pid, count, seed)
            daemon.terminate()
            code = daemon.wait(30)
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        text = log.read_text(errors="replace")
        if code or "Traceback" in text:
            print(text, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
