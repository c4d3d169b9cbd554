# SPDX-License-Identifier: MIT
"""The daemon's first look at 50,000 sockets of 2,000 processes: python bench/start_cost.py (root)

Beside psutil.net_connections() and `lsof -i`, which answer the same question, in turn, three
rounds. What counts is the look that a daemon makes at its start: who has which socket, in the
port map, processes named.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil

from daemon.system.watcher import Watcher
from nlproto.host.holders import Holders
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from results import put, table


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2000)
    parser.add_argument("--sockets", type=int, default=25, help="of each process")
    parser.add_argument("--rounds", type=int, default=3)
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
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    ours = best["packet-hunterd's first look"]
    rows = [[name, f"{took:.2f}", f"{took / ours:.1f}"] for name, took in best.items()]
    words = f"{wanted:,} sockets of {options.processes:,} processes; best of {options.rounds}."
    shown = table(["who has which socket", "s", "times ours"], rows)
    put("Start", "make bench-start", f"{words}\n\n{shown}")


if __name__ == "__main__":
    main()
