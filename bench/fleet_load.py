# SPDX-License-Identifier: MIT
"""Many hosts at one server: python bench/fleet_load.py [--hosts 2000] [--seconds 60]

One process plays all hosts. Each has a TLS connection and a key of its own. Each sends 80 flows
every 10 s, in the batches of the real exporter. Server and collector are real. At the end each
acknowledged row must be in the collector's files once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from nats.aio.client import Client

import results
from fleet import bus, keys, wire
from fleet.export.deltas import Deltas, rows_of
from fleet.export.exporter import Exporter, boot_id
from fleet.export.source import FlowSource
from fleet.export.spool import Spool
from fleet.options import FleetServer as At
from fleeting import Program, Server, certificate, secured
from nlproto.errors import Error
from nlproto.records.clock import Clock
from nlproto.tables.flows import FLOW

_EACH, _INTERVAL = 80, 10.0
_AGENT, _TURNS = 10_000, 12
_CONNECTING = 20  # hosts at once
_TICKS = os.sysconf("SC_CLK_TCK")


def flows(count: int, seed: int) -> np.ndarray:
    """FLOWs as a busy host has them: few processes, many far ends."""
    luck = np.random.default_rng(seed)
    made = np.zeros(count, FLOW)
    made["cookie"] = luck.integers(1, 1 << 40, count)
    made["tgid"] = luck.integers(300, 340, count)
    made["start_ns"] = made["tgid"].astype(np.uint64) * np.uint64(10**9)
    made["laddr"][:, 0] = 0x0100000A
    made["raddr"][:, 0] = luck.integers(1, 1 << 32, count)
    made["lport"] = luck.integers(32768, 60999, count)
    made["rport"] = luck.choice([53, 80, 443, 5432, 6379], count)
    made["proto"], made["family"], made["netns"], made["how"] = 6, 2, 4026531840, 1
    made["uid"], made["comm"] = 1000, b"worker"
    made["opened"] = luck.choice([0, 1, 2], count)
    for name in ("packets_in", "packets_out"):
        made[name] = luck.integers(1, 1000, count)
    for name in ("bytes_in", "bytes_out"):
        made[name] = luck.integers(60, 10**6, count)
    made["last_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    made["first_ns"] = made["last_ns"] - luck.integers(1, 10**10, count).astype(np.uint64)
    return made


def parts_cost() -> list[float]:
    """CPU in us: to add one of the daemon's sums, to merge a flow, to encode it; its bytes.

    The least of several turns, because other programs take the processor's cache.
    """
    some, found = flows(2000, 1), []
    for turn in range(30):
        deltas = Deltas()
        begun = time.process_time()
        deltas.add(some, Clock.now())
        added = time.process_time()
        taken = deltas.take()
        merged = time.process_time()
        wire.encode_flows(boot_id(), turn, rows_of(taken), {})
        ended = time.process_time()
        found.append((added - begun, merged - added, ended - merged))
    least = min(found, key=sum)
    size = len(wire.encode_flows(boot_id(), 1, rows_of(some[:_EACH]), {}))
    return [*(seconds * 1e6 / len(some) for seconds in least), size / _EACH]


class Unread(FlowSource):
    """No daemon: the bench gives the flows."""

    def __init__(self) -> None:
        super().__init__("/nowhere")

    def __exit__(self, *_: object) -> None:
        pass


def agent_cost(server: At, name: str, directory: Path) -> list[float]:
    """CPU in us a flow of a whole exporter, with spool, TLS and acknowledgements.

    For each of several turns of a second with _AGENT flows. It reads no daemon.
    """

    async def play() -> list[float]:
        source, spool = Unread(), Spool(directory, 64 << 20)
        exporter = Exporter(source, spool, server, name, 1.0)
        running = asyncio.create_task(exporter.run())
        found = []
        for turn in range(_TURNS):
            some = flows(_AGENT, turn)
            begun = time.process_time()
            with source.lock:
                source.deltas.add(some, Clock.now())
            while len(source.deltas) or spool.totals().spooled:
                await asyncio.sleep(0.1)
            found.append((time.process_time() - begun) * 1e6 / _AGENT)
        exporter.stop()
        await running
        assert spool.totals().acknowledged == _TURNS * _AGENT
        return found

    return asyncio.run(play())


def cpu(pid: int) -> float:
    """Seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Fleet:
    """All hosts in this process."""

    def __init__(self, server: At, directory: Path, names: list[str]) -> None:
        self.server, self.directory, self.names = server, directory, names
        self.sent = self.acknowledged = self.failed = 0
        self.waits: list[float] = []
        self.refused: list[str] = []
        self.boot = boot_id()

    async def told(self, error: Exception) -> None:
        self.refused.append(str(error))

    async def connect(self, name: str, gate: asyncio.Semaphore) -> Client:
        """As the exporter: again and again, not all at once."""
        at = At(self.server.urls, str(self.directory / f"{name}.nk"), self.server.ca)
        failures = 0
        while True:
            try:
                async with gate:
                    return await bus.connect(at, name, self.told)
            except Error:
                failures += 1
                await asyncio.sleep(bus.backoff(failures))

    async def play(self, name: str, client: Client, end: float) -> None:
        jetstream = client.jetstream(timeout=20.0)
        sequence = time.time_ns() // 10**6 << 20
        await asyncio.sleep(random.uniform(0, _INTERVAL))
        while time.monotonic() < end:
            due = time.monotonic() + _INTERVAL
            sequence += 1
            rows = rows_of(flows(_EACH, sequence & 0xFFFFFFFF))
            rows["first_ns"] = rows["last_ns"] = time.time_ns()
            payload = wire.encode_flows(self.boot, sequence, rows, {})
            begun = time.monotonic()
            self.sent += _EACH
            try:
                await jetstream.publish(
                    f"flows.{name}", payload, headers={"Nats-Msg-Id": f"{name}-{sequence}"}
                )
                self.acknowledged += _EACH
                self.waits.append(time.monotonic() - begun)
            except bus.FAILURES:
                self.failed += _EACH
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await client.close()


