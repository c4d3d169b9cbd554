# SPDX-License-Identifier: MIT
"""Processes by identity (tgid, start_ns): what the kernel and /proc say of them, bounded."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nlproto.host import cgroups, procfs
from nlproto.host.containers import ContainerFiles
from nlproto.host.procfs import TICK_NS, Parent, same_start
from nlproto.records.ends import Ends, NoEnds
from nlproto.records.process_event import ProcessEvent, command_line
from nlproto.records.wire import CUT, bounded, lib, taken, text
from nlproto.running.supervise import Failures
from nlproto.tables.column_table import mix, random_seed
from nlproto.tables.flows import first_of_processes
from nlproto.tables.shares import NOBODY, Payers, surplus

__all__ = ["ProcessKey", "Process", "Processes", "process_of_event"]

ProcessKey = tuple[int, int]
"""(tgid, start_ns) in the initial pid namespace."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process; empty or None where nothing is known. Strings are harmless JSON text."""

    tgid: int
    start_ns: int
    comm: str = ""
    ppid: int | None = None
    uid: int | None = None
    user: str = ""
    exe: str = ""
    cmdline: str = ""
    cgroup: str = ""
    cgroup_id: int = 0
    unit: str = ""
    container: str = ""
    container_name: str = ""
    image: str = ""
    pod: str = ""
    """As the container's runtime calls them (nlproto.host.containers)."""
    parents: tuple[Parent, ...] = ()
    """Who started it, and who started that one, up to init: when it was first seen."""
    sha256: str = ""
    """Of its program, where the daemon was told to look (nlproto.host.hashes)."""
    pidns: int = 0
    ns_tgid: int = 0
    exit_ns: int | None = None
    """CLOCK_MONOTONIC of its exit, None while it lives or when nobody told."""

    @property
    def key(self) -> ProcessKey:
        """(tgid, start_ns): who it is, also when its pid is used again."""
        return self.tgid, self.start_ns


_SETTLED_NS = 2_000_000_000
"""A process changes its program, user and cgroup soon after its start: read again at this age."""

_NEVER = sys.maxsize
_NAMED = ("tgid", "start_ns", "uid", "comm")
_text = functools.lru_cache(4096)(text)

ReadDetails = Callable[[int, int], Any]
"""(pid, start_ns) -> an object with some of Process's attributes, or None when it is gone."""

_KERNEL = ("comm", "exe", "ppid", "uid", "cgroup_id", "pidns", "ns_tgid")
_CGROUP = ("cgroup", "unit", "container")
"""What /proc tells better while the process lives: it may have moved, or be on v1."""
_NAMES = ("container_name", "image", "pod")
_PROC = ("exe", "cmdline", "user", "cgroup", "unit", "container", "ppid", "parents", *_NAMES)
_FIRST = ("cmdline", "ppid", "parents")
"""What it was started with and by; it may rewrite the one, and outlive the other."""


def process_of_event(event: ProcessEvent, cmdline: str = "program") -> Process:
    """The Process that an event is about; `cmdline` as for procfs.details()."""
    place = cgroups.NOWHERE
    if event.cgroup:
        place = cgroups.place_of(os.fsdecode(event.cgroup), cgroups.only_root_makes(""))
    return Process(
        tgid=event.tgid,
        start_ns=event.start_ns,
        comm=event.comm,
        ppid=event.ppid or None,
        uid=event.uid,
        exe=event.exe,
        cmdline=command_line(event.args, cmdline, event.args_len),
        cgroup=bounded(event.cgroup),
        cgroup_id=event.cgroup_id,
        unit=bounded(os.fsencode(place.unit)),
        container=bounded(os.fsencode(place.container)),
        parents=tuple(Parent(pid, comm) for pid, comm in event.parents),
        pidns=event.pidns,
        ns_tgid=event.ns_tgid,
        exit_ns=event.time_ns if event.event == lib.SNIFFER_EVENT_EXIT else None,
    )


