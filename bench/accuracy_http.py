# SPDX-License-Identifier: MIT
"""Engine packet (or $ENGINE) beside a busy HTTP server: python3 -m http.server, and curl.

    PYTHONPATH=python:bench python -m accuracy_http [--requests N] [--seconds S] [--json OUT]

The server keeps its pid; each curl says its own local port, so every packet's true owner is
known. Root only. Everything passes over loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from nlproto.engines.engine import open_engine
from nlproto.host import netns, procfs
from nlproto.pipeline.account import Account
from nlproto.pipeline.naming import Namer
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.tables.processes import Processes

REQUESTS, SECONDS = 8000, 60.0
PAGE = 4000  # bytes
HOST = "127.0.0.1"
_GUESS = int(wire.lib.SNIFFER_F_AMBIGUOUS)


@dataclass(slots=True)
class Side:
    """What was said of the packets of one side. `wrong_told` are wrong, but flagged AMBIGUOUS."""

    packets: int = 0
    right: int = 0
    wrong: int = 0
    wrong_told: int = 0
    size: int = 0
    right_bytes: int = 0
    wrong_bytes: int = 0
    wrong_told_bytes: int = 0
    guessed: int = 0
    how: Counter[str] = field(default_factory=Counter)

    def count(self, record: np.void, owner: int) -> None:
        size, tgid = int(record["len"]), int(record["tgid"])
        told = bool(int(record["flags"]) & _GUESS)
        self.packets += 1
        self.size += size
        self.how[wire.how_name(int(record["how"]))] += 1
        self.guessed += told and tgid != 0
        if tgid == owner:
            self.right += 1
            self.right_bytes += size
        elif tgid:
            self.wrong += not told
            self.wrong_bytes += 0 if told else size
            self.wrong_told += told
            self.wrong_told_bytes += size if told else 0


@dataclass(slots=True)
class Result:
    """One run."""

    requests: int
    seconds: float
    lost: int
    server: Side
    clients: Side

    @property
    def named_bytes(self) -> float:
        """Share of the bytes that were named, rightly or not."""
        sides = (self.server, self.clients)
        named = sum(s.right_bytes + s.wrong_bytes + s.wrong_told_bytes for s in sides)
        return named / max(1, sum(s.size for s in sides))

    def plain(self) -> dict[str, object]:
        """For JSON; asdict() cannot copy a Counter before Python 3.12."""
        sides = {"server": self.server, "clients": self.clients}
        plain = {
            name: {one.name: getattr(side, one.name) for one in fields(side)}
            for name, side in sides.items()
        }
        return {one.name: getattr(self, one.name) for one in fields(self)} | plain


@contextlib.contextmanager
def recording(port: int, output: Path) -> Iterator[None]:
    """The hunter's pipeline in a process of its own; the records of `port` go to `output`."""
    ready, tell = os.pipe()
    stop, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(told)
            _record(port, output, tell, stop)
        finally:
            os._exit(0)
    os.close(tell)
    os.close(stop)
    try:
        assert os.read(ready, 1), "the engine did not start"
        yield
    finally:
        os.close(told)
        os.close(ready)
        os.waitpid(pid, 0)


def _record(port: int, output: Path, tell: int, stop: int) -> None:
    parts: list[np.ndarray] = []
    account, here = Account(), netns.own()

    def take(batch: NamedBatch) -> None:
        records = batch.records
        ours = records["netns"] == here  # the same port of another namespace is another's
        ours &= (records["sport"] == port) | (records["dport"] == port)
        parts.append(records[ours])

    name = os.environ.get("ENGINE") or "packet"
    engine = open_engine(name, lambda note: print(f"  {note}", file=sys.stderr))
    pipeline = Pipeline(engine, account=account, processes=Processes(procfs.details), namer=Namer())
    pipeline.subscribe(take)
    with pipeline:
        os.write(tell, b"1")
        os.read(stop, 1)
    lost = account.lost
    np.savez(output, records=np.concatenate(parts), lost=sum(lost.values()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(port: int, directory: Path) -> Iterator[int]:
    """`python3 -m http.server`; its pid."""
    (directory / "page").write_bytes(b"x" * PAGE)
    command = [sys.executable, "-m", "http.server", str(port), "--bind", HOST, "-d", str(directory)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
                break
            time.sleep(0.02)
        yield server.pid
    finally:
        server.kill()
        server.wait()


def ask(port: int, requests: int, seconds: float) -> list[tuple[int, int, int]]:
    """Play the requests one after another: (CLOCK_MONOTONIC ns, local port, pid) of each curl."""
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{local_port}", f"http://{HOST}:{port}/page"]
    claims: list[tuple[int, int, int]] = []
    until = time.monotonic() + seconds
    while len(claims) < requests and time.monotonic() < until:
        began = time.monotonic_ns()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
            said = curl.communicate()[0]
        if re.fullmatch(r"\d+", said) and int(said):
            claims.append((began, int(said), curl.pid))
    return claims


def measure(requests: int = REQUESTS, seconds: float = SECONDS) -> Result:
    """One run on this machine."""
    with tempfile.TemporaryDirectory(prefix="accuracy.") as name:
        directory, port = Path(name), free_port()
        with serving(port, directory) as server:
            with recording(port, directory / "records.npz"):
                began = time.monotonic()
                claims = ask(port, requests, seconds)
                took = time.monotonic() - began
                time.sleep(0.5)  # what still travels
        saved = np.load(directory / "records.npz")
        return judge(saved["records"], int(saved["lost"]), port, server, claims, took)


def judge(
    records: np.ndarray, lost: int, port: int, server: int,
    claims: list[tuple[int, int, int]], took: float,
) -> Result:  # fmt: skip
    """Hold each record against the server's pid and the curls' own words."""
    by_port: dict[int, list[tuple[int, int]]] = {}
    for began, local, pid in claims:
        by_port.setdefault(local, []).append((began, pid))
    result = Result(len(claims), round(took, 1), lost, Side(), Side())
    for record in records:
        local = int(record["dport" if record["dir"] == wire.lib.SNIFFER_DIR_IN else "sport"])
        if local == port:
            result.server.count(record, server)
            continue
        before = [pid for began, pid in by_port.get(local, ()) if began <= record["time_ns"]]
        if before:
            result.clients.count(record, before[-1])
    return result


def table(result: Result) -> str:
    """For people."""
    lines = [
        "| packets of | packets | right | wrong | wrong, flagged | unnamed | bytes right | wrong"
        " | wrong, flagged | unnamed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, side in (("the server", result.server), ("curl", result.clients)):
        shares = []
        for whole, parts in (
            (side.packets, (side.right, side.wrong, side.wrong_told)),
            (side.size, (side.right_bytes, side.wrong_bytes, side.wrong_told_bytes)),
        ):
            shares += [
                f"{100 * part / max(1, whole):.1f} %" for part in (*parts, whole - sum(parts))
            ]
        lines.append(f"| {name} | {side.packets} | {' | '.join(shares)} |")
    lines.append("")
    lines.append(
        f"{result.requests} requests in {result.seconds:.0f} s,"
        f" {100 * result.named_bytes:.1f} % of the bytes named, {result.lost} packets lost."
    )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="accuracy_http", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("accuracy_http needs root: it captures", file=sys.stderr)
        return 1
    result = measure(arguments.requests, arguments.seconds)
    print(table(result))
    for name, side in (("server", result.server), ("curl", result.clients)):
        print(f"{name}: {dict(side.how)}, {side.guessed} guessed", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.plain(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
