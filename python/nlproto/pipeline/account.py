# SPDX-License-Identifier: MIT
"""What one reader saw, lost and named, in records; every sum closes or says that it does not.

    packets   = recorded + skipped
    records   = recorded + copies
              = delivered + lost (alloc, socket, queue, client, failed)
                + waiting (received, not yet handed on)
    delivered = named + unnamed (by reason)

Each CPU's totals come from its counters and sequences at the first and last moment known, not
from adding up gaps, so batches that arrive out of order change nothing. Not thread-safe.
"""

from dataclasses import dataclass, fields

import numpy as np

from nlproto.records.wire import HOW_NAMES, is_named, lib

__all__ = ["PLACES", "Account"]

PLACES = ("alloc", "socket", "queue", "client", "failed")
"""Where records are lost: no memory in the kernel, socket buffer, daemon's queue, slow client,
a fault of this program."""

_COPY = int(lib.SNIFFER_F_COPY)


@dataclass(slots=True)
class _Point:
    """Counters of one CPU at one moment; the names are those of struct sniffer_tail."""

    record_seq: int
    packets: int
    skipped: int
    lost: int

    def raise_to(self, other: "_Point") -> None:
        for field in fields(self):
            name = field.name
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


def _point_of(tail: np.void) -> _Point:
    return _Point(
        int(tail["record_seq"]), int(tail["packets"]), int(tail["skipped"]), int(tail["lost"])
    )


class Account:
    """One reader's account, from its first batch of each CPU, or exactly from open(tails) on."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], _Point] = {}
        self._last: dict[tuple[int, int], _Point] = {}
        self._instance = 0
        self._received = 0
        self._lost_later = {"queue": 0, "client": 0, "failed": 0}
        self._by_how = np.zeros(256, np.int64)
        self.instances = 0
        """How many module loads (or engine starts) this account spans."""
        self.gap_ms = 0
        """How long no engine recorded: how many packets passed meanwhile nobody knows."""

    def open(self, tails: np.ndarray, instance: int) -> None:
        """Begin at `tails` (TAIL array, reply to FLUSH): the first batch is the one behind them.

        Of an instance that this account knows already, what came in between is lost.
        """
        self._enter(instance)
        for tail in tails:
            key = (instance, int(tail["cpu"]))
            self._first.setdefault(key, _point_of(tail))
            self._last.setdefault(key, _point_of(tail)).raise_to(_point_of(tail))

    def gap(self, seconds: float) -> None:
        """Count a time without any engine."""
        self.gap_ms += max(1, round(seconds * 1000))

    def add(self, head: np.void, records: np.ndarray | None = None) -> None:
        """Count one batch as received; `head` is its BATCH.

        `records` makes the first batch of a CPU exact when it holds copies and there was no
        open(). Another instance than before (module loaded anew) starts afresh and adds up.
        """
        instance, cpu, count = int(head["instance"]), int(head["cpu"]), int(head["count"])
        self._enter(instance)
        key = (instance, cpu)
        point = _Point(
            int(head["record_seq"]) + count,
            int(head["packets"]),
            int(head["skipped"]),
            int(head["lost"]),
        )
        if key not in self._first:
            copies = 0 if records is None else np.count_nonzero(records["flags"] & _COPY)
            self._first[key] = _Point(
                point.record_seq - count,
                point.packets - count + int(copies),
                point.skipped,
                point.lost,
            )
            self._last[key] = point
        else:
            first = self._first[key]
            if point.record_seq - count < first.record_seq:
                # It was overtaken by the batch that the account began with.
                first.packets -= first.record_seq - (point.record_seq - count)
                first.record_seq = point.record_seq - count
            self._last[key].raise_to(point)
        self._received += count

    def close(self, tails: np.ndarray) -> None:
        """Count what was sent up to `tails` (TAIL array): what did not arrive is lost.

        A CPU of which no batch ever arrived is left out unless open() began the account.
        """
        for tail in tails:
            known = self._last.get((self._instance, int(tail["cpu"])))
            if known is not None:
                known.raise_to(_point_of(tail))

    def lose(self, place: str, records: int) -> None:
        """Count received records as lost afterwards, in "queue", "client" or "failed"."""
        self._lost_later[place] += records

    def deliver(self, hows: np.ndarray) -> None:
        """Count records by their field `how` (array of uint8) that have been handed on."""
        self._by_how += np.bincount(hows, minlength=256)

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
        """IP packets the hooks saw."""
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
        alloc = self._growth("lost")
        return {
            "alloc": alloc,
            "socket": self.records - self._received - alloc,
            **self._lost_later,
        }

    @property
    def delivered(self) -> int:
        """Records that were handed on."""
        return int(self._by_how.sum())

    @property
    def named(self) -> int:
        """Delivered records with a process."""
        return sum(n for how, n in enumerate(self._by_how.tolist()) if n and is_named(how))

    @property
    def unnamed(self) -> dict[str, int]:
        """Delivered records without a process, by reason."""
        counts = enumerate(self._by_how.tolist())
        return {HOW_NAMES[how]: n for how, n in counts if n and not is_named(how)}

    @property
    def by_how(self) -> dict[str, int]:
        """Delivered records by naming rule and by reason."""
        return {HOW_NAMES[how]: n for how, n in enumerate(self._by_how.tolist()) if n}

    @property
    def waiting(self) -> int:
        """Records received that were neither handed on nor lost yet; 0 at rest."""
        return self._received - sum(self._lost_later.values()) - self.delivered

    def closes(self) -> bool:
        """Return whether every sum is right at this moment (at rest it must be)."""
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
        """Where the stream stands: packets that the present instance saw since it began."""
        instance = self._instance
        packets = sum(point.packets for key, point in self._items() if key[0] == instance)
        return {"instance": instance, "packets": packets}

    def as_dict(self, settled: bool = False) -> dict[str, object]:
        """Return all figures, for JSON.

        `settled`: as if the records that wait were not yet received; what the worker that hands
        records on asks for, to whom everything else is either behind or still to come.
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
        """Return the account for people, one fact a line."""
        lost = self.lost
        share = 100 * self.named / self.delivered if self.delivered else 100.0
        lines = [
            f"{self.packets} packets seen = {self.recorded} recorded + {self.skipped} skipped",
            f"{self.records} records = {self.delivered} delivered + {sum(lost.values())} lost"
            + _detail(lost),
            f"{self.named} named ({share:.1f}%), {sum(self.unnamed.values())} unnamed"
            + _detail(self.unnamed),
        ]
        if self.waiting:
            lines.append(f"{self.waiting} records still waiting to be named")
        if self.instances > 1:
            lines.append(f"the engine was restarted {self.instances - 1} times in between")
        if self.gap_ms:
            lines.append(f"nothing was recorded for {self.gap_ms / 1000:.1f} s: lost, not counted")
        if not self.closes():
            lines.append("the account does not close: please report this")
        return lines


def _detail(counts: dict[str, int]) -> str:
    parts = [f"{name.replace('_', ' ')} {n}" for name, n in counts.items() if n]
    return f" ({', '.join(parts)})" if parts else ""
