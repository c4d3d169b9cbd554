# SPDX-License-Identifier: MIT
"""Engine `ebpf`: does the work of sniffer.ko by programs that the kernel verifies (bpf/).

The README's table of engines says what it cannot do. The programs are attached while the engine is
open. They end with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import select
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from nlproto.engines.bpf_programs import CGROUP, NEEDED, TRACED, load_programs
from nlproto.engines.links import NetfilterLinks, open_links
from nlproto.host import netns
from nlproto.kernel.bpf import NoBpf, Ring, possible_cpus, root_cgroup
from nlproto.records import wire
from nlproto.records.clock import Clock
from nlproto.records.process_event import Event, ProcessEvent, decode_process
from nlproto.records.wire import (
    NO_CPU,
    PROCESS,
    Batch,
    FirstBytesBatch,
    PacketBytes,
    lib,
)
from nlproto.running.descriptors import Wakeup

__all__ = ["EbpfEngine"]

RING_BYTES = 16 << 20
_CPUS = 1024  # as in bpf/hunter.h
_BATCH = 60000  # records; a head can count 65535
_LONGEST = 1.0  # s of a read: until then a few events of processes wait
_POLL = 0.02  # s. The programs wake the reader only for the first record after a pause
_LATE = 0.2  # s that a record may take from its number to its place in the ring
_COLLECT = 1.0  # s between two sweeps
# The time between two sweeps is at least this many times the last one's,
_COLLECT_SHARE, _QUIET_SHARE = 50, 500
# and the second one if fewer records came since, all sockets had room, and no io_uring drops files
_QUIET = 1000

_SNAP_BYTES = 4 << 20  # as in bpf/snap.h
_SNAP = np.dtype([("head", wire.SNAP), ("data", f"S{lib.SNIFFER_SNAP_LEN}")])
_NEWS_BYTES = 128 << 10  # as in bpf/events.h
_NEWS = np.dtype([("time_ns", "u8"), ("start_ns", "u8"), ("tgid", "u4"), ("event", "u4")])
_COUNTERS = np.dtype(
    [
        (name, "u8")
        for name in ("seq", "copies", "skipped", "lost", "full", "woken", "calls", "told")
    ]
    + [(name, "u8") for name in ("events_lost", "linked", "linked_calls", "doubt")]
    + [("unused", "u8", 4)]  # what programs remember for themselves
)
_BYTES = "bytes_"  # programs of a cgroup that run only while somebody wants first bytes
# Called for incoming packets. Each has a second program, or does no harm when it is skipped.
_TWICE = {"in_filter", "in_filter_again", "in_queue4", "in_queue6"}


@dataclass(slots=True)
class _Cpu:
    """How far one processor's stream is. Sequences are whole, not of 32 bits."""

    first: int
    lost_before: int
    got: int = 0
    end: int = 0
    held: np.ndarray = field(default_factory=lambda: np.zeros(0, wire.RECORD))
    held_since: float = 0.0


class _Sweep(NamedTuple):
    at: float
    took: float
    records: int
    full: int


