# SPDX-License-Identifier: MIT
"""Same workload, several tools: packets and bytes named right, wrong and not at all.

    PYTHONPATH=python:tests/vm:bench python -m accuracy [--tool NAME]... [--json OUT]

tcpdump says which packets there were, the workload itself whose they are. Each tool has a run of
its own. Root only; everything happens in network namespaces of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attribution import truth
from attribution.recorder import Recorder
from attribution.stage import CLONE_NEWNET, Stage, Unable, Wire, call, loopback_up, rename

import accuracy_tools as tools
import accuracy_workload as workload
from nlproto.errors import Error

PCAP_HEADER, PACKET_HEADER, ETHERNET = 24, 16, 14
TICK_NS = 10_000_000
TOOLS = ("module", "ebpf", "packet", "nethogs", "ss", "psutil", "tcplife", "tcpconnect")
LABELS = {
    "module": "packet-hunter, engine module",
    "ebpf": "packet-hunter, engine ebpf",
    "packet": "packet-hunter, engine packet",
    "nethogs": "nethogs (bytes only)",
    "ss": "ss, 10 times a second",
    "psutil": "psutil, 10 times a second",
    "tcplife": "tcplife (TCP only)",
    "tcpconnect": "tcpconnect (TCP out only)",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One packet as tcpdump saw it, from this host's side. ``time_ns`` is CLOCK_MONOTONIC."""

    time_ns: int
    proto: str
    lport: int
    rport: int
    out: bool
    size: int


@dataclass(slots=True)
class Row:
    """One tool's result; ``packets`` and ``size`` are all there were (IP bytes)."""

    tool: str
    packets: int = 0
    right: int = 0
    wrong: int = 0
    size: int = 0
    right_bytes: int = 0
    wrong_bytes: int = 0
    note: str = ""

    @property
    def unnamed(self) -> int:
        return self.packets - self.right - self.wrong

    @property
    def unnamed_bytes(self) -> int:
        return self.size - self.right_bytes - self.wrong_bytes


def read_pcap(path: Path, clock_offset_ns: int) -> Iterator[Seen]:
    """TCP and UDP over IPv4 in a pcap file of an Ethernet device (nanosecond stamps)."""
    data = path.read_bytes()
    place = PCAP_HEADER
    host = socket.inet_aton(workload.HOST)
    while place + PACKET_HEADER <= len(data):
        seconds, nanoseconds, kept, length = struct.unpack_from("=IIII", data, place)
        place += PACKET_HEADER
        frame = data[place : place + kept]
        place += kept
        if len(frame) < ETHERNET + 28 or frame[12:14] != b"\x08\x00" or frame[23] not in (6, 17):
            continue
        transport = ETHERNET + 4 * (frame[ETHERNET] & 15)
        source, target = struct.unpack_from("!HH", frame, transport)
        out = frame[26:30] == host
        local, remote = (source, target) if out else (target, source)
        yield Seen(
            seconds * 10**9 + nanoseconds - clock_offset_ns,
            "tcp" if frame[23] == 6 else "udp", local, remote, out, length - ETHERNET,
        )  # fmt: skip


class Owners:
    """Whose a packet really is, by the workload's own claims."""

    def __init__(self, claims: list[truth.Claim], netns: int) -> None:
        self._by_port: dict[tuple[str, int], list[truth.Claim]] = defaultdict(list)
        for claim in claims:
            if claim.netns == netns:
                self._by_port[claim.proto, claim.lport].append(claim)
        for found in self._by_port.values():
            found.sort(key=lambda claim: claim.t0)

    def of(self, proto: str, lport: int, time_ns: int) -> truth.Claim | None:
        """The latest claim from before the packet (ports are used again)."""
        found = [c for c in self._by_port.get((proto, lport), ()) if c.t0 <= time_ns]
        return found[-1] if found else None


