# SPDX-License-Identifier: MIT
"""hunter annotate: the daemon's history, written into a capture by tuple and time."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hunter import pcapng
from hunter.capturefile import CaptureFile
from hunter.captures import Flow, examine, read_capture
from hunter.console import Output
from hunter.inputs import Input
from hunter.ownercomment import is_owner_comment
from hunter.saving import refuse_input, refuse_pcap
from hunter.text import plain
from nlproto import Error
from nlproto.client import DaemonClient
from nlproto.frames import MAX_WAITING

__all__ = ["Owners", "run"]

_BLOCKS, _BYTES = 4096, 4 << 20  # looked at together, at most
_PACKETS = (pcapng.ENHANCED, pcapng.OBSOLETE, pcapng.SIMPLE)
_UNKNOWN = "of no known interface"
_CAUSES = 8  # told one by one
_MAX_FLOWS = 100_000  # remembered
_SLACK_S = 0.5
"""The capture's clock stamp and the history's may differ: both are taken on the packet's way."""


class Stop(Protocol):
    def __bool__(self) -> bool: ...


class Client(Protocol):
    """What is needed of the daemon."""

    def pipeline(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]: ...


@dataclass(slots=True)
class _Count:
    exe: str = ""
    packets: int = 0


@dataclass(slots=True)
class _Result:
    packets: int = 0
    transport: int = 0
    named: int = 0
    unmarked: int = 0
    """Of the named: their blocks have no place for a name."""
    others: Counter[str] = field(default_factory=Counter)
    """Packets without a flow, by what they are."""
    by_process: dict[str, _Count] = field(default_factory=dict)


