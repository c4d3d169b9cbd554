# SPDX-License-Identifier: MIT
"""hunter annotate: the daemon's history, written into a capture by tuple and time."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Protocol

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hunter import names, pcapng
from hunter.capturefile import CaptureFile
from hunter.captures import Flow, look, read_capture
from hunter.console import Output
from hunter.owners import Answer, Owners, place
from hunter.programs import label, programs
from hunter.text import plain
from nlproto import Error
from nlproto.client import DaemonClient

__all__ = ["run"]

_BLOCKS, _BYTES = 4096, 4 << 20  # looked at together, at most
_CANDIDATES = 8  # written of one end; more are counted


class Stop(Protocol):
    def __bool__(self) -> bool: ...


@dataclass(slots=True)
class _Result:
    packets: int = 0
    transport: int = 0
    named: int = 0
    ambiguous: int = 0
    """Of the named."""
    namespaces: set[int] = field(default_factory=set)
    """Those that had the same flow at the same time."""
    by_process: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Packets of (comm, pid)."""
    by_choice: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Packets of one or the other of these comms."""
    exes: dict[tuple[str, int], str] = field(default_factory=dict)


def run(options: argparse.Namespace, stop: Stop, notify: Callable[[str], None]) -> None:
    """Annotate options.input into options.output. Raises Error."""
    try:
        size = os.stat(options.input).st_size
        source = open(options.input, "rb")
    except OSError as error:
        raise Error(f"cannot read {options.input}: {error.strerror}") from None
    at = None if options.netns is None else place(options.netns)
    with source, DaemonClient(options.socket) as client:
        if not client.daemon["everything"]:
            notify("only your own processes are known: see packet-hunter doctor")
        if os.path.exists(options.output) and os.path.samefile(options.input, options.output):
            raise Error(f"{options.output} is the capture itself: choose another name")
        stream = read_capture(source, options.input)
        first = list(islice(stream, 1))  # a file that is no capture makes no output
        with (
            CaptureFile(options.output) as output,
            Progress(
                console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
            ) as progress,
        ):
            task = progress.add_task(os.path.basename(options.input), total=size)
            result = _Result()
            chunks = _chunks(first, stream, source, lambda at: progress.update(task, completed=at))
            owners = Owners(client, at)
            try:
                _annotate(chunks, owners, output, result, stop)
            finally:
                _report(result, owners.cut, notify)


def _chunks(
    first: list[pcapng.Block],
    stream: Iterator[pcapng.Block],
    source: IO[bytes],
    advance: Callable[[int], None],
) -> Iterator[list[pcapng.Block]]:
    yield first
    chunk, size = [], 0
    for block in stream:
        chunk.append(block)
        size += len(block.data)
        if len(chunk) == _BLOCKS or size >= _BYTES:
            yield chunk
            advance(source.tell())
            chunk, size = [], 0
    yield chunk


def _annotate(
    chunks: Iterable[list[pcapng.Block]],
    owners: Owners,
    output: CaptureFile,
    result: _Result,
    stop: Stop,
) -> None:
    interfaces: list[pcapng.Interface] = []
    for chunk in chunks:
        found: list[tuple[pcapng.Block, Flow | None, int | None, float | None]] = []
        for block in chunk:
            if block.kind == pcapng.SECTION:
                interfaces = []
            elif block.kind == pcapng.INTERFACE:
                interfaces.append(pcapng.Interface.of(block))
            packet = pcapng.packet_of(block, interfaces)
            flow, syn = (packet and look(packet)) or (None, None)
            result.packets += packet is not None
            time_ns = None if packet is None else packet.time_ns
            found.append((block, flow, syn, None if time_ns is None else time_ns / 1e9))
        owners.learn(dict.fromkeys(flow for _, flow, _, _ in found if flow is not None))
        parts = []
        for block, flow, syn, at in found:
            if flow is not None and syn is not None:
                owners.begin(flow, syn, at)
            parts.append(_named(block, flow, at, owners, result))
        output.write(b"".join(parts))
        if stop:
            return


def _named(
    block: pcapng.Block, flow: Flow | None, at: float | None, owners: Owners, result: _Result
) -> bytes:
    if flow is None:
        return block.data
    result.transport += 1
    ends = {"from": owners.at(flow, 1, at), "to": owners.at(flow, 2, at)}
    ends = {role: answer for role, answer in ends.items() if answer.entries}
    if not ends:
        return block.data
    for answer in ends.values():
        _count(answer, owners, result)
    texts = [f"{role} {_text(answer, owners)}" for role, answer in ends.items()]
    result.named += 1
    result.ambiguous += not all(answer.certain for answer in ends.values())
    if block.kind != pcapng.ENHANCED:  # a simple packet has no place for a comment
        return block.data
    return pcapng.with_comment(block, "packet-hunter: " + ", ".join(texts))


def _text(answer: Answer, owners: Owners) -> str:
    texts = []
    for entry in answer.entries[:_CANDIDATES]:
        exe = owners.exe(entry)
        texts.append(
            f"{plain(entry['comm'])}.{entry['pid']} uid={entry['uid']}"
            + (f" exe={plain(exe)}" if exe else "")
            + f" how={entry['how']}"
            + (f" netns={entry['netns']}" if answer.namespaces else "")
        )
    if len(answer.entries) > _CANDIDATES:
        texts.append(f"{len(answer.entries) - _CANDIDATES} more")
    empty = answer.namespaces - {entry["netns"] for entry in answer.entries}
    texts += [f"somebody in netns={netns}" for netns in sorted(empty)[:_CANDIDATES]]
    return " or ".join(texts) + ("" if answer.certain else " AMBIGUOUS")


def _count(answer: Answer, owners: Owners, result: _Result) -> None:
    result.namespaces |= answer.namespaces
    if not answer.certain:
        result.by_choice[tuple(sorted({str(entry["comm"]) for entry in answer.entries}))] += 1
        return
    entry = answer.entries[0]
    process = (entry["comm"], entry["pid"])
    result.by_process[process] += 1
    result.exes[process] = owners.exe(entry) or result.exes.get(process, "")


def _report(result: _Result, cut: int, notify: Callable[[str], None]) -> None:
    rows = _rows(result)
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("process")
        table.add_column("packets", justify="right")
        table.add_column("executable")
        for name, packets, exe in sorted(rows, key=lambda row: -row[1]):
            table.add_row(name, f"{packets:,}", exe)
        Output().print(table)
    if result.namespaces:
        shown = ", ".join(names.netns(one) for one in sorted(result.namespaces)[:_CANDIDATES])
        notify(
            f"{len(result.namespaces)} network namespaces had the same flows at the same time"
            f" ({shown}); --netns NS says where the capture was made"
        )
    if cut:
        notify(f"{cut:,} flows have more entries in the history than the daemon gives: ambiguous")
    share = f" ({100 * result.named / result.transport:.1f} %)" if result.transport else ""
    notify(
        f"{result.packets:,} packets, {result.transport:,} of them TCP or UDP with ports: "
        f"{result.named:,} named{share}, of these {result.ambiguous:,} ambiguous"
    )


_Row = tuple[str, str, tuple[str, int] | None]


def _rows(result: _Result) -> list[tuple[str, int, str]]:
    """(process or program, packets, executable)."""
    program_of = programs({one: (one[0], result.exes[one]) for one in result.by_process})
    pids: defaultdict[_Row, set[int]] = defaultdict(set)
    packets: Counter[_Row] = Counter()
    for process, count in result.by_process.items():
        pids[program_of[process]].add(process[1])
        packets[program_of[process]] += count
    rows = [(label(one[0], pids[one]), packets[one], plain(one[1])) for one in packets]
    for comms, count in result.by_choice.items():
        rows.append((f"{plain(' or '.join(comms))} (ambiguous)", count, ""))
    return rows
