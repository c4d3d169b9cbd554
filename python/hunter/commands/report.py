# SPDX-License-Identifier: MIT
"""hunter report: a saved capture as one HTML page that loads and runs nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

import numpy as np

from hunter.cli.options import ReportOptions
from hunter.save.capturefile import CaptureFile
from hunter.save.saving import refuse_input
from hunter.show.columns import addresses, translated
from hunter.show.names import Namespaces
from hunter.show.rates import FarEnd
from hunter.show.summary import on_the_wire
from hunter.show.text import plain
from hunter.show.units import amount
from hunter.sources.source_file import FileSource
from nlproto import Error
from nlproto.filters.filter import EVERYTHING
from nlproto.records import wire
from nlproto.records.batch import NamedBatch

__all__ = ["CaptureSums", "page", "run"]

_COLOURS = "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377 #e07b39 #6a6fd1 #3aa889".split()
_REST = "#8a8f98"
_WIDTH, _HEIGHT, _BINS = 1000, 220, 120
_SHOWN = 14  # processes and far ends in the graph
_ROWS = 200  # in a table

ProcessName = tuple[str, int]
"""(comm, pid); with pid 0 a reason instead."""


@dataclass(slots=True)
class _Process:
    packets: int = 0
    sent: int = 0
    received: int = 0
    exe: str = ""
    peers: set[FarEnd] = field(default_factory=set)

    @property
    def total(self) -> int:
        return self.sent + self.received


class CaptureSums:
    """Sums of a capture, for spans of seconds that are few enough to draw."""

    def __init__(self) -> None:
        self.packets = 0
        self.first_s = self.last_s = 0
        self.processes: dict[ProcessName, _Process] = defaultdict(_Process)
        self.edges: Counter[tuple[ProcessName, FarEnd]] = Counter()
        self.namespaces = Namespaces(None)
        self.reasons: Counter[str] = Counter()
        self.seconds: dict[ProcessName, Counter[int]] = defaultdict(Counter)
        self.translated: Counter[tuple[ProcessName, str, str]] = Counter()
        """Bytes of an owner by one end and what NAT makes of it."""

    def add(self, batch: NamedBatch, source: FileSource) -> None:
        """Count the records of `batch`: packets and bytes on the wire, as --summary does."""
        records = batch.records
        if not len(records):
            return
        self.namespaces.see(records["netns"])
        places = records["netns"].tolist()
        segments, size = on_the_wire(records)
        ends = addresses(records, "saddr"), addresses(records, "daddr")
        ports = records["sport"].tolist(), records["dport"].tolist()
        nat = translated(records, source.ends)
        incoming = (records["dir"] == wire.lib.SNIFFER_DIR_IN).tolist()
        seconds = (batch.clock.real_times(records["time_ns"]).view(np.int64) // 10**9).tolist()
        packets, sizes, how = segments.tolist(), size.tolist(), records["how"].tolist()
        owners = zip(
            records["tgid"].tolist(),
            records["start_ns"].tolist(),
            records["comm"].tolist(),
            strict=True,
        )
        for i, (pid, start, comm) in enumerate(owners):
            name = (wire.text(comm), pid) if pid else (wire.how_name(how[i]), 0)
            one = self.processes[name]
            if pid and not one.exe:
                details = source.get(pid, start)
                one.exe = details.exe if details else ""
            peer = (places[i], ends[0][i] if incoming[i] else ends[1][i])
            one.packets += packets[i]
            if incoming[i]:
                one.received += sizes[i]
            else:
                one.sent += sizes[i]
            one.peers.add(peer)
            self.edges[name, peer] += sizes[i]
            self.seconds[name][seconds[i]] += sizes[i]
            if not pid:
                self.reasons[name[0]] += packets[i]
            if nat[i] is not None:
                for end in _translated_ends(ends, ports, nat, i):
                    self.translated[name, *end] += sizes[i]
        self.first_s = min(self.first_s or min(seconds), min(seconds))
        self.last_s = max(self.last_s, max(seconds))
        self.packets += sum(packets)

    def peer(self, peer: FarEnd) -> str:
        """Return the text of a far end, with its namespace if the capture has several."""
        place = self.namespaces.name(peer[0])
        return f"{peer[1]} netns {place}" if place else peer[1]

    def by_bytes(self) -> list[tuple[ProcessName, _Process]]:
        """Return processes, most bytes first."""
        return sorted(self.processes.items(), key=lambda one: -one[1].total)


def run(options: ReportOptions, notify: Callable[[str], None]) -> None:
    """Write the page of options.input to options.output. Raises Error."""
    capture = CaptureSums()
    refuse_input(options.output, options.input)
    damage: Error | None = None
    with FileSource(options.input, EVERYTHING) as source:
        try:
            while (batches := source.read(0)) is not None:
                for batch in batches:
                    capture.add(batch, source)
        except Error as error:
            damage = error  # what was read before the damage is worth a page
    names = ", ".join(options.input)
    if not capture.packets:
        raise damage or Error(f"{names} holds no packets: there is nothing to report")
    with CaptureFile(options.output) as output:
        output.write(page(capture, names).encode("utf-8", "backslashreplace"))
    notify(f"{options.output}: {capture.packets:,} packets of {len(capture.processes):,} owners")
    if damage is not None:
        raise damage


def _translated_ends(
    ends: tuple[list[str], list[str]],
    ports: tuple[list[int], list[int]],
    nat: list[tuple[str, int, str, int] | None],
    at: int,
) -> Iterator[tuple[str, str]]:
    """Each end of a packet that NAT changes, and what it becomes or was."""
    became = nat[at]
    assert became is not None
    for texts, numbers, other in zip(ends, ports, (became[:2], became[2:]), strict=True):
        if (texts[at], numbers[at]) != other:
            yield f"{texts[at]}.{numbers[at]}", f"{other[0]}.{other[1]}"


def _h(name: str) -> str:
    return escape(plain(name))


def _label(name: ProcessName) -> str:
    return f"{name[0]}.{name[1]}" if name[1] else name[0].replace("_", " ")


def page(capture: CaptureSums, title: str) -> str:
    """Return the HTML; every name in it is escaped."""
    ordered = capture.by_bytes()
    colours = {
        name: colour
        for (name, _), colour in zip((o for o in ordered if o[0][1]), _COLOURS, strict=False)
    }
    begin, end = (datetime.fromtimestamp(s, UTC) for s in (capture.first_s, capture.last_s))
    named = sum(one.packets for name, one in ordered if name[1])
    total = sum(one.total for _, one in ordered)
    subtitle = (
        f"{begin:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC, {amount(total, 'bin-bytes')},"
        f" {capture.packets:,} packets, {100 * named / capture.packets:.1f} % of them named"
    )
    processes = [
        (
            f'<i style="background:{colours.get(name, _REST)}"></i>{_h(_label(name))}',
            _h(one.exe),
            f"{one.packets:,}",
            amount(one.sent, "bin-bytes"),
            amount(one.received, "bin-bytes"),
            f"{len(one.peers):,}",
        )
        for name, one in ordered[:_ROWS]
        if name[1]
    ]
    ends: dict[FarEnd, Counter[ProcessName]] = defaultdict(Counter)
    for (name, peer), size in capture.edges.items():
        ends[peer][name] += size
    peers = [
        (
            _h(capture.peer(peer)),
            amount(sum(names.values()), "bin-bytes"),
            ", ".join(_h(_label(name)) for name, _ in names.most_common(5)),
        )
        for peer, names in sorted(ends.items(), key=lambda one: -sum(one[1].values()))[:_ROWS]
    ]
    nat = [
        (_h(_label(name)), _h(end), _h(became), amount(size, "bin-bytes"))
        for (name, end, became), size in capture.translated.most_common(_ROWS)
    ]
    reasons = [(_h(r.replace("_", " ")), f"{n:,}") for r, n in capture.reasons.most_common()]
    return Template(
        resources.files("hunter.commands").joinpath("report.html").read_text("utf-8")
    ).substitute(
        title=_h(title),
        subtitle=escape(subtitle),
        timeline=_timeline(capture, colours),
        graph=_graph(capture, colours),
        processes=_table(
            ["process", "executable", "packets", "sent", "received", "far ends"],
            processes,
            {2, 3, 4, 5},
        ),
        peers=_table(["far end", "bytes", "processes"], peers, {1}),
        nat="<h2>Translated addresses (NAT)</h2>"
        + _table(["process", "address", "on the other side", "bytes"], nat, {3})
        if nat
        else "",
        unnamed=_table(["reason", "packets"], reasons, {1}) if reasons else "<p>None.</p>",
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        marks = [' class="n"' if i in numbers else "" for i in range(len(row))]
        parts = (f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, row, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    return f"<table>{cells('th', heads)}{''.join(cells('td', row) for row in rows)}</table>"


def _timeline(capture: CaptureSums, colours: dict[ProcessName, str]) -> str:
    """Stacked bars; processes without a colour share one."""
    span = capture.last_s - capture.first_s + 1
    step = -(-span // _BINS)
    bins = -(-span // step)
    stacks: list[Counter[str]] = [Counter() for _ in range(bins)]
    labels: dict[str, str] = {}
    for name, seconds in capture.seconds.items():
        colour = colours.get(name, _REST)
        labels.setdefault(colour, _label(name) if name in colours else "others and unnamed")
        for second, size in seconds.items():
            stacks[(second - capture.first_s) // step][colour] += size
    most = max((sum(stack.values()) for stack in stacks), default=1)
    width = _WIDTH / bins
    order = [*(c for c in colours.values() if c in labels), _REST]
    bars = []
    for number, stack in enumerate(stacks):
        base = float(_HEIGHT)
        for colour in order:
            if not stack[colour]:
                continue
            height = stack[colour] / most * (_HEIGHT - 20)
            base -= height
            bars.append(
                f'<rect x="{number * width:.1f}" y="{base:.1f}" width="{max(width - 1, 0.5):.1f}"'
                f' height="{height:.1f}" fill="{colour}"><title>{_h(labels[colour])}:'
                f" {amount(stack[colour] / step, 'bin-bytes')}/s</title></rect>"
            )
    end = datetime.fromtimestamp(capture.last_s, UTC)
    begin = datetime.fromtimestamp(capture.first_s, UTC)
    legend = " ".join(
        f'<span><i style="background:{colour}"></i>{_h(labels[colour])}</span>'
        for colour in order
        if colour in labels
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 20}" role="img" aria-label="bytes over time">'
        f'<text class="soft" x="0" y="12">{amount(most / step, "bin-bytes")}/s</text>'
        f"{''.join(bars)}"
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
        f'<text class="soft" x="0" y="{_HEIGHT + 16}">{begin:%H:%M:%S}</text>'
        f'<text class="soft" x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">'
        f"{end:%H:%M:%S}</text>"
        f"</svg><p>{legend}</p>"
    )


def _graph(capture: CaptureSums, colours: dict[ProcessName, str]) -> str:
    """Processes on the left, far ends on the right. Wider lines mean more bytes."""
    left = [name for name, _ in capture.by_bytes() if name[1]][:_SHOWN]
    weight: Counter[FarEnd] = Counter()
    for (name, peer), size in capture.edges.items():
        if name in left:
            weight[peer] += size
    right = [peer for peer, _ in weight.most_common(_SHOWN)]
    if not left:
        return "<p>No packet has a process.</p>"
    row = 30
    height = row * max(len(left), len(right)) + 10
    most = max(size for (name, peer), size in capture.edges.items() if name in left)
    parts = []
    for (name, peer), size in capture.edges.items():
        if name not in left or peer not in right:
            continue
        y1, y2 = left.index(name) * row + 20, right.index(peer) * row + 20
        parts.append(
            f'<path d="M290 {y1} C500 {y1} 500 {y2} 700 {y2}" fill="none" stroke-opacity=".6"'
            f' stroke="{colours.get(name, _REST)}" stroke-width="{1 + 11 * size / most:.1f}">'
            f"<title>{_h(_label(name))} and {_h(capture.peer(peer))}:"
            f" {amount(size, 'bin-bytes')}</title></path>"
        )
    for index, name in enumerate(left):
        y = index * row + 24
        parts.append(f'<text x="280" y="{y}" text-anchor="end">{_h(_label(name))}</text>')
    parts += [
        f'<text x="710" y="{index * row + 24}">{_h(capture.peer(peer))}</text>'
        for index, peer in enumerate(right)
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="processes and far ends">'
        f"{''.join(parts)}</svg>"
    )
