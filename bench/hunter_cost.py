# SPDX-License-Identifier: MIT
"""top with 10,000 flows, and annotate on a large capture: python bench/hunter_cost.py"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from daemon.history.recorder import Recorder
from daemon.serve.answers import Answers
from daemon.serve.server import Server
from daemon.system.config import Config
from daemon.system.socketfile import SocketFile
from hunter.show.names import HostNames
from hunter.top.app import Top
from hunter.top.state import State
from hunter.top.views import FlowsView
from nlproto.engines.engine import Engine
from nlproto.pipeline.account import Account
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import summarize
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from results import put, table

FLOWS = 10_000
SECONDS = 20
PACKET = 1400  # bytes, of the capture's packets


def records(flows: int, processes: int) -> np.ndarray:
    """One packet of each of so many TCP flows."""
    number = np.arange(flows)
    found = np.zeros(flows, wire.RECORD)
    found["cookie"], found["start_ns"] = number + 1, 7
    found["tgid"] = 10_000_000 + number % processes
    found["comm"] = np.array([f"program{n}".encode() for n in range(100)])[number % processes % 100]
    found["family"], found["proto"], found["dir"] = 2, 6, wire.lib.SNIFFER_DIR_OUT
    found["how"], found["len"], found["gso_segs"] = wire.lib.SNIFFER_HOW_SOCKET, 1000, 1
    found["sport"], found["dport"] = 1024 + number % 60_000, 443
    found["saddr"][:, :4] = [10, 0, 0, 1]
    found["daddr"][:, :2] = [10, 1]
    found["daddr"][:, 2], found["daddr"][:, 3] = number // 250 % 250, number % 250
    return found


class Stream:
    """A source in which each of the flows has a packet a second."""

    description = "synthetic"

    def __init__(self, processes: int) -> None:
        everything = records(FLOWS, processes)
        head = np.zeros(1, wire.BATCH)[0]
        self._batches = [
            NamedBatch(head, everything[at : at + FLOWS // 10], Clock(0, 0))
            for at in range(0, FLOWS, FLOWS // 10)
        ]
        self._next = 0

    def read(self, timeout: float) -> list[NamedBatch]:
        time.sleep(timeout)
        self._next += 1
        return [self._batches[self._next % 10]]

    def get(self, tgid: int, start_ns: int) -> None:
        return None

    def account(self) -> None:
        return None

    def lost(self) -> int:
        return 0


def watch_top(processes: int, view: str) -> float:
    """Share of one processor, in %, of top in a terminal of 160 x 50, once it has settled."""
    reading, writing = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        app = Top(State(Stream(processes), HostNames()))  # type: ignore[arg-type]

        def measure() -> None:
            time.sleep(5)
            if view == "flows":
                flows = FlowsView(app.state, next(iter(app.state.rates)))
                app.call_from_thread(app.push_screen, flows)
                time.sleep(2)
            before, began = cpu_seconds(), time.monotonic()
            time.sleep(SECONDS)
            share = 100 * (cpu_seconds() - before) / (time.monotonic() - began)
            os.write(writing, json.dumps(share).encode())
            app.call_from_thread(app.exit)

        os.environ["TERM"] = "xterm-256color"
        threading.Thread(target=measure, daemon=True).start()
        app.run()
        os._exit(0)
    os.close(writing)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:  # how Linux says that the other side has gone
        pass
    os.waitpid(pid, 0)
    return float(json.loads(os.read(reading, 100)))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_capture(path: Path, size: int, flows: int, now: int) -> int:
    """A pcap file of about `size` bytes, all of the Unix time `now`; returns its packets."""
    everything = records(flows, 200)
    piece = bytearray()
    for record in everything:
        ip = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, PACKET - 14, 0, 0, 64, 6, 0,
            record["saddr"].tobytes()[:4], record["daddr"].tobytes()[:4],
        )  # fmt: skip
        tcp = struct.pack("!HHIIBBHHH", record["sport"], record["dport"], 0, 0, 0x50, 0x10, 0, 0, 0)
        frame = (bytes(12) + b"\x08\x00" + ip + tcp).ljust(PACKET, b"x")
        piece += struct.pack("=IIII", now, 0, PACKET, PACKET) + frame
    copies = max(1, size // len(piece))
    with path.open("wb") as file:
        file.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for _ in range(copies):
            file.write(piece)
    return copies * flows


class Nothing:
    """An engine without packets."""

    name = "synthetic"
    instance = 1

    def __init__(self) -> None:
        self.opening = self.closing = np.zeros(0, wire.TAIL)

    def stats(self) -> dict[str, object]:
        return {}


async def annotate(size: int, flows: int) -> list[str]:
    """Row: what `hunter annotate` takes for a capture of so many bytes."""
    loop = asyncio.get_running_loop()
    config, processes = Config(), Processes()
    with tempfile.TemporaryDirectory() as directory:
        capture, output = Path(directory) / "in.pcap", Path(directory) / "out.pcapng"
        now = int(time.time())
        packets = write_capture(capture, size, flows, now)
        path = f"{directory}/s"
        pipeline = Pipeline(
            cast(Engine, Nothing()),
            account=Account(),
            processes=processes,
            portmap=PortMap(),
        )
        with SocketFile(path) as file, Recorder(config, processes) as recorder:
            known = records(flows, 200)
            known["time_ns"] = now * 10**9 + np.arange(flows)
            recorder.history.update(summarize(known), Clock(0, 0))
            server = Server(loop, Answers(pipeline, recorder.history), config, dict)
            server.start(file.socket)
            began = time.perf_counter()
            words = ["annotate", "--socket", path, str(capture), "-o", str(output)]
            program = subprocess.Popen(
                [sys.executable, "-m", "hunter", *words],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            peak = 0
            while program.poll() is None:
                peak = max(peak, peak_kib(program.pid))
                await asyncio.sleep(0.1)
            took = time.perf_counter() - began
            assert program.stderr is not None
            said = program.stderr.read()
            await server.stop()
        if program.returncode:
            raise SystemExit(said)
        share = re.search(r"\(([\d.]+ %)\)", said)
        return [
            f"{capture.stat().st_size / 1e9:.2f} GB, {packets:,} packets, {flows:,} flows",
            f"{took:.0f} s", f"{peak / 1024:.0f} MiB", share[1] if share else said.strip(),
        ]  # fmt: skip


def peak_kib(pid: int) -> int:
    """Most resident memory so far, KiB; 0 when the process has just ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", metavar="top|annotate", default=["top", "annotate"])
    wanted: Any = parser.parse_args().what
    if "top" in wanted:
        rows = [
            ["200 processes", f"{watch_top(200, 'processes'):.1f} %"],
            ["1 process, its flows", f"{watch_top(1, 'flows'):.1f} %"],
        ]
        title = f"{FLOWS:,} flows, a packet each a second; view"
        put(
            "top",
            "make bench-hunter",
            table([title, "of one processor"], rows)
            + f"\n\nIn a pseudo terminal of 160 x 50, for {SECONDS} s, reading thread included.",
        )
    if "annotate" in wanted:
        rows = [asyncio.run(annotate(size, 5_000)) for size in (250_000_000, 1_000_000_000)]
        put(
            "annotate",
            "make bench-hunter",
            table(["capture", "time", "peak memory (VmHWM)", "named"], rows),
        )


if __name__ == "__main__":
    main()