def judge(row: Row, seen: list[Seen], owners: Owners, sightings: list[tools.Sighting]) -> None:
    """Count for each packet what the tool said of its connection."""
    said: dict[tools.Key, set[int]] = defaultdict(set)
    for proto, lport, rport, pid in sightings:
        said[proto, lport, rport].add(pid)
    for packet in seen:
        owner = owners.of(packet.proto, packet.lport, packet.time_ns)
        if owner is None:
            continue
        pids = said.get((packet.proto, packet.lport, packet.rport)) or said.get(
            (packet.proto, packet.lport, 0), set()
        )
        count(row, packet.size, {owner.pid} if owner.pid in pids else pids, owner.pid)


def count(row: Row, size: int, pids: set[int], owner: int) -> None:
    row.packets += 1
    row.size += size
    if pids == {owner}:
        row.right += 1
        row.right_bytes += size
    elif pids:
        row.wrong += 1
        row.wrong_bytes += size


def judge_records(row: Row, recorder: Recorder, owners: Owners, netns: int) -> None:
    """Count the records of an engine; what it did not record at all is unnamed."""
    records = recorder.finish()
    for record in records[records["netns"] == netns]:
        proto = {6: "tcp", 17: "udp"}[int(record["proto"])]
        lport = int(record["dport" if record["dir"] == 1 else "sport"])
        owner = owners.of(proto, lport, int(record["time_ns"]))
        if owner is None:
            continue
        size = int(record["len"])
        tgid = int(record["tgid"])
        same = tgid == owner.pid and int(record["start_ns"]) // TICK_NS == owner.start
        count(row, size, {owner.pid} if same else {tgid} if tgid else set(), owner.pid)


