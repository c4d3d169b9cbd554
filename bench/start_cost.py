# SPDX-License-Identifier: MIT
"""50,000 sockets of 2,000 processes: the first look at them, and what they cost while idle (root).

Measures the look that a daemon makes at its start, with processes named.
psutil.net_connections() and `lsof -i` answer the same question beside it, in turn, three
rounds. Then daemons of each engine are started, and asked until they know all sockets. Last,
daemons with these sockets and without are left alone for a minute: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil

from daemon.system.watcher import Watcher
from nlproto.client.client import DaemonClient
from nlproto.host.holders import Holders
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from results import put, table

ENGINES = ("packet", "ebpf")
SETTLED = 30.0  # s after which a daemon has looked at what was there


def hold(processes: int, each: int) -> list[int]:
    """Children that hold `each` UDP sockets and wait to be killed."""
    gc.freeze()
    children = []
    for number in range(processes):
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            kept = []
            for _ in range(each):
                one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                # ports are shared by addresses: 50,000 sockets need more than one
                one.bind((f"127.{1 + number % 200}.0.1", 0))
                kept.append(one)
            os.write(told, b"x")
            os.close(told)
            signal.pause()
            os._exit(0)
        os.close(told)
        assert os.read(ready, 1) == b"x", "a child could not open its sockets"
        os.close(ready)
        children.append(child)
    return children


def first_look() -> int:
    """As a daemon that has just started: how many owners the port map has then."""
    portmap = PortMap()
    pipeline: Any = SimpleNamespace(portmap=portmap, processes=Processes())
    watcher = Watcher("packet", pipeline, lambda *_, **__: None, lambda error: None, Holders())
    with watcher.kernel:
        watcher._look_at_sockets()
    return len(portmap)


def psutil_look() -> int:
    return len(psutil.net_connections("inet"))


def lsof_look() -> int:
    done = subprocess.run(["lsof", "-i", "-n", "-P"], capture_output=True, check=False)
    return done.stdout.count(b"\n")


@contextlib.contextmanager
def daemon(engine: str) -> Iterator[tuple[int, DaemonClient]]:
    """A daemon that serves: (its pid, a client)."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "daemon.sock")
        command = [sys.executable, "-m", "daemon", "--engine", engine, "--socket", path]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                while not os.path.exists(path):
                    assert process.poll() is None, f"engine {engine} does not run here"
                    time.sleep(0.01)
                with DaemonClient(path) as client:
                    yield process.pid, client
            finally:
                process.terminate()


def start(engine: str, wanted: int) -> tuple[float, float]:
    """Seconds from the start of a daemon until it serves, and until an answer has all sockets."""
    began = time.perf_counter()
    with daemon(engine) as (_, client):
        serves = time.perf_counter() - began
        while True:
            found = client.who(listening=True, limit=1)
            if found["complete"] and found["owners_total"] >= wanted:
                return serves, time.perf_counter() - began


def idle(engine: str, seconds: float) -> float:
    """CPU time, in percent of one, of a daemon that is not asked anything."""
    with daemon(engine) as (pid, _):
        time.sleep(SETTLED)
        one = psutil.Process(pid)
        before, began = sum(one.cpu_times()[:2]), time.perf_counter()
        time.sleep(seconds)
        spent = sum(one.cpu_times()[:2]) - before
        return 100 * spent / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2000)
    parser.add_argument("--sockets", type=int, default=25, help="of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="that each daemon is watched")
    options = parser.parse_args()
    wanted = options.processes * options.sockets
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    ways: dict[str, Callable[[], int]] = {
        "packet-hunterd's first look": first_look,
        "psutil.net_connections()": psutil_look,
        "lsof -i -n -P": lsof_look,
    }
    best: dict[str, float] = {}
    children = hold(options.processes, options.sockets)
    try:
        for _ in range(options.rounds):
            for name, look in ways.items():
                began = time.perf_counter()
                found = look()
                took = time.perf_counter() - began
                assert found >= wanted, f"{name} found {found} of {wanted}"
                best[name] = min(best.get(name, took), took)
                print(f"{name}: {took:.2f} s, {found} found", file=sys.stderr, flush=True)
        starts = {
            engine: min(
                (start(engine, wanted) for _ in range(options.rounds)), key=lambda one: one[1]
            )
            for engine in ENGINES
        }
        with_sockets = {engine: idle(engine, options.seconds) for engine in ENGINES}
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    without = {engine: idle(engine, options.seconds) for engine in ENGINES}
    ours = best["packet-hunterd's first look"]
    rows = [[name, f"{took:.2f}", f"{took / ours:.1f}"] for name, took in best.items()]
    words = f"{wanted:,} sockets of {options.processes:,} processes; best of {options.rounds}."
    shown = table(["who has which socket", "s", "times ours"], rows)
    told = [[engine, *(f"{one:.2f}" for one in times)] for engine, times in starts.items()]
    shown += "\n\n" + table(["a daemon's start", "serves, s", "answers have all sockets, s"], told)
    put("Start", "make bench-start", f"{words}\n\n{shown}")
    costs = [
        [engine, f"{with_sockets[engine]:.2f} %", f"{without[engine]:.2f} %"] for engine in without
    ]
    shown = table(["an idle daemon, of one CPU", f"{wanted:,} sockets", "without them"], costs)
    put(
        "Idle",
        "make bench-start",
        f"Over {options.seconds:.0f} s, other traffic included.\n\n{shown}",
    )


if __name__ == "__main__":
    main()