_BYTES_EACH = 2048
"""Memory for one process on average; most need 800 bytes, the longest strings far more."""
_BYTES_LEAST = 1 << 20
_STRINGS = (
    *("comm", "user", "exe", "cmdline", "cgroup", "unit", "container"),
    *_NAMES,
)
_FIXED = 500  # bytes of a Process and its places in the tables, without the strings
_PARENT_BYTES = 150


class Processes:
    """The processes seen, at most `limit` in at most `max_bytes` of memory. Thread-safe.

    When full, the payer with most of them gives. Of its programs the one with most does, of
    that the least recently used (nlproto.tables.shares). `details` reads /proc and is asked
    once per process and once more after an exec. `cmdline`: what to keep of command lines that
    the kernel tells, as for procfs.details(). `on_change` is called, without the lock, for
    each process that is new or changed.
    """

    def __init__(
        self,
        details: ReadDetails | None = None,
        limit: int = 65536,
        on_change: Callable[[Process], None] | None = None,
        payers: Payers | None = None,
        containers: ContainerFiles | None = None,
        cmdline: str = "program",
    ) -> None:
        self.ends: Ends = NoEnds()
        """What is known of the far ends of these processes' packets."""
        self._details = details
        self._containers = containers
        self._payers = payers
        self._cmdline = cmdline
        self._lock = threading.Lock()
        self._seed = random_seed()
        self._table: OrderedDict[ProcessKey, Process] = OrderedDict()
        self._newest: dict[int, int] = {}
        self._read: dict[ProcessKey, int] = {}
        """Whose details were read, and when they are due again in CLOCK_BOOTTIME ns."""
        self._failures = Failures("details of a process")
        self.limit = limit
        self.max_bytes = max(_BYTES_LEAST, limit * _BYTES_EACH)
        self.bytes = 0
        self.on_change = on_change
        self.evicted = 0
        self.hash: Callable[[int, int, str], None] | None = None
        """Asks for a program's hash, by (tgid, start_ns, exe); answered by hashed()."""

    def __len__(self) -> int:
        return len(self._table)

    def get(self, tgid: int, start_ns: int) -> Process | None:
        """Return what is known of a process, None if nothing is."""
        table = self._table
        return table.get((tgid, start_ns)) or table.get((tgid, self.start_of(tgid, start_ns)))

    def start_of(self, tgid: int, start_ns: int) -> int:
        """The start time by which this process is known already, else `start_ns`.

        /proc tells it in clock ticks, the module in ns; they are one process when ticks agree.
        """
        known = self._newest.get(tgid)
        if known is None or (known % TICK_NS and start_ns % TICK_NS):
            return start_ns
        return known if same_start(known, start_ns // TICK_NS) else start_ns

    def get_many(self, keys: Iterable[ProcessKey]) -> list[Process]:
        """Those of `keys` that are known."""
        table = self._table
        return [found for key in keys if (found := table.get(key)) is not None]

    def find(self, pid: int | None = None, name: str | None = None) -> list[Process]:
        """Known processes by pid or by comm, newest start first."""
        with self._lock:
            everything = list(self._table.values())
        found = [
            process
            for process in everything
            if (pid is None or process.tgid == pid) and (name is None or process.comm == name)
        ]
        return sorted(found, key=lambda process: -process.start_ns)

    def add_event(self, event: ProcessEvent) -> Process:
        """Take an event: first use, exec, rename, exit or dump."""
        told = process_of_event(event, self._cmdline)
        kind = event.event
        key = told.key
        known = self._known(*key)
        if kind == lib.SNIFFER_EVENT_EXEC:
            self._read.pop(key, None)
            known = None
        if known is None:
            process = told
        else:
            names = _KERNEL if known.cgroup else (*_KERNEL, *_CGROUP)
            values = {name: getattr(told, name) for name in names if getattr(told, name)}
            values |= {name: getattr(known, name) or getattr(told, name) for name in _FIRST}
            process = replace(known, exit_ns=told.exit_ns or known.exit_ns, **values)
        if kind != lib.SNIFFER_EVENT_EXIT:
            process = self._with_details(process)
        self._keep(process)
        return process

    def add_records(self, records: np.ndarray) -> None:
        """Learn of the processes that named RECORDs mention and that are not known yet."""
        first = taken(records, first_of_processes(records, self._seed))
        names = zip(*(first[name].tolist() for name in _NAMED), strict=True)
        with self._lock:
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            unknown = [one for one in names if not self._is_as_known(now, *one)]
        for tgid, start_ns, uid, comm in unknown:
            known = self._known(tgid, start_ns)
            if known is None:
                process = Process(tgid=tgid, start_ns=start_ns, comm=_text(comm), uid=uid)
            else:
                process = replace(known, comm=_text(comm)) if comm else known
                self._read.pop(known.key, None)
            self._keep(self._with_details(process))

    def _known(self, tgid: int, start_ns: int) -> Process | None:
        """What is known of a process; one that /proc told of gets its exact start time."""
        known_ns = self.start_of(tgid, start_ns)
        if known_ns == start_ns or known_ns % TICK_NS:
            return self._table.get((tgid, known_ns))
        with self._lock:
            known = self._table.pop((tgid, known_ns), None)
            if known is None:
                return None
            self.bytes -= _size(known)
            exact = replace(known, start_ns=start_ns)
            if known.key in self._read:
                self._read[exact.key] = self._read.pop(known.key)
            self._put(exact)
            self._newest[tgid] = start_ns
        return exact

    def _is_as_known(self, now_ns: int, tgid: int, start_ns: int, uid: int, comm: bytes) -> bool:
        """Whether nothing is new; then the process has been used. With the lock."""
        key = tgid, start_ns if start_ns % TICK_NS else self.start_of(tgid, start_ns)
        known = self._table.get(key)
        if known is None or (comm and known.comm != _text(comm)):
            return False
        if self._read.get(known.key, _NEVER) <= now_ns:
            return False
        self._table.move_to_end(known.key)
        return True

    def add(self, tgid: int, start_ns: int, comm: str = "", uid: int | None = None) -> Process:
        """Learn of one process, for instance a socket's holder."""
        known = self._known(tgid, start_ns)
        if known is not None:
            if self._read.get(known.key, _NEVER) > time.clock_gettime_ns(time.CLOCK_BOOTTIME):
                self._touch(known.key)
                return known
            del self._read[known.key]
            process = self._with_details(known)
        else:
            new = Process(tgid=tgid, start_ns=start_ns, comm=comm, uid=uid)
            process = self._with_details(new)
        self._keep(process)
        return process

    def meet(self, tgid: int, start_ns: int, comm: str, uid: int) -> None:
        """Learn that a process is there. The next add() of it reads its details."""
        if self._known(tgid, start_ns) is not None:
            return
        with self._lock:
            if (tgid, start_ns) not in self._table:
                self._read[tgid, start_ns] = 0
                self._enter(Process(tgid=tgid, start_ns=start_ns, comm=comm, uid=uid))

    def restore(self, processes: Sequence[Process]) -> None:
        """Put back what a store kept, without asking /proc or telling anybody."""
        with self._lock:
            for process in processes:
                self._put(process)
            self._shrink()

    def _touch(self, key: ProcessKey) -> None:
        with self._lock:
            if key in self._table:
                self._table.move_to_end(key)

    def _with_details(self, process: Process) -> Process:
        if self._details is None or process.key in self._read:
            return process
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        settled = process.start_ns + _SETTLED_NS
        self._read[process.key] = settled if now < settled else _NEVER
        try:
            found = self._details(process.tgid, process.start_ns)
        except Exception as error:  # what one process is called must not cost others their names
            self._failures.add(error)
            return process
        if found is None:
            return process
        values = {name: value for name in _PROC if (value := getattr(found, name, None))}
        if process.exe and values.get("exe", process.exe) == process.exe:
            for name in _FIRST:
                first = getattr(process, name)
                if not first or (name == "cmdline" and first.endswith(CUT)):
                    first = values.get(name, first)
                values[name] = first
        if "cgroup" in values:
            values |= {name: getattr(found, name, "") for name in _CGROUP}
            if values["container"] != process.container:
                values = dict.fromkeys(_NAMES, "") | values
        uid = getattr(found, "uid", None)
        if uid is not None:
            values["uid"] = uid
        if not process.comm:
            values["comm"] = getattr(found, "comm", "")
        if self.hash is not None and (not process.sha256 or values.get("exe") != process.exe):
            values["sha256"] = ""
            self.hash(process.tgid, process.start_ns, values.get("exe", ""))
        return replace(process, **values)

    def hashed(self, tgid: int, start_ns: int, exe: str, sha256: str) -> None:
        """Take a program's hash, if the process still runs that program. Any thread."""
        with self._lock:
            known = self._table.get((tgid, start_ns))
            if known is None or known.exe != exe:
                return
            process = replace(known, sha256=sha256)
            self._put(process)
        if self.on_change is not None:
            self.on_change(process)

    def _keep(self, process: Process) -> None:
        process = self._called(process)
        with self._lock:
            self._enter(process)
        if self.on_change is not None:
            self.on_change(process)

    def _enter(self, process: Process) -> None:
        """As the one that was used last. With the lock."""
        self._put(process)
        self._table.move_to_end(process.key)
        if self._newest.get(process.tgid, -1) < process.start_ns:
            self._newest[process.tgid] = process.start_ns
        self._shrink()

    def _called(self, process: Process) -> Process:
        """With what its container is called, and who its parents are if /proc still tells."""
        more: dict[str, Any] = {}
        if self._containers is not None and process.container and not process.container_name:
            found = self._containers.find(process.container, process.cgroup)
            more = {"container_name": found.name, "image": found.image, "pod": found.pod}
        if self._details is not None and process.ppid:
            if not process.parents:
                more["parents"] = self._parents(process.ppid, process.start_ns)
            elif len(process.parents) == lib.SNIFFER_PARENTS:
                known, last = process.parents[:-1], process.parents[-1]
                above = procfs.parents(last.pid, process.start_ns)
                more["parents"] = (*known, *(above if last in above else [last]))
        return replace(process, **more) if any(more.values()) else process

    def _parents(self, ppid: int, start_ns: int) -> tuple[Parent, ...]:
        """Of a process that was gone before it was read: the kernel told its parent."""
        found = procfs.parents(ppid, start_ns)
        known = self._table.get((ppid, self._newest.get(ppid, _NEVER)))
        if found or known is None or known.start_ns > start_ns:
            return found
        return (Parent(ppid, known.comm), *known.parents)

    def _put(self, process: Process) -> None:
        known = self._table.get(process.key)
        self.bytes += _size(process) - (0 if known is None else _size(known))
        self._table[process.key] = process

    def _shrink(self) -> None:
        """A sixteenth more goes than has to: what it takes to choose is then little for each."""
        if len(self._table) > self.limit:
            self._evict(self.limit - self.limit // 16)
        if self.bytes > self.max_bytes:
            sizes = np.fromiter(map(_size, self._table.values()), np.int64, len(self._table))
            self._evict(self.max_bytes - self.max_bytes // 16, sizes)

    def _evict(self, keep: int, weights: np.ndarray | None = None) -> None:
        everything = list(self._table.values())
        count = len(everything)
        uids = [NOBODY if process.uid is None else process.uid for process in everything]
        payers = np.array(uids, np.uint32)
        if self._payers is not None:
            payers = self._payers.of(payers)
        names = np.fromiter((hash(process.comm) for process in everything), np.int64, count)
        programs = mix((payers.astype(np.uint64), names.view(np.uint64)), 0)
        goes = surplus(np.arange(count)[::-1], (payers, programs), keep, weights)
        for index in np.flatnonzero(goes).tolist():
            process = everything[index]
            key = process.key
            del self._table[key]
            self.bytes -= _size(process)
            self._read.pop(key, None)
            if self._newest.get(key[0]) == key[1]:
                del self._newest[key[0]]
        self.evicted += int(np.count_nonzero(goes))


def _size(process: Process) -> int:
    """Bytes of memory, nearly."""
    strings = sum(sys.getsizeof(getattr(process, name)) for name in _STRINGS)
    return _FIXED + strings + _PARENT_BYTES * len(process.parents)
