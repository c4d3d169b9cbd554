# SPDX-License-Identifier: MIT
"""make soak: mixed traffic and clients that come and go; the daemon's memory stays flat.

soak.py [SECONDS]             root (engine packet); 600 s
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from nlproto.client.client import DaemonClient
from nlproto.errors import Error

GROWTH = 1.10  # the last quarter may need so many times what the second quarter did
# Small tables: they are full early, and what grows afterwards is a leak.
CONFIG = """
history_flows: 5000
max_processes: 500
max_ports: 2000
client_queue_size: 256KiB
queue_size: 4MiB
"""


def traffic(stop: threading.Event) -> None:
    """Short connections, datagrams to and from ports of all kinds, processes that live a moment."""
    generator = random.Random(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        while not stop.is_set():
            with socket.create_connection(server.getsockname()) as one, server.accept()[0] as two:
                one.sendall(b"x" * generator.randrange(1, 5000))
                two.recv(5000)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(50):
                    sender.sendto(b"x", ("127.0.0.1", generator.randrange(1024, 65536)))
            if generator.random() < 0.05:
                subprocess.run(["true"], check=False)
            stop.wait(0.01)


def clients(path: str, stop: threading.Event) -> None:
    """Subscribers that read, that do not read, and questions."""
    generator = random.Random(2)
    while not stop.is_set():
        with contextlib.suppress(Error), DaemonClient(path) as client:
            client.start(generator.choice(["", "tcp", "udp", f"port {generator.randrange(65536)}"]))
            until = time.monotonic() + generator.random() * 3
            reads = generator.random() < 0.7
            while time.monotonic() < until and not stop.is_set():
                if reads:
                    client.read(0.1)
                else:
                    stop.wait(0.1)
                    break
            client.owner(generator.randrange(65536))
            client.who(pid=os.getpid(), limit=100)
            if generator.random() < 0.5:
                client.unsubscribe()


def resident(pid: int) -> int:
    """Bytes of memory that process `pid` has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(path: str, pid: int, seconds: float) -> list[int]:
    """Resident bytes, 40 times in `seconds`, while everything runs."""
    stop = threading.Event()
    threads = [threading.Thread(target=traffic, args=(stop,))]
    threads += [threading.Thread(target=clients, args=(path, stop)) for _ in range(4)]
    for thread in threads:
        thread.start()
    samples = []
    try:
        for _ in range(40):
            time.sleep(seconds / 40)
            samples.append(resident(pid))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return samples


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    with tempfile.TemporaryDirectory() as directory:
        path, log = f"{directory}/daemon.sock", Path(directory, "log")
        Path(directory, "daemon.yaml").write_text(CONFIG)
        command = [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--foreground"]
        command += ["--socket", path, "--config", f"{directory}/daemon.yaml"]
        with log.open("wb") as output:
            daemon = subprocess.Popen(command, stderr=output, cwd="/")
        try:
            deadline = time.monotonic() + 60
            while "serving" not in log.read_text():
                if daemon.poll() is not None or time.monotonic() > deadline:
                    print(f"soak: the daemon did not start: {log.read_text()}", file=sys.stderr)
                    return 1
                time.sleep(0.05)
            samples = soak(path, daemon.pid, seconds)
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(60)
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        text = log.read_text(errors="replace")
    second, last = max(samples[10:20]), max(samples[30:])
    print(
        f"{seconds:.0f} s: {second >> 10:,} KiB in the second quarter, {last >> 10:,} in the last"
    )
    if code or "Traceback" in text or "does not close" in text:
        print(text, file=sys.stderr)
        return 1
    if last > second * GROWTH:
        print("soak: the daemon grows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
