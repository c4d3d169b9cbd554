# SPDX-License-Identifier: MIT
"""--summary: a table of processes at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.measure import Measurement
from rich.table import Table

from hunter.show.columns import Details, addresses
from hunter.show.console import Output
from hunter.show.text import plain
from nlproto.records import wire
from nlproto.records.batch import NamedBatch

__all__ = ["Summary", "on_the_wire"]

_MAX_PEERS, _MAX_ALL_PEERS = 10_000, 1_000_000
"""Far ends that are counted for each process, and for all."""
_MOST = 50_000
"""Processes with a row of their own. Beyond it those with fewest bytes have one together."""
_OTHERS = (0, 0, -1)


@dataclass(slots=True)
class _Sum:
    comm: str
    packets: int = 0
    bytes: int = 0
    peers: set[tuple[int, str]] = field(default_factory=set)
    """Far ends. In another network namespace an address is another host's."""
    more_peers: bool = False


def on_the_wire(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many packets each record stands for, and their bytes together."""
    segments = np.maximum(records["gso_segs"], 1).astype(np.int64)
    return segments, records["len"] + (segments - 1) * records["hdr_len"]


class Summary:
    """Packets, bytes on the wire and far ends by process."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, int], _Sum] = {}
        self._peers = 0

    def add(self, batch: NamedBatch) -> None:
        """Count the records of `batch`."""
        records = batch.records
        packets, sizes = (one.tolist() for one in on_the_wire(records))
        comms = records["comm"].tolist()
        source, target = addresses(records, "saddr"), addresses(records, "daddr")
        places = records["netns"].tolist()
        incoming = (records["dir"] == wire.lib.SNIFFER_DIR_IN).tolist()
        owners = zip(
            records["tgid"].tolist(),
            records["start_ns"].tolist(),
            records["how"].tolist(),
            strict=True,
        )
        for i, (tgid, start, how) in enumerate(owners):
            key = (tgid, start, 0) if tgid else (0, 0, how)
            one = self._sums.get(key)
            if one is None:
                name = wire.text(comms[i]) if tgid else wire.how_name(how).replace("_", " ")
                one = self._sums[key] = _Sum(name)
            one.packets += packets[i]
            one.bytes += sizes[i]
            peer = (places[i], source[i] if incoming[i] else target[i])
            if peer not in one.peers:
                one.more_peers |= len(one.peers) >= _MAX_PEERS or self._peers >= _MAX_ALL_PEERS
                if not one.more_peers:
                    one.peers.add(peer)
                    self._peers += 1
        if len(self._sums) > _MOST:
            self._join()

    def _join(self) -> None:
        others = self._sums.pop(_OTHERS, _Sum("others"))
        ordered = sorted(self._sums, key=lambda key: self._sums[key].bytes)
        for key in ordered[: len(ordered) - _MOST * 3 // 4]:
            gone = self._sums.pop(key)
            others.packets += gone.packets
            others.bytes += gone.bytes
            others.more_peers |= bool(gone.peers)
            self._peers -= len(gone.peers)
        self._sums[_OTHERS] = others

    def figures(self) -> Mapping[tuple[int, int, int], tuple[str, int, int, int]]:
        """Return (name, packets, bytes, far ends) by (tgid, start_ns, 0) or (0, 0, how)."""
        return {
            key: (one.comm, one.packets, one.bytes, len(one.peers))
            for key, one in self._sums.items()
        }

    def show(self, details: Details, to_output: bool) -> None:
        """Print the table, most bytes first, to standard output or standard error."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("pid", "packets", "bytes", "far ends"):
            table.add_column(name, justify="right")
        table.add_column("process")
        table.add_column("executable")
        sums = sorted(self._sums.items(), key=lambda one: -one[1].bytes)
        for (tgid, start, _), one in sums:
            process = details.get(tgid, start) if tgid else None
            table.add_row(
                str(tgid or "-"),
                f"{one.packets:,}",
                f"{one.bytes:,}",
                f"{len(one.peers):,}{'+' * one.more_peers}",
                plain(one.comm),
                plain(process.exe) if process else "",
            )
        console = Output(stderr=not to_output)
        wanted = Measurement.get(console, console.options.update(max_width=500), table)
        if not console.is_terminal:
            console.width = max(console.width, wanted.maximum)  # a file has no edge to wrap at
        console.print(table)
