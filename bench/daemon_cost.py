# SPDX-License-Identifier: MIT
"""What the daemon's own stages take: python bench/daemon_cost.py

ingest   records/s of one core through naming, account, processes, port map and history
streams  records/s when, in addition, N subscribers with different filters are served
who      ms for questions to a million flows, in memory and in the file
owner    port questions/s on one connection, pipelined; p99 with 50 connections
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import psutil

from daemon.history.memory import FlowMemory, Question
from daemon.history.recorder import Recorder
from daemon.history.store import Store
from daemon.serve.answers import Answers
from daemon.serve.server import Server
from daemon.serve.streams import Streams
from daemon.service import SWITCH_INTERVAL
from daemon.system.config import Config
from daemon.system.socketfile import SocketFile
from nlproto.client.client import DaemonClient
from nlproto.client.frames import Kind, encode_json
from nlproto.filters.parse import parse
from nlproto.pipeline.account import Account
from nlproto.pipeline.naming import Namer
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.flows import summarize
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from results import put, table

BATCH = 124
MILLION = 1_000_000
RATE = 100_000


class Synthetic:
    """An engine that gives batches as fast as they are taken, then says when it is empty."""

    name = "synthetic"
    instance = 1
    group = "packets"
    awaited: Callable[[], bool]

    def __init__(self, batches: list[bytes], pause: threading.Semaphore) -> None:
        self.opening = self.closing = np.zeros(0, wire.TAIL)
        self._batches = iter(batches)
        self._pause = pause
        self.done = threading.Event()

    def __enter__(self) -> Synthetic:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, timeout: float) -> Any:
        for _ in range(64):
            if not self._pause.acquire(timeout=min(timeout, 0.1)):
                return
            batch = next(self._batches, None)
            if batch is None:
                self.done.set()
                return
            yield wire.decode_batch(batch)

    def wake(self) -> None:
        pass

    def want_packets(self, wanted: bool) -> None:
        pass

    def want_first_bytes(self, wanted: bool) -> bool:
        return False

    def catch_up(self) -> Any:
        return iter(())

    def begin(self) -> int:
        return 0

    def finish(self, until_ns: int | None = None) -> Any:
        return iter(())

    def stats(self) -> dict[str, object]:
        return {}


def make_batches(count: int, flows: int, processes: int, new: bool = False) -> list[bytes]:
    """Batches of `flows` TCP flows of `processes` processes, both directions, over 4 CPUs.

    `new`: each record is another flow.
    """
    random = np.random.default_rng(1)
    batches, sequences = [], [0] * 4
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    for number in range(count):
        cpu = number % 4
        flow = random.integers(0, flows, BATCH)
        if new:
            flow = number * BATCH + np.arange(BATCH)
        out = random.integers(0, 2, BATCH) == 1
        records = np.zeros(BATCH, wire.RECORD)
        records["time_ns"] = now + number * 1_000_000 + np.arange(BATCH)
        records["cookie"] = flow + 1
        records["tgid"] = 1_000_000 + flow % processes
        records["start_ns"] = 7
        records["uid"] = 1000
        records["how"] = wire.lib.SNIFFER_HOW_SOCKET
        records["family"], records["proto"] = 2, 6
        records["dir"] = np.where(out, wire.lib.SNIFFER_DIR_OUT, wire.lib.SNIFFER_DIR_IN)
        records["len"], records["hdr_len"], records["gso_segs"] = 1200, 52, 1
        records["netns"], records["comm"], records["cpu"] = 4026531840, b"bench", cpu
        port = 1024 + flow % 60000
        records["sport"] = np.where(out, port, 443)
        records["dport"] = np.where(out, 443, port)
        records["saddr"][:, 3] = np.where(out, 1, flow // 60000)
        records["daddr"][:, 3] = np.where(out, flow // 60000, 1)
        head = np.zeros(1, wire.BATCH)[0]
        head["cpu"], head["instance"], head["record_seq"] = cpu, 1, sequences[cpu]
        sequences[cpu] += BATCH
        head["packets"] = sequences[cpu]
        head["mono_ns"] = now + number * 1_000_000 + 1000
        head["real_ns"] = head["mono_ns"] + 10**18
        batches.append(wire.encode_batch(head, records))
    return batches


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ingest(count: int, flows: int, filters: int = 0, new: bool = False) -> dict[str, float]:
    """Records per second of CPU time of all the daemon's threads together."""
    batches = make_batches(count, flows, 200, new)
    semaphore = threading.Semaphore(0)
    engine = Synthetic(batches, semaphore)
    history = FlowMemory(200_000)
    processes = Processes()
    with Namer() as namer:
        pipeline = Pipeline(
            engine, account=Account(), processes=processes, namer=namer, portmap=PortMap()
        )
        assert pipeline.portmap is not None
        taken = 0

        def take(batch: NamedBatch) -> None:
            nonlocal taken
            history.update(cast(np.ndarray, batch.flows), batch.clock)
            taken += len(batch.records)

        pipeline.subscribe(take)
        streams = None
        if filters:
            streams = Streams(pipeline, lambda function: function(), filters, 1 << 30)
            for number in range(filters):
                streams.join(parse(f"tcp port {1024 + number * 7}"), None, _Sink())
            pipeline.subscribe(streams.publish)
            streams.__enter__()
        began, cpu = time.perf_counter(), cpu_seconds()
        with pipeline:
            # always enough waits, so that what the worker takes at once is real; never too much
            for given in range(0, count, 32):
                while given * BATCH - taken > 512 * BATCH:
                    time.sleep(0.001)
                semaphore.release(32)
            semaphore.release(100)
            engine.done.wait()
        if streams is not None:
            streams.stop(600.0)
        took, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    assert pipeline.account.closes() and pipeline.account.delivered == count * BATCH
    return {"records_per_cpu_s": count * BATCH / cpu, "records_per_s": count * BATCH / took}


