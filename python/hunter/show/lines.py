# SPDX-License-Identifier: MIT
"""One line for each packet, as tcpdump writes them, with the owner."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

import numpy as np
from rich.console import Console
from rich.text import Text

from hunter.show.columns import FLAGS, Columns, Details, HoldersOf, columns_of_batch, tcp_flags
from hunter.show.names import HostNames, Namespaces, service
from hunter.show.programs import place
from hunter.show.text import plain
from nlproto.records.batch import NamedBatch

__all__ = ["LinePrinter", "Style", "tcp_flags"]

_TCP_FLAGS = tuple(tcp_flags(flags) for flags in range(256))


@dataclass(frozen=True, slots=True)
class Style:
    """How lines look; the counts are how often -q, -v and -t were given."""

    numbers: bool = False
    quiet: bool = False
    verbose: int = 0
    times: int = 0
    netns: int | None = None
    """As in hunter.show.names.Namespaces."""


class LinePrinter:
    """Writes batches as lines; colours and columns on a terminal, plain text elsewhere.

    Raises BrokenPipeError when nobody reads on.
    """

    def __init__(
        self,
        style: Style,
        details: Details,
        holders: HoldersOf,
        names: HostNames,
        out: IO[str] | None = None,
    ) -> None:
        self._style = style
        self._details = details
        self._holders = holders
        self._names = names
        self._namespaces = Namespaces(style.netns)
        self.rows = 0
        """How many records were printed."""
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._console = Console(file=self._out, soft_wrap=True, highlight=False, markup=False)
        self._first: int | None = None
        self._last = 0

    def add(self, batch: NamedBatch) -> None:
        """Write one line for each record."""
        if self._terminal:
            self._console.print(self.texts(batch))
        else:
            self._out.write("".join(f"{line}\n" for line in self.lines(batch)))
        self._out.flush()
        self.rows += len(batch.records)

    def lines(self, batch: NamedBatch) -> list[str]:
        """Return the lines without colours."""
        return ["".join(part for part, _ in parts) for parts in self._parts(batch)]

    def texts(self, batch: NamedBatch) -> Text:
        """Return the lines as one rich text."""
        return Text("\n").join(Text.assemble(*parts) for parts in self._parts(batch))

    def _parts(self, batch: NamedBatch) -> list[list[tuple[str, str]]]:
        table = columns_of_batch(batch, self._details, self._holders)
        records = batch.records
        self._namespaces.see(records["netns"])
        moments = self._moments(batch)
        flags = records["tcp_flags"].tolist()
        rows = []
        for i, moment in enumerate(moments):
            parts = [(f"{moment} ", "dim")] if moment else []
            parts += [
                (f"{table.dir[i]:3} ", "cyan" if table.dir[i] == "out" else "magenta"),
                (f"{table.proto[i]} ", ""),
                (self._end(table.src[i], table.sport[i], table.proto[i]), ""),
                (self._translated(table, i, 0), "dim"),
                (self._domain(table, i, "in"), "bold"),
                (" > ", "dim"),
                (self._end(table.dst[i], table.dport[i], table.proto[i]), ""),
                (self._translated(table, i, 2), "dim"),
                (self._domain(table, i, "out"), "bold"),
                (f" len {table.len[i]}", "dim"),
            ]
            known = table.proto[i] == "tcp" and (table.tells_tcp_flags or flags[i])
            if known and not self._style.quiet:
                parts.append((f" [{_TCP_FLAGS[flags[i]]}]", "dim"))
            parts += self._owner(table, i)
            if place := self._namespaces.name(table.netns[i]):
                parts.append((f" netns {plain(place)}", "blue"))
            if self._style.verbose:
                parts.append((self._more(table, records, i), "dim"))
            rows.append(parts)
        return rows

    def _end(self, address: str, port: int, proto: str) -> str:
        if self._style.numbers:
            return f"{address}.{port}"
        return f"{plain(self._names.host(address))}.{service(port, proto)}"

    def _domain(self, table: Columns, i: int, way: str) -> str:
        """The name that the process asked for, after the far end."""
        if not table.domain[i] or table.dir[i] != way or self._style.quiet:
            return ""
        return f" [{plain(table.domain[i])}]"

    def _translated(self, table: Columns, i: int, at: int) -> str:
        """The other address of source (0) or target (2), if NAT changes it."""
        became = table.nat[i]
        if became is None or self._style.quiet:
            return ""
        seen = (table.src[i], table.sport[i], table.dst[i], table.dport[i])
        if became[at : at + 2] == seen[at : at + 2]:
            return ""
        address, port = became[at : at + 2]
        return f" (nat {self._end(str(address), int(port), table.proto[i])})"

    def _owner(self, table: Columns, i: int) -> list[tuple[str, str]]:
        pid = table.pid[i]
        if pid is None:
            return [(f" - ({table.how[i].replace('_', ' ')})", "yellow")]
        parts = [(f" {plain(table.comm[i]) or '?'}.{pid}", "bold green")]
        process = table.process[i]
        if process is not None and not self._style.quiet:
            one = process
            if where := place(one.container, one.container_name, one.pod, one.unit):
                parts.append((f" {plain(where)}", "blue"))
        return parts

    def _more(self, table: Columns, records: np.ndarray, i: int) -> str:
        record = records[i]
        more = [f"how {table.how[i]}"]
        uid = table.uid[i]
        if uid is not None:
            name = self._names.user
            more.append(f"uid {uid}" if self._style.numbers else f"user {plain(name(uid))}")
        if table.exe[i]:
            more.append(f"exe {plain(table.exe[i])}")
        more += [name for name, bit in FLAGS.items() if record["flags"] & bit]
        if i in table.holders:
            held = ", ".join(f"{plain(str(h['comm']))}.{h['pid']}" for h in table.holders[i])
            more.append(f"held by {held}")
        if self._style.verbose > 1:
            process = table.process[i]
            if process is not None and process.cmdline:
                more.append(f"cmd {plain(process.cmdline)}")
            if process is not None and process.parents:
                above = " < ".join(f"{plain(one.comm)}.{one.pid}" for one in process.parents)
                more.append(f"started by {above}")
            if process is not None and process.container_name:
                more.append(f"container {plain(process.container)}")
            if process is not None and process.sha256:
                more.append(f"sha256 {plain(process.sha256)}")
            if process is not None and process.image:
                more.append(f"image {plain(process.image)}")
            more += [
                f"if {record['ifindex']}",
                f"netns {record['netns']}",
                f"cookie {record['cookie']:x}",
                f"segs {record['gso_segs']}",
            ]
            if record["tid"]:
                more.append(f"tid {record['tid']}")
            if record["creator"] not in (0, record["tgid"]):
                more.append(f"made by {record['creator']}")
        return f" ({', '.join(more)})"

    def _moments(self, batch: NamedBatch) -> list[str]:
        """As tcpdump: time of day; -t none, -tt Unix time, -ttt since last, -tttt date, -ttttt."""
        real = (batch.clock.real_times(batch.records["time_ns"]).view(np.int64) // 1000).tolist()
        if self._style.times == 1:
            return [""] * len(real)
        if self._style.times == 2:
            return [f"{us // 1_000_000}.{us % 1_000_000:06}" for us in real]
        if self._style.times in (3, 5):
            return [self._since(us) for us in real]
        form = "%Y-%m-%d %H:%M:%S.%f" if self._style.times == 4 else "%H:%M:%S.%f"
        return [
            datetime.fromtimestamp(us // 1_000_000, UTC)
            .replace(microsecond=us % 1_000_000)
            .astimezone()
            .strftime(form)
            for us in real
        ]

    def _since(self, us: int) -> str:
        if self._first is None:
            self._first = self._last = us
        from_us = self._last if self._style.times == 3 else self._first
        self._last = us
        sign = "-" if us < from_us else ""
        seconds, rest = divmod(abs(us - from_us), 1_000_000)
        return f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest:06}"
