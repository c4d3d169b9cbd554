# SPDX-License-Identifier: MIT
"""hunter annotate: writes the daemon's history into a capture, by tuple and time."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hunter.cli.options import AnnotateOptions
from hunter.cli.signals import Stop
from hunter.commands.past_owners import OwnersThen, PastEntry, PastOwners
from hunter.formats import pcapng
from hunter.formats.captures import Flow, look, read_capture
from hunter.formats.inputs import Input
from hunter.formats.ownercomment import is_owner_comment, word
from hunter.save.capturefile import CaptureFile
from hunter.save.saving import refuse_input, refuse_pcap
from hunter.show import names
from hunter.show.console import Output
from hunter.show.programs import label, programs
from hunter.show.text import escaped, plain
from nlproto import Error
from nlproto.client.client import DaemonClient
from nlproto.host import netns

__all__ = ["run"]

_BLOCKS, _BYTES = 4096, 4 << 20  # the most packets that are looked up together
_PACKETS = (pcapng.ENHANCED, pcapng.OBSOLETE, pcapng.SIMPLE)
_UNKNOWN = "of no known interface"
_CAUSES = 8  # the most that are reported one by one
_CANDIDATES = 8  # the most names that are written for one end; more are counted


@dataclass(slots=True)
class _Result:
    packets: int = 0
    written: int = 0
    transport: int = 0
    named: int = 0
    ambiguous: int = 0
    """Of the named."""
    unmarked: int = 0
    """Of the named packets: their blocks have no place for a name."""
    others: Counter[str] = field(default_factory=Counter)
    """Packets without a flow, by kind."""
    namespaces: set[int] = field(default_factory=set)
    """Packets whose tuple several flows had at the same time."""
    by_process: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Packets of (comm, pid)."""
    by_choice: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Packets of one of these comms, by all of them."""
    exes: dict[tuple[str, int], str] = field(default_factory=dict)
    described: dict[int, tuple[str, str, int]] | None = None
    """The last process block (name, executable, uid) of each pid; None: no such blocks."""


def run(options: AnnotateOptions, stop: Stop, notify: Callable[[str], None]) -> None:
    """Annotate options.input into options.output. Raises Error."""
    refuse_pcap(options.output)
    refuse_input(options.output, [options.input])
    at = None if options.netns is None else netns.find(options.netns)
    with Input(options.input) as source, DaemonClient(options.socket) as client:
        if not client.daemon["everything"]:
            notify("only your own processes are known: see packet-hunter doctor")
        stream = source.checked(read_capture(source.file, source.name))
        first = list(islice(stream, 1))  # a file that is no capture makes no output
        with (
            CaptureFile(options.output) as output,
            Progress(
                console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
            ) as progress,
        ):
            task = progress.add_task(os.path.basename(source.name), total=source.size)
            result = _Result(described={} if options.process_blocks else None)
            chunks = _chunks(first, stream, source, lambda at: progress.update(task, completed=at))
            owners = PastOwners(client, at)
            try:
                _annotate(chunks, owners, output, result, stop)
            finally:
                _report(result, owners.cut, notify, words=output.is_output())


def _chunks(
    first: list[pcapng.Block],
    stream: Iterator[pcapng.Block],
    source: Input,
    advance: Callable[[int], None],
) -> Iterator[list[pcapng.Block]]:
    """Yield the blocks of `stream`. Its Error is raised after all earlier blocks."""
    yield first
    damage: Error | None = None
    while damage is None:
        chunk: list[pcapng.Block] = []
        size = 0
        try:
            for block in stream:
                chunk.append(block)
                size += len(block.data)
                if len(chunk) == _BLOCKS or size >= _BYTES:
                    break
        except Error as error:
            damage = error
        if chunk:
            yield chunk
            advance(source.position)
        elif damage is None:
            return
    raise damage


def _annotate(
    chunks: Iterable[list[pcapng.Block]],
    owners: PastOwners,
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
                if result.described is not None:
                    result.described = {}
            elif block.kind == pcapng.INTERFACE:
                interfaces.append(pcapng.Interface.of(block))
            packet = pcapng.packet_of(block, interfaces)
            seen = _UNKNOWN if packet is None else look(packet)
            flow, syn = (None, None) if isinstance(seen, str) else seen
            if block.kind in _PACKETS:
                result.packets += 1
                if isinstance(seen, str):
                    result.others[seen] += 1
            time_ns = None if packet is None else packet.time_ns
            found.append((block, flow, syn, None if time_ns is None else time_ns / 1e9))
        owners.learn(dict.fromkeys(flow for _, flow, _, _ in found if flow is not None))
        parts = []
        for block, flow, syn, at in found:
            if flow is not None and syn is not None:
                owners.begin(flow, syn, at)
            parts.append(_named(block, flow, at, owners, result))
        output.write(b"".join(parts))
        result.written = result.packets
        if stop:
            return


def _named(
    block: pcapng.Block, flow: Flow | None, at: float | None, owners: PastOwners, result: _Result
) -> bytes:
    if flow is None:
        return block.data
    result.transport += 1
    if any(map(is_owner_comment, pcapng.comments(block))):  # saved by packet-hunter
        result.named += 1
        return block.data
    ends = {"from": owners.at(flow, 1, at), "to": owners.at(flow, 2, at)}
    ends = {role: answer for role, answer in ends.items() if answer.entries}
    if not ends:
        return block.data
    for answer in ends.values():
        _count(answer, owners, result)
    texts = [f"{role} {_text(answer, owners)}" for role, answer in ends.items()]
    result.named += 1
    result.ambiguous += not all(answer.certain for answer in ends.values())
    if block.kind == pcapng.SIMPLE:  # it has no place for a comment
        result.unmarked += 1
        return block.data
    head, ids = b"", None
    who = next(iter(ends.values()))  # the sender, else the receiver
    if who.certain:
        entry = who.entries[0]
        ids = entry["pid"], 0
        if result.described is not None:
            head = _description(entry, owners.exe(entry), block.order, result.described)
    return head + pcapng.with_comment(block, "packet-hunter: " + ", ".join(texts), ids)


def _description(
    entry: PastEntry, exe: str, order: str, described: dict[int, tuple[str, str, int]]
) -> bytes:
    """Yield its block, if its pid had another one before, or none."""
    known = str(entry["comm"]), exe, int(entry["uid"])
    if described.get(entry["pid"]) == known:
        return b""
    described[entry["pid"]] = known
    return pcapng.process_block(entry["pid"], known[0], exe, uid=known[2], order=order)


def _text(answer: OwnersThen, owners: PastOwners) -> str:
    texts = []
    for entry in answer.entries[:_CANDIDATES]:
        exe = owners.exe(entry)
        texts.append(
            word(f"{escaped(entry['comm'])}.{entry['pid']}")
            + f" uid={entry['uid']}"
            + (f" {word(f'exe={escaped(exe)}')}" if exe else "")
            + f" how={entry['how']}"
            + (f" netns={entry['netns']}" if answer.namespaces else "")
        )
    if len(answer.entries) > _CANDIDATES:
        texts.append(f"{len(answer.entries) - _CANDIDATES} more")
    empty = answer.namespaces - {entry["netns"] for entry in answer.entries}
    texts += [f"somebody in netns={number}" for number in sorted(empty)[:_CANDIDATES]]
    return " or ".join(texts) + ("" if answer.certain else " AMBIGUOUS")


def _count(answer: OwnersThen, owners: PastOwners, result: _Result) -> None:
    result.namespaces |= answer.namespaces
    if not answer.certain:
        result.by_choice[tuple(sorted({str(entry["comm"]) for entry in answer.entries}))] += 1
        return
    entry = answer.entries[0]
    process = (entry["comm"], entry["pid"])
    result.by_process[process] += 1
    result.exes[process] = owners.exe(entry) or result.exes.get(process, "")


def _report(result: _Result, cut: int, notify: Callable[[str], None], words: bool) -> None:
    """`words`: standard output has the capture, so print the table to standard error."""
    rows = _rows(result)
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("process")
        table.add_column("packets", justify="right")
        table.add_column("executable")
        for name, packets, exe in sorted(rows, key=lambda row: -row[1]):
            table.add_row(name, f"{packets:,}", exe)
        Output(stderr=words).print(table)
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
    if result.written < result.packets:
        notify(f"{result.packets - result.written:,} of these packets are not in the output")
    if result.unmarked:
        notify(
            f"{result.unmarked:,} of the named are in simple packet blocks, which have no place"
            " for a name"
        )
    if result.others:
        most = result.others.most_common(_CAUSES)
        parts = [f"{what}: {count:,}" for what, count in most]
        rest = sum(result.others.values()) - sum(count for _, count in most)
        parts += [f"others: {rest:,}"] if rest else []
        notify(f"not looked into: {', '.join(parts)}")


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