_RECORD = struct.Struct("=QQQQIIIIIIIIHHHHBBBBBBH16s16s16s")
"""As shared_proto.h lays a record out."""


def plain_sums(records: bytes) -> dict[tuple[Any, ...], list[Any]]:
    """What flows.summarize() adds up, record by record: {key: packets and bytes in and out, ...}"""
    flows: dict[tuple[Any, ...], list[Any]] = {}
    for (
        time_ns, cookie, inode, start_ns, tgid, _, uid, _, netns, _, _, size, _, segments,
        sport, dport, family, proto, way, _, how, head, flags, saddr, daddr, comm,
    ) in _RECORD.iter_unpack(records):  # fmt: skip
        ends = (saddr, sport, daddr, dport) if way == 2 else (daddr, dport, saddr, sport)
        key = (cookie, start_ns, tgid, netns, proto, family, *ends)
        flow = flows.get(key)
        if flow is None:
            flow = flows[key] = [0, 0, 0, 0, 0, time_ns, time_ns, 0, 0, 0, b""]
        at = 2 if way == 2 else 0
        flow[at] += segments
        flow[at + 1] += size + (segments - 1) * head
        flow[4] |= flags
        if time_ns < flow[5]:
            flow[5] = time_ns
        if time_ns > flow[6]:
            flow[6] = time_ns
        flow[7:] = how, uid, inode, comm
    return flows


def sums() -> dict[str, float]:
    """Records/s of summing up what the worker takes at once; and of a loop over iter_unpack()."""
    batches = make_batches(64, 1000, 200)
    raw = b"".join(batch[wire.BATCH.itemsize :] for batch in batches)

    def ours() -> np.ndarray:
        return summarize(np.frombuffer(raw, wire.RECORD), 5)

    flows, plain = ours(), plain_sums(raw)
    for number, name in enumerate(("packets_in", "bytes_in", "packets_out", "bytes_out")):
        assert int(flows[name].sum()) == sum(flow[number] for flow in plain.values())
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(50):  # in turn: both have the same neighbours
        for name, work in (("ours", ours), ("plain", lambda: plain_sums(raw))):
            cpu = time.thread_time()
            work()
            times[name].append(time.thread_time() - cpu)
    return {way: len(batches) * BATCH / float(np.median(taken)) for way, taken in times.items()}


class _Sink:
    def offer(self, seen: int, piece: object) -> None:
        pass

    def lose(self, seen: int, matched: int) -> None:
        pass


def million() -> np.ndarray:
    """A million different flows; one in 200 is DNS, times spread over an hour until now."""
    random = np.random.default_rng(2)
    records = np.zeros(MILLION, wire.RECORD)
    number = np.arange(MILLION)
    records["cookie"] = number + 1
    records["time_ns"] = time.time_ns() - random.integers(0, 3600 * 10**9, MILLION)
    records["tgid"], records["start_ns"] = 1000 + number % 5000, 7
    records["comm"] = np.array([f"program{n}".encode() for n in range(100)])[number % 100]
    records["family"], records["proto"], records["dir"] = 2, 17, wire.lib.SNIFFER_DIR_OUT
    records["sport"] = random.integers(1024, 65536, MILLION)
    records["dport"] = np.where(number % 200 == 0, 53, random.integers(400, 500, MILLION))
    records["daddr"][:, 1:4] = random.integers(0, 256, (MILLION, 3))
    records["how"], records["len"] = 2, 100
    return summarize(records)