async def run(fleet: Fleet, server: Server, collector: Program, seconds: float) -> dict[str, float]:
    gate = asyncio.Semaphore(_CONNECTING)
    begun = time.monotonic()
    clients = await asyncio.gather(*(fleet.connect(name, gate) for name in fleet.names))
    found = {"connected in s": time.monotonic() - begun}
    end = time.monotonic() + _INTERVAL + seconds
    forged = clients[0].jetstream(timeout=2.0)
    try:
        await forged.publish(f"flows.{fleet.names[1]}", b"forged")
        raise SystemExit("a forged subject was taken")
    except bus.FAILURES:
        pass
    playing = asyncio.gather(
        *(fleet.play(*one, end) for one in zip(fleet.names, clients, strict=True))
    )

    def figures() -> list[float]:
        pids = server.process.pid, collector.process.pid
        return [time.monotonic(), fleet.acknowledged, *map(cpu, pids), time.process_time()]

    await asyncio.sleep(_INTERVAL)  # now all of them send
    early = figures()
    await asyncio.sleep(max(1.0, end - time.monotonic()))
    lasted, count, *shares = (late - one for one, late in zip(early, figures(), strict=True))
    await playing
    names = ("server %", "collector %", "all hosts %")
    found |= {name: 100 * share / lasted for name, share in zip(names, shares, strict=True)}
    found["flows/s"] = count / lasted
    return found


def stored(store: Path) -> tuple[int, int]:
    """(rows, different batches) in the collector's files."""
    files = sorted(map(str, (store / "flows").glob("hour=*/part-*.parquet")))
    if not files:
        return 0, 0
    table = ds.dataset(files).to_table(columns=["host", "sequence"])
    table = table.unify_dictionaries()
    return table.num_rows, table.group_by(["host", "sequence"]).aggregate([]).num_rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    names = [f"h{number:05}" for number in range(options.hosts)]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        users = [keys.user(keys.make(str(directory / f"{name}.nk")), name) for name in names]
        users.append(keys.user(keys.make(str(directory / "collector.nk")), None))
        made, private = certificate(directory)
        with Server(directory / "nats", config=secured(made, private, users)) as server:
            url = server.url.replace("nats:", "tls:")
            store = directory / "store"
            words = [str(store), "--server", url, "--ca", str(made)]
            words += ["--nkey", str(directory / "collector.nk")]
            with Program.of(directory / "collector.log", "collect", *words) as collector:
                collector.wait_for("connected")
                fleet = Fleet(At((url,), None, str(made)), directory, names)
                found = asyncio.run(run(fleet, server, collector, options.seconds))
                memory = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
                until = time.monotonic() + 60
                while stored(store)[0] < fleet.acknowledged and time.monotonic() < until:
                    time.sleep(0.5)
                collector.stop()
                rows, batches = stored(store)
            key = str(directory / f"{names[0]}.nk")
            whole = agent_cost(At((url,), key, str(made)), names[0], directory)
        assert any("permissions violation" in one.lower() for one in fleet.refused), fleet.refused
        assert rows == batches * _EACH, "a batch is there twice, or in part"
    adding, merging, encoding, size = parts_cost()
    waits = sorted(fleet.waits)
    lines = [
        ["hosts connected, each with TLS and a key", f"{options.hosts}"],
        ["until all were", f"{found['connected in s']:.1f} s"],
        ["flows/s, acknowledged", f"{found['flows/s']:,.0f}"],
        ["flows sent, acknowledged", f"{fleet.sent:,}, {fleet.acknowledged:,}"],
        ["rows in the collector's files", f"{rows:,}"],
        ["acknowledged after, median and 99 %"]
        + [f"{waits[len(waits) // 2] * 1e3:.1f} ms, {waits[len(waits) * 99 // 100] * 1e3:.0f} ms"],
        ["server, of one CPU", f"{found['server %']:.1f} %"],
        ["server's memory", f"{int(memory) * 4096 >> 20} MiB"],
        ["collector, of one CPU", f"{found['collector %']:.1f} %"],
        ["all hosts' connections and batches, of one CPU", f"{found['all hosts %']:.1f} %"],
        ["a subject of another host", "refused"],
        ["agent: to add up one of the daemon's sums", f"{adding:.2f} us of CPU"],
        ["agent: to merge a flow of ten seconds", f"{merging:.2f} us of CPU"],
        ["agent: to encode it", f"{encoding:.2f} us of CPU"],
        ["agent: all of this, a flow", f"{adding + merging + encoding:.2f} us of CPU"],
        [f"a whole exporter with {_AGENT:,} flows/s, a flow", f"{min(whole):.2f} us of CPU"],
        ["on the wire, a flow", f"{size:.1f} bytes"],
    ]
    results.put("Fleet", "make bench-fleet", results.table(["", ""], lines))


if __name__ == "__main__":
    main()