def judge_nethogs(row: Row, seen: list[Seen], owners: Owners, said: dict[int, int]) -> None:
    """Compare bytes by process: more than it had is wrong, less is unnamed."""
    real: dict[int, int] = defaultdict(int)
    for packet in seen:
        owner = owners.of(packet.proto, packet.lport, packet.time_ns)
        if owner is not None:
            row.packets += 1
            row.size += packet.size
            real[owner.pid] += packet.size
    row.right_bytes = sum(min(size, said.get(pid, 0)) for pid, size in real.items())
    # nethogs counts Ethernet headers too; only what exceeds that is held against it.
    row.wrong_bytes = sum(
        max(0, size - real.get(pid, 0) - size // 20) for pid, size in said.items() if pid
    )
    row.note = "bytes by process; it does not say whose a packet is"


def tool_beside(name: str, directory: Path) -> contextlib.AbstractContextManager[None]:
    """Run a foreign tool in the stage's namespace, its output going to the file of its name."""
    output = directory / name
    if name in ("ss", "psutil"):
        return tools.polled(name, output)
    if name == "nethogs":
        command = ["nethogs", "-t", "-C", "-d", "1", "-v", "2", workload.INTERFACE]
        return tools.running(command, output, 2)
    if name in ("tcplife", "tcpconnect"):
        # bcc's own, compiled beforehand (libbpf-tools): nothing is compiled when they start
        command = ["stdbuf", "-oL", name, *(["-s"] if name == "tcpconnect" else [])]
        return tools.running(command, output, 60, "PID")
    return contextlib.nullcontext()


def stage_process(tool: str, directory: Path, end: socket.socket) -> None:
    """Body of the process that is this host; tells the runner its result as JSON."""
    wire = Wire(end)
    status = 1
    try:
        rename("stage")
        call("unshare", CLONE_NEWNET)
        loopback_up()
        with Stage(directory, wire, None, directory, 1.0) as stage:
            other = workload.set_up(stage)
            offset = time.time_ns() - truth.now()
            dump = [
                "tcpdump", "-i", workload.INTERFACE, "-s", "96", "-U", "-w",
                str(directory / "pcap"), "--time-stamp-precision=nano", "-Z", "root", "-n",
            ]  # fmt: skip
            with tools.running(dump, directory / "tcpdump", 2):
                stage.attach()
                with tool_beside(tool, directory):
                    workload.play(stage, other)
            wire.tell({"done": offset})
            wire.hear()
        status = 0
    except (tools.Missing, Unable) as error:
        wire.tell({"missing": str(error)})
    except BaseException:  # noqa: B036 - a forked process must not return into the runner
        wire.tell({"missing": traceback.format_exc()})
    finally:
        os._exit(status)


def compare(tool: str) -> Row:
    """One tool, one run."""
    directory = Path(tempfile.mkdtemp(prefix="accuracy."))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        stage_process(tool, directory, theirs)
    theirs.close()
    wire = Wire(ours)
    row = Row(tool)
    try:
        message = wire.hear(300)
        if "missing" in message:
            return Row(tool, note="not run: " + message["missing"])
        netns = os.stat(f"/proc/{pid}/ns/net").st_ino
        with contextlib.ExitStack() as stack:
            recorder = None
            if tool in ("module", "ebpf", "packet"):
                recorder = stack.enter_context(Recorder(tool))
            wire.tell()
            message = follow(wire, recorder)
            if "missing" in message:
                return Row(tool, note="not run: " + message["missing"])
            seen = list(read_pcap(directory / "pcap", int(message["done"])))
            owners = Owners(truth.load(directory / "truth"), netns)
            fill(row, tool, directory, seen, owners, recorder, netns)
        wire.tell()
    except Error as error:
        return Row(tool, note=f"not run: {error}")
    except (EOFError, TimeoutError, OSError) as error:
        return Row(tool, note=f"not run: {error!r}")
    finally:
        ours.close()
        os.waitpid(pid, 0)
    return row


def follow(wire: Wire, recorder: Recorder | None) -> Any:
    """Read the engine until the stage has done."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if recorder is None:
            return wire.hear(600)
        recorder.read(0.05)
        with contextlib.suppress(TimeoutError):
            return wire.hear(0.001)
    raise TimeoutError("the workload did not end")


def fill(
    row: Row, tool: str, directory: Path, seen: list[Seen], owners: Owners,
    recorder: Recorder | None, netns: int,
) -> None:  # fmt: skip
    if recorder is not None:
        judge_records(row, recorder, owners, netns)
        there = Row(tool)
        judge(there, seen, owners, [])
        row.note = f"tcpdump: {there.packets} packets, {there.size} bytes"
        return
    output = directory / tool
    text = output.read_text() if output.exists() else ""
    if tool == "nethogs":
        judge_nethogs(row, seen, owners, tools.nethogs_bytes(text))
        return
    parse = {
        "tcplife": tools.tcplife_sightings,
        "tcpconnect": tools.tcpconnect_sightings,
    }.get(tool, tools.polled_sightings)
    judge(row, seen, owners, list(parse(text)))


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def table(rows: list[Row]) -> str:
    """The result as Markdown."""
    lines = [
        "| tool | packets | right | wrong | unnamed | bytes right | wrong | unnamed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.packets:
            lines.append(f"| {LABELS[row.tool]} | {row.note} | | | | | | |")
            continue
        packets = (
            ["-"] * 3
            if row.tool == "nethogs"
            else [share(n, row.packets) for n in (row.right, row.wrong, row.unnamed)]
        )
        size = [share(n, row.size) for n in (row.right_bytes, row.wrong_bytes, row.unnamed_bytes)]
        lines.append(
            f"| {LABELS[row.tool]} | {row.packets} | {' | '.join(packets)} | {' | '.join(size)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("accuracy needs root: it makes network namespaces", file=sys.stderr)
        return 1
    rows = []
    for tool in arguments.tool or TOOLS:
        row = compare(tool)
        rows.append(row)
        print(f"{tool}: {asdict(row)}", file=sys.stderr, flush=True)
    print(f"Kernel {platform.release()}, {os.cpu_count()} CPUs, workload of bench/"
          "accuracy_workload.py, one run a tool.\n")  # fmt: skip
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