QUESTIONS: dict[str, dict[str, Any]] = {
    "port 53, 60 s": {"port": 53, "since_ns": 60},
    "port 53": {"port": 53},
    "port 443": {"port": 443},
    "pid": {"pid": 1234},
    "pname": {"pname": "program7"},
    "pname, 60 s": {"pname": "program7", "since_ns": 60},
}


def who() -> dict[str, dict[str, float]]:
    flows = million()
    history = FlowMemory(MILLION)
    history.update(flows, Clock(0, 0))
    result: dict[str, dict[str, float]] = {"memory_ms": {}, "file_ms": {}}
    with tempfile.TemporaryDirectory() as directory:
        store = Store(f"{directory}/history.db")
        began = time.perf_counter()
        for at in range(0, MILLION, 50_000):
            part = flows[at : at + 50_000]
            store.write(np.arange(at + 1, at + 1 + len(part), dtype=np.uint64), part, [])
        result["file_ms"]["(rows/s written)"] = MILLION / (time.perf_counter() - began)
        for name, conditions in QUESTIONS.items():
            values = dict(conditions)
            if "since_ns" in values:
                # before the newest flow: writing the file took longer than that
                values["since_ns"] = int(flows["last_ns"].max()) - values["since_ns"] * 10**9
            question = Question(**values)
            result["memory_ms"][name] = _best(lambda q=question: history.ask(q))
            result["file_ms"][name] = _best(lambda q=question: store.ask(q, 2**62))
        store.close()
    return result


def _best(work: Any) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)[2] * 1000