class EbpfEngine:
    """See nlproto.engines.engine.Engine. Raises NoBpf, which says what is missing here."""

    name = "ebpf"
    group = "packets"
    awaited: Callable[[], bool]

    def __init__(
        self,
        notify: Callable[[str], None],
        *,
        ring_bytes: int = RING_BYTES,
        finder: netns.Finder | None = None,
    ) -> None:
        self._notify = notify
        self.instance = time.time_ns()
        self.closing: np.ndarray = np.zeros(0, wire.TAIL)
        began = time.monotonic()
        parts, self._object = load_programs(ring_bytes)
        self.whole = not parts
        self._links: NetfilterLinks | None = None
        self._wakeup = Wakeup()
        try:
            self._map(ring_bytes)
            self._attach()
            self._links = open_links(self._object, finder)
            self.loaded_in = time.monotonic() - began
            self._object.iterate("seed")
        except OSError as error:
            self._close()
            raise NoBpf(f"its programs do not run here ({error.strerror})") from error
        except BaseException:
            self._close()
            raise
        self.opening = np.zeros(0, wire.TAIL)
        self._netns = netns.own(Path("/proc"))
        self._batch_seq = 0
        self._until: dict[int, int] = {}
        self._look_again = time.monotonic() + _COLLECT
        self._swept = _Sweep(time.monotonic(), 0.0, 0, 0)
        self._busy_until = 0.0
        self._most_missed = 0
        self.begin()
        if parts:
            notify(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._links is not None:
            self._links.close()
        self._object.close()
        self._wakeup.close()

    # The object

    def _map(self, ring_bytes: int) -> None:
        shared = mmap.MAP_SHARED
        fd = self._object.map_fd("ring")
        self._ring = Ring(fd, ring_bytes, wire.RECORD)
        self._first_bytes_ring = Ring(self._object.map_fd("snaps"), _SNAP_BYTES, _SNAP)
        self._news_ring = Ring(self._object.map_fd("events"), _NEWS_BYTES, _NEWS)
        wishes = mmap.mmap(self._object.map_fd("wishes"), mmap.PAGESIZE, shared)
        self._wish = np.frombuffer(wishes, "u8", 1)
        counters = mmap.mmap(
            self._object.map_fd("cpus"), _CPUS * _COUNTERS.itemsize, shared, mmap.PROT_READ
        )
        self._counters = np.frombuffer(counters, _COUNTERS)[: possible_cpus()]
        self._poll = select.poll()
        for one in (fd, self._object.map_fd("events")):
            self._poll.register(one, select.POLLIN)
        self._wakeup.register(self._poll)

    def _attach(self) -> None:
        self._attached: list[str] = []
        self._refused: list[str] = []
        self._reads_bytes = [name for name in self._object.programs if name.startswith(_BYTES)]
        with root_cgroup() as root:
            for name, program in self._object.programs.items():
                cgroup = program.section.startswith(CGROUP)
                body = name.startswith("body_")  # called by other programs
                traced = program.section.startswith(TRACED) and not body
                if program.fd < 0 or name in self._reads_bytes or not (cgroup or traced):
                    continue
                try:
                    self._object.attach(name, root if cgroup else None)
                except OSError as error:
                    function = program.section.partition("/")[2]
                    if function in NEEDED or (cgroup and not self.whole):
                        raise NoBpf(
                            f"the kernel does not let {function} be watched: {error.strerror}"
                        ) from error
                    self._refused.append(function)
                else:
                    self._attached.append(name)

    # The stream

    def _take(self) -> np.ndarray:
        """Return the complete records of the ring, copied, in the ring's order."""
        records = self._ring.take()
        if not self.whole:
            records["netns"][records["netns"] == 0] = self._netns
        return records

    def _batches(self, records: np.ndarray) -> Iterator[Event]:
        yield from self._processes()
        if self._wish[0]:
            yield from self._first_bytes()
        numbers = np.unique(records["cpu"]).tolist()
        numbers += [n for n, one in self._cpus.items() if len(one.held) and n not in numbers]
        for number in numbers:
            mine = records[records["cpu"] == number]
            yield from self._batches_of(number, self._cpus[number], mine)

    def _batches_of(self, number: int, cpu: _Cpu, records: np.ndarray) -> Iterator[Batch]:
        if len(cpu.held):
            records = np.concatenate((cpu.held, records))
            cpu.held = records[:0]
        # a signed difference of 32 bits: late ones lie before the end
        steps = (records["seq"] - np.uint32(cpu.end & 0xFFFFFFFF)).astype(np.int32)
        order = np.argsort(steps, kind="stable")
        records, places = records[order], cpu.end + steps[order].astype(np.int64)
        inside = places >= cpu.first
        if number in self._until:
            inside &= places < self._until[number]
        records, places = records[inside], places[inside]
        if not len(records):
            return
        counters = self._counters[number]
        end = max(cpu.end, int(places[-1]) + 1)
        missing = end - cpu.first - cpu.got - len(records)
        if missing > int(counters["lost"]) - cpu.lost_before:
            # one has a number, but is not in the ring yet
            now = time.monotonic()
            cpu.held_since = cpu.held_since or now
            if now - cpu.held_since < _LATE:
                cpu.held = records
                return
        cpu.held_since = 0.0
        cpu.end = end
        cpu.got += len(records)
        lost = cpu.lost_before + end - cpu.first - cpu.got
        for at in range(0, len(records), _BATCH):
            some = records[at : at + _BATCH]
            behind = len(records) - at - len(some)
            yield Batch(self._head(number, end - behind, len(some), lost, counters), some)

    def _head(self, number: int, end: int, count: int, lost: int, counters: np.void) -> np.void:
        clock, mono = Clock.now(), time.monotonic_ns()
        heads = np.zeros(1, wire.BATCH)
        heads["version"] = lib.SNIFFER_VERSION
        heads["record_size"] = wire.RECORD.itemsize
        heads["cpu"] = number
        heads["count"] = count
        heads["instance"] = self.instance
        heads["batch_seq"] = self._batch_seq
        heads["record_seq"] = end - count
        heads["packets"] = max(0, end - int(counters["copies"])) + int(counters["skipped"])
        heads["skipped"] = counters["skipped"]
        heads["lost"] = lost
        heads["mono_ns"] = mono
        heads["real_ns"] = clock.real_ns(mono)
        heads["boot_ns"] = clock.boot_ns(mono)
        self._batch_seq += 1
        head: np.void = heads[0]
        return head

    def read(self, timeout: float) -> Iterator[Event]:
        """See Engine."""
        timeout = min(timeout, _LONGEST)
        self._collect()
        records = self._take()
        if not len(records) and not any(len(cpu.held) for cpu in self._cpus.values()):
            now = time.monotonic()
            longest = min(timeout, _POLL) if now < self._busy_until else timeout
            for ready, _ in self._poll.poll(math.ceil(1000 * longest)):
                self._wakeup.clear(ready)
            records = self._take()
        if len(records):
            self._busy_until = time.monotonic() + 10 * _POLL
        yield from self._batches(records)

    def _processes(self) -> Iterator[ProcessEvent]:
        """Yield process events. Processes older than the engine are left to /proc."""
        for time_ns, start_ns, tgid, kind in self._news_ring.take().tolist():
            key = struct.pack("=QII", start_ns, tgid, 0)
            found = self._object.lookup("abouts", key, PROCESS.itemsize)
            if found is not None:
                event = replace(decode_process(found), time_ns=time_ns, event=kind)
                # kept since its exec: later names came with its records
                yield replace(event, comm="") if kind == lib.SNIFFER_EVENT_EXIT else event

    def _first_bytes(self) -> Iterator[FirstBytesBatch]:
        """Return the first bytes that are there; they may come a little after their record."""
        found = self._first_bytes_ring.take()
        if len(found):
            heads, data = found["head"], found["data"]
            packets = zip(heads, data.tolist(), heads["caplen"].tolist(), strict=True)
            size = lib.SNIFFER_SNAP_LEN
            head: np.void = np.zeros(1, wire.BATCH)[0]
            yield FirstBytesBatch(
                head,
                tuple(
                    PacketBytes(first, one.ljust(size, b"\0")[:caplen])
                    for first, one, caplen in packets
                ),
            )

    def _collect(self) -> None:
        """Remove from the kernel's tables what ended long enough ago."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + _COLLECT
        if self._links is not None:
            self._links.look()
        records, full = (int(self._counters[name].sum()) for name in ("seq", "full"))
        last = self._swept
        quiet = records - last.records < _QUIET and full == last.full
        quiet &= int(self._counters["doubt"].max()) < last.at * 1e9
        if now - last.at < last.took * (_QUIET_SHARE if quiet else _COLLECT_SHARE):
            return
        began = time.monotonic()
        self._object.programs["collect"].run()
        self._swept = _Sweep(began, time.monotonic() - began, records, full)

    def wake(self) -> None:
        """See Engine."""
        self._wakeup.wake()

    def want_first_bytes(self, wanted: bool) -> bool:
        """See Engine."""
        if wanted != bool(self._wish[0]):
            self._attach_readers(wanted)
        self._wish[0] = wanted
        return True

    def _attach_readers(self, wanted: bool) -> None:
        """Read the first bytes of fragmented packets, which nothing else delivers."""
        if not wanted:
            for name in self._reads_bytes:
                self._object.detach(name)
            return
        with contextlib.suppress(OSError, NoBpf), root_cgroup() as root:
            for name in self._reads_bytes:
                self._object.attach(name, root)

    def want_packets(self, wanted: bool) -> None:
        """Do nothing: this engine has no sums of flows."""

    def _missed(self) -> int:
        """Return for how many packets the kernel skipped a program that would interrupt itself.

        Outgoing packets have two programs on each way. One is missed only if both were skipped, and
        no Netfilter link reports it.
        """
        linked = int(self._counters["linked"].sum()) - int(self._counters["linked_calls"].sum())
        calls = int(self._counters["calls"].sum()) - max(0, linked)
        missed = sum(
            program.figures()[0]
            for name, program in self._object.programs.items()
            if name in self._attached
            and name.startswith(("out_", "in_", "end_"))
            and name not in _TWICE
        )
        # read last: a packet that passes meanwhile is counted the next time
        untold = calls + missed - int(self._counters["told"].sum())
        self._most_missed = max(self._most_missed, untold)
        return self._most_missed

    def _position(self) -> np.ndarray:
        """Return how far each processor is, as TAIL. The last row only counts missed packets."""
        counters = self._counters.copy()
        last = np.zeros(1, wire.TAIL)
        last["cpu"] = NO_CPU
        last["record_seq"] = last["packets"] = last["lost"] = self._missed() if self.whole else 0
        tails = np.zeros(len(counters), wire.TAIL)
        tails["cpu"] = np.arange(len(counters))
        tails["batch_seq"] = self._batch_seq
        tails["record_seq"] = counters["seq"]
        tails["packets"] = counters["seq"] - counters["copies"] + counters["skipped"]
        tails["skipped"] = counters["skipped"]
        tails["lost"] = counters["lost"]
        return np.concatenate((tails, last))

    def begin(self) -> int:
        """See Engine."""
        self.opening = self._position()
        self._until = {}
        self._cpus = {
            int(tail["cpu"]): _Cpu(
                int(tail["record_seq"]), int(tail["lost"]), end=int(tail["record_seq"])
            )
            for tail in self.opening
        }
        return time.monotonic_ns()

    def finish(self, until_ns: int | None = None) -> Iterator[Event]:
        """See Engine."""
        tails = self._position()
        self._until = {int(tail["cpu"]): int(tail["record_seq"]) for tail in tails}
        for event in self._up_to(tails):
            if until_ns is not None and isinstance(event, Batch):
                yield _cut(event, until_ns, tails)
            else:
                yield event
        self.closing = tails

    def catch_up(self) -> Iterator[Event]:
        """See Engine."""
        tails = self._position()
        yield from self._up_to(tails)
        self.closing = tails

    def _up_to(self, tails: np.ndarray) -> Iterator[Event]:
        deadline = time.monotonic() + 2 * _LATE
        while True:
            yield from self._batches(self._take())
            if self._arrived(tails) or time.monotonic() > deadline:
                break
            time.sleep(0.001)

    def _arrived(self, tails: np.ndarray) -> bool:
        """Return whether everything up to `tails` was read, or is known to be lost."""
        return all(
            int(tail["record_seq"]) - cpu.first - cpu.got <= int(tail["lost"]) - cpu.lost_before
            for tail in tails
            if (cpu := self._cpus[int(tail["cpu"])])
        )

    def stats(self) -> dict[str, object]:
        """See Engine."""
        counters = self._counters.copy()
        programs = [p for p in self._object.programs.values() if p.fd >= 0]
        figures = [program.figures() for program in programs]
        total = {name: int(counters[name].sum()) for name in ("seq", "copies", "skipped", "lost")}
        return {
            "engine": self.name,
            "instance": self.instance,
            "packets": total["seq"] - total["copies"] + total["skipped"],
            "skipped": total["skipped"],
            "records": total["seq"],
            "lost_ring": total["lost"],
            "lost_missed": self._missed() if self.whole else 0,
            "table_full": int(counters["full"].sum()),
            "events_lost": int(counters["events_lost"].sum()),
            "programs": len(self._attached),
            "programs_refused": self._refused,
            "namespaces_linked": 0 if self._links is None else len(self._links),
            "misses": sum(misses for misses, _ in figures),
            "verified_instructions": sum(verified for _, verified in figures),
            "whole": self.whole,
            "loaded_in_s": round(self.loaded_in, 3),
        }


def _cut(batch: Batch, until_ns: int, tails: np.ndarray) -> Batch:
    """Leave out what another engine reports; `tails` then do not count it."""
    late = batch.records["time_ns"] >= until_ns
    count = int(np.count_nonzero(late))
    if not count:
        return batch
    copies = int(np.count_nonzero(batch.records["flags"][late] & lib.SNIFFER_F_COPY))
    tail = tails[tails["cpu"] == batch.head["cpu"]]
    tail["record_seq"] -= count
    tail["packets"] -= count - copies
    tails[tails["cpu"] == batch.head["cpu"]] = tail
    head: np.void = batch.head.copy()
    head["count"] -= count
    head["packets"] = tail["packets"][0]
    return Batch(head, batch.records[~late])
