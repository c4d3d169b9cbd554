# SPDX-License-Identifier: MIT
"""What one reader saw, lost and named, in records. Every sum closes, or says that it does not.

    packets   = recorded + skipped
    records   = recorded + copies
              = delivered + lost (alloc, missed, socket, queue, client, failed)
                + waiting (received, not yet handed on)
    delivered = named + unnamed (by reason)

Each CPU's totals come from its counters and sequences at the first and the last known moment. Gaps
are not added up, so batches out of order change nothing. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from nlproto.pipeline import figures
from nlproto.records.wire import BATCH, HOW_NAMES, NO_CPU, TAIL, lib

__all__ = ["PLACES", "Account"]

PLACES = ("alloc", "missed", "socket", "queue", "client", "failed")
"""Where records are lost: in the kernel for lack of memory, in engine ebpf when a program was
skipped, in the socket's buffer, in the daemon's queue, by a slow client, by a fault of this
program."""

_COPY = int(lib.SNIFFER_F_COPY)


@dataclass(slots=True)
class _Point:
    """Counters of one CPU at one moment; the names are those of struct sniffer_tail."""

    record_seq: int
    packets: int
    skipped: int

    def raise_to(self, record_seq: int, packets: int, skipped: int) -> None:
        if record_seq > self.record_seq:
            self.record_seq = record_seq
        if packets > self.packets:
            self.packets = packets
        if skipped > self.skipped:
            self.skipped = skipped


_Counts = tuple[int, int, int, int]
"""record_seq, packets, skipped, lost."""
_counts_of_tail: Callable[[Any], _Counts] = itemgetter(
    *map((TAIL.names or ()).index, ("record_seq", "packets", "skipped", "lost"))
)
_of_head: Callable[[Any], tuple[int, int, int, int, int, int, int]] = itemgetter(
    *map(
        (BATCH.names or ()).index,
        ("instance", "cpu", "count", "record_seq", "packets", "skipped", "lost"),
    )
)


class Account:
    """One reader's account, from the first batch of each CPU, or exactly from open(tails)."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], _Point] = {}
        self._last: dict[tuple[int, int], _Point] = {}
        self._unmade: dict[tuple[int, int, str], tuple[int, int]] = {}
        """First and last `lost` of each CPU. Each group has its own."""
        self._instance = 0
        self._received = 0
        self._lost_later = {"queue": 0, "client": 0, "failed": 0}
        self._by_how = np.zeros(256, np.int64)
        self.instances = 0
        """How many loads of the module (or starts of the engine) this account spans."""
        self.gap_ms = 0
        """How long no engine recorded. Nobody knows how many packets passed meanwhile."""

    def open(self, tails: np.ndarray, instance: int, group: str = "packets") -> None:
        """Begin at `tails` (TAIL array, reply to FLUSH); the first batch comes after them.

        If the account knows the instance already, the records in between count as lost.
        """
        self._enter(instance)
        for tail in tails:
            key = (instance, int(tail["cpu"]))
            record_seq, packets, skipped, lost = _counts_of_tail(tail.item())
            counts = record_seq, packets, skipped
            self._first.setdefault(key, _Point(*counts))
            self._last.setdefault(key, _Point(*counts)).raise_to(*counts)
            self._lack(key, group, lost)

    def go_over(self, tails: np.ndarray, instance: int, group: str) -> None:
        """Go on from `tails` with the batches of another group; `tails` are that group's.

        Records have the same sequence in all groups. Each group has its own `lost`.
        """
        for tail in tails:
            key = (instance, int(tail["cpu"]), group)
            first, last = self._unmade.get(key, (0, 0))
            self._unmade[key] = first + int(tail["lost"]) - last, int(tail["lost"])

    def gap(self, seconds: float) -> None:
        """Add a time without any engine."""
        self.gap_ms += max(1, round(seconds * 1000))

    def add(
        self,
        head: np.void,
        records: np.ndarray | None = None,
        count: int | None = None,
        group: str = "packets",
    ) -> None:
        """Count one batch as received; `head` is its BATCH, `count` its records if they are sums.

        `records` makes the first batch of a CPU exact if it holds copies and there was no open(). A
        new instance (the module was loaded again) is added to the old one's figures.
        """
        instance, cpu, held, seq, packets, skipped, lost = _of_head(head.item())
        count = held if count is None else count
        self._enter(instance)
        key = (instance, cpu)
        self._lack(key, group, lost)
        first = self._first.get(key)
        if first is None:
            copies = 0 if records is None else np.count_nonzero(records["flags"] & _COPY)
            self._first[key] = _Point(seq, packets - count + int(copies), skipped)
            self._last[key] = _Point(seq + count, packets, skipped)
        else:
            if seq < first.record_seq:
                # The batch with which the account began has overtaken it.
                first.packets -= first.record_seq - seq
                first.record_seq = seq
            self._last[key].raise_to(seq + count, packets, skipped)
        self._received += count

    def _lack(self, key: tuple[int, int], group: str, lost: int) -> None:
        first, last = self._unmade.get((*key, group), (lost, lost))
        self._unmade[*key, group] = first, max(last, lost)

    def close(self, tails: np.ndarray, group: str = "packets") -> None:
        """Count what was sent up to `tails` (TAIL array). What did not arrive is lost.

        A CPU without any batch is left out, unless open() began the account.
        """
        for tail in tails:
            key = (self._instance, int(tail["cpu"]))
            known = self._last.get(key)
            if known is not None:
                record_seq, packets, skipped, lost = _counts_of_tail(tail.item())
                known.raise_to(record_seq, packets, skipped)
                self._lack(key, group, lost)

    def lose(self, place: str, records: int) -> None:
        """Count received records that are lost since, in "queue", "client" or "failed"."""
        self._lost_later[place] += records

    def deliver(self, hows: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Count delivered records by their field `how` (array of uint8).

        `counts`: how many records each stands for.
        """
        self._by_how += np.bincount(hows, counts, 256).astype(np.int64)

    def _enter(self, instance: int) -> None:
        if instance != self._instance:
            self._instance = instance
            self.instances += 1

    def _growth(self, name: str) -> int:
        first = self._first
        return sum(getattr(last, name) - getattr(first[key], name) for key, last in self._items())

    def _items(self) -> list[tuple[tuple[int, int], _Point]]:
        return list(self._last.items())

    @property
    def packets(self) -> int:
        """IP packets that the hooks saw."""
        return self._growth("packets")

    @property
    def skipped(self) -> int:
        """Of these: not recorded (later fragments, truncated, other protocols)."""
        return self._growth("skipped")

    @property
    def recorded(self) -> int:
        """Of these: with at least one record."""
        return self.packets - self.skipped

    @property
    def records(self) -> int:
        """Records the kernel made or should have made."""
        return self._growth("record_seq")

    @property
    def copies(self) -> int:
        """Further records of packets with several receivers."""
        return self.records - self.recorded

    @property
    def lost(self) -> dict[str, int]:
        """Lost records by place."""
        unmade = {True: 0, False: 0}
        for (_, cpu, _), (first, last) in self._unmade.items():
            unmade[cpu == NO_CPU] += last - first
        return {
            "alloc": unmade[False],
            "missed": unmade[True],
            "socket": self.records - self._received - sum(unmade.values()),
            **self._lost_later,
        }

    @property
    def delivered(self) -> int:
        """Records that were handed on."""
        return int(self._by_how.sum())

    @property
    def named(self) -> int:
        """Delivered records with a process."""
        return figures.named(self._by_how)

    @property
    def unnamed(self) -> dict[str, int]:
        """Delivered records without a process, by reason."""
        return figures.unnamed(self._by_how)

    @property
    def by_how(self) -> dict[str, int]:
        """Delivered records by naming rule and by reason."""
        return {HOW_NAMES[how]: n for how, n in enumerate(self._by_how.tolist()) if n}

    @property
    def waiting(self) -> int:
        """Records received, but neither delivered nor lost yet; 0 at rest."""
        return self._received - sum(self._lost_later.values()) - self.delivered

    def closes(self) -> bool:
        """Return whether every sum is right now. At rest it must be."""
        return self.waiting == 0 and self._adds_up()

    def _adds_up(self) -> bool:
        lost = self.lost
        return (
            self.waiting >= 0
            and all(n >= 0 for n in lost.values())
            and self.recorded >= 0
            and self.copies >= 0
            and self.records == self.delivered + sum(lost.values()) + self.waiting
        )

    @property
    def position(self) -> dict[str, int]:
        """Position of the stream: packets that the present instance has seen since it began."""
        instance = self._instance
        packets = sum(point.packets for key, point in self._items() if key[0] == instance)
        return {"instance": instance, "packets": packets}

    def as_dict(self, settled: bool = False) -> dict[str, object]:
        """Return all figures, for JSON.

        `settled`: leave out waiting records. The worker uses it, because for the worker a record is
        either delivered or still to come.
        """
        later = self.waiting if settled else 0
        position = self.position
        position["packets"] -= later
        return {
            "packets": self.packets - later,
            "recorded": self.recorded - later,
            "skipped": self.skipped,
            "copies": self.copies,
            "records": self.records - later,
            "delivered": self.delivered,
            "lost": self.lost,
            "named": self.named,
            "unnamed": self.unnamed,
            "by_how": self.by_how,
            "waiting": self.waiting - later,
            "instances": self.instances,
            "gap_ms": self.gap_ms,
            "position": position,
            "closes": self._adds_up() and self.waiting == later,
        }

    def lines(self) -> list[str]:
        """Return the account for people, one fact in a line."""
        lines = [
            f"{self.packets} packets seen = {self.recorded} recorded + {self.skipped} skipped",
            figures.delivery(self.records, self.delivered, self.lost),
            figures.naming(self.delivered, "delivered", self.unnamed),
        ]
        if self.waiting:
            lines.append(f"{self.waiting} records still waiting to be named")
        if self.instances > 1:
            lines.append(f"the engine was restarted {self.instances - 1} times in between")
        if self.gap_ms:
            lines.append(figures.gap(self.gap_ms))
        if not self.closes():
            lines.append("the account does not close: please report this")
        return lines
