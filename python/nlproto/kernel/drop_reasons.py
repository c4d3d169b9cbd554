# SPDX-License-Identifier: MIT
"""Packets that the kernel dropped, by socket and by the kernel's reason (bpf/drops.bpf.c).

The programs are attached while a DropReasons is open. They end with this process, however it ends.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from nlproto.errors import Error
from nlproto.kernel.bpf import NoBpf, Object, enum_names, possible_cpus
from nlproto.kernel.refusal import why_refused_here

__all__ = ["NOT_SPECIFIED", "Dropped", "DropReasons"]

NOT_SPECIFIED = "NOT_SPECIFIED"
"""The kernel gave no reason. Not each of these packets was lost."""
Dropped = dict[int, dict[str, int]]
"""Packets by cookie of the socket and reason; cookie 0: the socket is not known."""

_OBJECT = Path(__file__).with_name("drops.bpf.o")
_PROGRAMS = ("drop_received", "drop_given")
"""For new kernels, and for those that do not say who would have received a packet."""
_PREFIX = "SKB_DROP_REASON_"
_MOST = 16384  # as in bpf/drops.bpf.c
_KEY = np.dtype(
    [("cookie", "u8"), ("reason", "u4"), ("netns", "u4"), ("port", "u2"), ("proto", "u2")]
    + [("unused", "u4")]
)
_ENTRY = np.dtype([("key", _KEY), ("value", "u8")])
_REASONS = 256
_KEPT_S, _MOST_GONE = 60.0, 1000
"""Sockets that are not known: a namespace may be found later than the first drop in it."""


class DropReasons:
    """Counts from now on, for all network namespaces. A context manager, for one thread.

    Raises NoBpf, which says in one line what is missing here.
    """

    def __init__(self) -> None:
        if not _OBJECT.exists():
            raise NoBpf("its program was not compiled: install clang and run ./build.sh")
        self._names = enum_names("skb_drop_reason")
        if not self._names:
            raise NoBpf("this kernel has no reasons (Linux 5.17 and later have)")
        cpus = possible_cpus()
        self._object = _attached(cpus)
        self.tells_receivers = self._object.programs[_PROGRAMS[0]].fd >= 0
        """Whether the kernel says who would have received a packet. Others know who sent it."""
        try:
            fd = self._object.map_fd("ownerless")
            counts = mmap.mmap(fd, cpus * _REASONS * 8, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            self._object.close()
            raise NoBpf(why_refused_here(error)) from error
        self._ownerless = np.frombuffer(counts, "u8").reshape(cpus, _REASONS)
        self._gone: dict[bytes, tuple[int, float]] = {}
        """Counts of sockets that are not there, by key, and since when the count is this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the program."""
        self._object.close()

    def read(self, tables: Mapping[int, np.ndarray]) -> Dropped:
        """Return what was dropped since the beginning, or while its socket was there.

        `tables`: HOST_SOCKETs by network namespace. Other sockets are forgotten a minute after
        their last drop. Raises Error.
        """
        try:
            found = self._object.items("drops", _ENTRY, _MOST)
        except OSError as error:
            raise Error(f"drops cannot be read: {error.strerror}") from error
        dropped: Dropped = {}
        if not len(found):
            return dropped
        keys = found["key"]
        by_end = _by_end(keys[keys["cookie"] == 0], tables)
        here = np.zeros(len(keys), bool)
        for table in tables.values():
            here |= np.isin(keys["cookie"], table["cookie"])
        gone: dict[bytes, int] = {}
        for at, (key, count) in enumerate(found.tolist()):
            cookie, reason, *end, _ = key
            cookie = cookie or by_end.get(tuple(end), 0)
            if not (here[at] if key[0] else cookie):
                gone[keys[at].tobytes()] = count
            reasons = dropped.setdefault(cookie, {})
            name = self._name(reason)
            reasons[name] = reasons.get(name, 0) + count
        self._forget(gone)
        return dropped

    def ownerless(self) -> dict[str, int]:
        """Return packets by reason of whose socket the kernel says nothing, since the beginning."""
        sums = self._ownerless.sum(axis=0)
        return {self._name(one): int(sums[one]) for one in np.flatnonzero(sums).tolist()}

    def _name(self, reason: int) -> str:
        """Return the kernel's name; subsystems have numbers of their own, without names here."""
        return self._names.get(reason, str(reason)).removeprefix(_PREFIX)

    def _forget(self, gone: dict[bytes, int]) -> None:
        now = time.monotonic()
        before = self._gone
        since = {
            key: before[key][1] if key in before and before[key][0] == count else now
            for key, count in gone.items()
        }
        newest_first = sorted(gone, key=since.__getitem__, reverse=True)
        self._gone = {
            key: (gone[key], since[key])
            for key in newest_first[:_MOST_GONE]
            if now - since[key] < _KEPT_S
        }
        for key in gone.keys() - self._gone.keys():
            self._object.delete("drops", key)


def _by_end(keys: np.ndarray, tables: Mapping[int, np.ndarray]) -> dict[tuple[int, int, int], int]:
    """Return the cookies that sockets have got by now, by namespace, port and protocol."""
    found: dict[tuple[int, int, int], set[int]] = {}
    for netns in np.unique(keys["netns"]).tolist():
        table = tables.get(netns)
        if table is None:
            continue
        ports = keys["port"][keys["netns"] == netns]
        rows = table[np.isin(table["sport"], ports) & (table["cookie"] != 0)]
        columns = (rows[name].tolist() for name in ("sport", "proto", "cookie"))
        for port, proto, cookie in zip(*columns, strict=True):
            found.setdefault((netns, port, proto), set()).add(cookie)
    # several sockets may share an end: then nobody knows whose it was
    return {end: cookies.pop() for end, cookies in found.items() if len(cookies) == 1}


def _attached(cpus: int) -> Object:
    """Return the object with the first program that this kernel takes. Raises NoBpf."""
    refused = OSError()
    for name in _PROGRAMS:
        opened = Object(_OBJECT)
        try:
            for other, program in opened.programs.items():
                program.choose(other == name)
            opened.set_entries("ownerless", cpus)
            opened.load()
            opened.attach(name)
        except OSError as error:
            opened.close()
            refused = error
        else:
            return opened
    raise NoBpf(why_refused_here(refused)) from refused