def owner() -> dict[str, dict[str, float]]:
    """Port questions: alone, and beside a stream of RATE records/s. The asker is a process."""
    quiet = asyncio.run(_owner(make_batches(1, 100, 10), 0))
    busy = asyncio.run(_owner(make_batches(RATE * 12 // BATCH, 1000, 10), RATE))
    return {"ingest idle": quiet, f"{RATE:,} records/s": busy}


async def _owner(batches: list[bytes], rate: int) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    portmap = PortMap()
    portmap.update(summarize(wire.decode_batch(batches[0]).records))
    ports = [str(owner.port) for owner in portmap.everything()]
    config, processes = Config(), Processes()
    semaphore = threading.Semaphore(0)
    engine = Synthetic(batches, semaphore)
    with Namer() as namer, tempfile.TemporaryDirectory() as directory:
        pipeline = Pipeline(
            engine, account=Account(), processes=processes, namer=namer, portmap=portmap
        )
        path = f"{directory}/s"
        with SocketFile(path) as file, Recorder(config, processes) as recorder, pipeline:
            pipeline.subscribe(
                lambda batch: recorder.history.update(cast(np.ndarray, batch.flows), batch.clock)
            )
            server = Server(loop, Answers(pipeline, recorder.history), config, dict)
            server.start(file.socket)
            asking = subprocess.Popen(
                [sys.executable, __file__, "--ask", path, *ports], stdout=subprocess.PIPE
            )
            began, given, most = time.perf_counter(), 0, 0
            while asking.poll() is None:
                await asyncio.sleep(0.01)
                due = min(int((time.perf_counter() - began) * rate / BATCH), len(batches))
                semaphore.release(due - given) if due > given else None
                given, most = due, max(most, len(pipeline.queue))
            took = time.perf_counter() - began
            await server.stop()
            assert asking.stdout is not None
            result: dict[str, float] = json.loads(asking.stdout.read())
    if rate:
        result["records/s given"] = given * BATCH / took
        result["batches that waited, at most"] = most
    return result


def ask_owner(path: str, ports: list[int]) -> dict[str, float]:
    """The asker's side: one connection, pipelined; then 50, in turn; then 50, all at once."""
    questions = [("owner", {"port": port}) for port in ports]
    with DaemonClient(path) as client:
        began = time.perf_counter()
        rounds = 30_000 // len(questions)
        for _ in range(rounds):
            replies = client.pipeline(questions)
        rate = rounds * len(questions) / (time.perf_counter() - began)
    assert all(
        reply["owners"][0]["port"] == port for reply, port in zip(replies, ports, strict=True)
    )
    clients = [DaemonClient(path) for _ in range(50)]
    times = []
    for number in range(5000):
        began = time.perf_counter()
        clients[number % 50].owner(ports[number % len(ports)])
        times.append(time.perf_counter() - began)
    for client in clients:
        client.close()
    at_once = ask_at_once(path, ports)
    return {
        "pipelined, questions/s": rate,
        "50 clients in turn, ms median": float(np.median(times)) * 1000,
        "50 clients in turn, ms p99": float(np.percentile(times, 99)) * 1000,
        "50 clients at once, ms median": float(np.median(at_once)) * 1000,
        "50 clients at once, ms p99": float(np.percentile(at_once, 99)) * 1000,
    }


def ask_at_once(path: str, ports: list[int]) -> list[float]:
    """Seconds from the moment when all begin to ask to each one's answer, 100 times."""
    sockets = {}
    poll = select.poll()
    for port in ports[:50]:
        one = socket.socket(socket.AF_UNIX)
        one.connect(path)
        poll.register(one, select.POLLIN)
        question = encode_json(Kind.CONTROL, {"id": 1, "op": "owner", "port": port})
        sockets[one.fileno()] = one, question
    times = []
    for _ in range(100):
        time.sleep(0.01)
        began, waiting = time.perf_counter(), len(sockets)
        for one, question in sockets.values():
            one.sendall(question)
        while waiting:
            for fd, _ in poll.poll():
                assert sockets[fd][0].recv(65536)
                times.append(time.perf_counter() - began)
                waiting -= 1
    for one, _ in sockets.values():
        one.close()
    return times


def others() -> dict[str, float]:
    """What the same question costs without us: the whole table, each time."""
    ways: dict[str, Any] = {
        "ss -tnp": lambda: subprocess.run(["ss", "-tnp"], capture_output=True, check=True),
        "psutil.net_connections": lambda: psutil.net_connections("tcp"),
    }
    return {name: _best(way) for name, way in ways.items()}


def questions() -> str:
    """The table of port questions."""
    answers = owner()
    names = list(dict.fromkeys(name for one in answers.values() for name in one))
    return table(
        ["", *answers],
        [[n, *(f"{v[n]:,.2f}" if n in v else "" for v in answers.values())] for n in names],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=8000)
    parser.add_argument("--ask", nargs="+", metavar=("PATH", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--questions",
        action="store_true",
        help="port questions alone, on stdout (on a busy machine: chrt -f 1 python ...)",
    )
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask_owner(options.ask[0], [int(port) for port in options.ask[1:]])))
        return
    sys.setswitchinterval(SWITCH_INTERVAL)
    if options.questions:
        print(questions())
        return
    takes = {
        "1,000 flows": ingest(options.batches, 1000),
        "100,000 flows": ingest(options.batches, 100_000),
        "only new flows": ingest(options.batches, options.batches * BATCH, new=True),
        "1,000 flows, 20 filters": ingest(options.batches, 1000, 20),
        "1,000 flows, 200 filters": ingest(options.batches, 1000, 200),
    }
    parts = [
        table(
            ["stream", "records/s", "records/s of a processor"],
            [
                [name, f"{one['records_per_s']:,.0f}", f"{one['records_per_cpu_s']:,.0f}"]
                for name, one in takes.items()
            ],
        )
    ]
    alone = sums()
    ours, plain = alone.values()
    parts.append(
        f"Summing up alone what the worker takes at once (7,936 records of 1,000 flows), records/s"
        f" of a processor:"
        f" {ours:,.0f}; a loop over struct.iter_unpack() that adds up the same:"
        f" {plain:,.0f}, {ours / plain:.0f} times as long."
    )
    past = who()
    written = past["file_ms"].pop("(rows/s written)")
    parts.append(
        "`who` at a million flows, ms (median of 5); the file takes"
        f" {written:,.0f} flows/s.\n\n"
        + table(
            ["question", "memory", "SQLite"],
            [[n, f"{past['memory_ms'][n]:.1f}", f"{past['file_ms'][n]:.1f}"] for n in QUESTIONS],
        )
    )
    parts.append(
        "Who has this port? Asked by another process over the UNIX socket.\n\n" + questions()
    )
    elsewhere = ", ".join(f"{name} {ms:.1f} ms" for name, ms in others().items())
    parts.append(f"The same question asked elsewhere, a question: {elsewhere}.")
    put("Daemon", "make bench-daemon", "\n\n".join(parts))


if __name__ == "__main__":
    main()