class Owners:
    """Who owned a flow's ends when; answers are remembered, up to _MAX_FLOWS flows."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._past: dict[Flow, list[dict[str, Any]]] = {}
        self._exe: dict[tuple[int, int], str] = {}

    def learn(self, flows: Iterable[Flow]) -> None:
        """Ask for the flows that are not known yet. Raises Error."""
        wanted = [flow for flow in flows if flow not in self._past]
        if len(self._past) + len(wanted) > _MAX_FLOWS:
            self._past.clear()
            self._exe.clear()
            wanted = list(flows)
        for at in range(0, len(wanted), MAX_WAITING):
            some = wanted[at : at + MAX_WAITING]
            replies = self._client.pipeline([("history", _question(flow)) for flow in some])
            for flow, reply in zip(some, replies, strict=True):
                self._past[flow] = [one for one in reply["flows"] if one["pid"] is not None]
                for process in reply["processes"]:
                    self._exe[process["tgid"], process["start_ns"]] = process["exe"]

    def at(self, flow: Flow, end: int, time_s: float | None) -> dict[str, Any] | None:
        """Return the history's entry of the flow's source (1) or destination (2) at that time."""
        local, remote = flow[end], flow[3 - end]
        fits = [
            one
            for one in self._past.get(flow, ())
            if (one["local"], one["lport"]) == local
            and ((one["remote"], one["rport"]) == remote)
            and one["proto"] == flow[0]
            and (time_s is None or one["first"] - _SLACK_S <= time_s <= one["last"] + _SLACK_S)
        ]
        if not fits or time_s is None:
            return fits[0] if len(fits) == 1 else None
        return min(fits, key=lambda one: max(one["first"] - time_s, time_s - one["last"], 0.0))

    def exe(self, entry: dict[str, Any]) -> str:
        return self._exe.get((entry["pid"], entry["start_ns"]), "")


def _question(flow: Flow) -> dict[str, Any]:
    """The end with the rarer port finds the fewest other flows."""
    proto, source, target = flow
    rare, other = (source, target) if source[1] >= target[1] else (target, source)
    return {"proto": proto, "port": rare[1], "host": other[0], "limit": 100}


def run(options: argparse.Namespace, stop: Stop, notify: Callable[[str], None]) -> None:
    """Annotate options.input into options.output. Raises Error."""
    refuse_pcap(options.output)
    refuse_input(options.output, [options.input])
    with Input(options.input) as source, DaemonClient(options.socket) as client:
        stream = source.checked(read_capture(source.file, source.name))
        first = list(islice(stream, 1))  # a file that is no capture makes no output
        with (
            CaptureFile(options.output) as output,
            Progress(
                console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
            ) as progress,
        ):
            task = progress.add_task(os.path.basename(source.name), total=source.size)
            result = _Result()
            chunks = _chunks(first, stream, source, lambda at: progress.update(task, completed=at))
            try:
                _annotate(chunks, Owners(client), output, result, stop)
            finally:
                _report(result, notify, words=output.is_output())


def _chunks(
    first: list[pcapng.Block],
    stream: Iterator[pcapng.Block],
    source: Input,
    advance: Callable[[int], None],
) -> Iterator[list[pcapng.Block]]:
    """Raises Error of `stream` after all that came before it."""
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
    owners: Owners,
    output: CaptureFile,
    result: _Result,
    stop: Stop,
) -> None:
    interfaces: list[pcapng.Interface] = []
    for chunk in chunks:
        found: list[tuple[pcapng.Block, Flow | None, float | None]] = []
        for block in chunk:
            if block.kind == pcapng.SECTION:
                interfaces = []
            elif block.kind == pcapng.INTERFACE:
                interfaces.append(pcapng.Interface.of(block))
            packet = pcapng.packet_of(block, interfaces)
            found_flow = _UNKNOWN if packet is None else examine(packet)
            flow = None if isinstance(found_flow, str) else found_flow
            if block.kind in _PACKETS:
                result.packets += 1
                if isinstance(found_flow, str):
                    result.others[found_flow] += 1
            time_ns = None if packet is None else packet.time_ns
            found.append((block, flow, None if time_ns is None else time_ns / 1e9))
        owners.learn(dict.fromkeys(flow for _, flow, _ in found if flow is not None))
        parts = [_named(block, flow, at, owners, result) for block, flow, at in found]
        output.write(b"".join(parts))
        if stop:
            return


def _named(
    block: pcapng.Block, flow: Flow | None, at: float | None, owners: Owners, result: _Result
) -> bytes:
    if flow is None:
        return block.data
    result.transport += 1
    if any(map(is_owner_comment, pcapng.comments(block))):  # saved by packet-hunter
        result.named += 1
        return block.data
    sender, receiver = owners.at(flow, 1, at), owners.at(flow, 2, at)
    texts = []
    for role, entry in (("from", sender), ("to", receiver)):
        if entry is None:
            continue
        exe = owners.exe(entry)
        texts.append(
            f"{role} {plain(entry['comm'])}.{entry['pid']} uid={entry['uid']}"
            + (f" exe={plain(exe)}" if exe else "")
            + f" how={entry['how']}"
        )
        count = result.by_process.setdefault(f"{plain(entry['comm'])}.{entry['pid']}", _Count())
        count.exe = plain(exe) or count.exe
        count.packets += 1
    if not texts:
        return block.data
    result.named += 1
    if block.kind == pcapng.SIMPLE:  # it has no place for a comment
        result.unmarked += 1
        return block.data
    return pcapng.with_comment(block, "packet-hunter: " + ", ".join(texts))


def _report(result: _Result, notify: Callable[[str], None], words: bool) -> None:
    """`words`: standard output has the capture, the table goes where words go."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("process")
    table.add_column("packets", justify="right")
    table.add_column("executable")
    for name, count in sorted(result.by_process.items(), key=lambda one: -one[1].packets):
        table.add_row(name, f"{count.packets:,}", count.exe)
    if result.by_process:
        Output(stderr=words).print(table)
    share = f" ({100 * result.named / result.transport:.1f} %)" if result.transport else ""
    notify(
        f"{result.packets:,} packets, {result.transport:,} of them TCP or UDP with ports: "
        f"{result.named:,} named{share}"
    )
    if result.unmarked:
        notify(
            f"{result.unmarked:,} of the named are in simple packet blocks, which have no place"
            " for a name: editcap -F pcap makes a capture of them that has"
        )
    if result.others:
        most = result.others.most_common(_CAUSES)
        parts = [f"{what}: {count:,}" for what, count in most]
        rest = sum(result.others.values()) - sum(count for _, count in most)
        parts += [f"others: {rest:,}"] if rest else []
        notify(f"not looked into: {', '.join(parts)}")
