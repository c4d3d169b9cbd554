# SPDX-License-Identifier: MIT
"""A batch as columns of plain values. Here alone records become what files hold."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from hunter.show import names
from hunter.show.text import sound
from nlproto.host.procfs import Parent
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.community_id import community_id
from nlproto.records.ends import Ends, NoEnds
from nlproto.tables.processes import Process

__all__ = [
    "COLUMNS",
    "FIRST_COLUMNS",
    "FLAGS",
    "KINDS",
    "OF_PROCESS",
    "PEOPLE",
    "TEXTS",
    "Columns",
    "Details",
    "Holder",
    "HoldersOf",
    "ColumnKind",
    "cells",
    "columns_of_batch",
    "nobody",
    "tcp_flags",
    "tcp_flags_of",
    "translated",
    "words_of",
]


class ColumnKind(Enum):
    """Kind of a column's values. Each format writes and reads a kind in one place."""

    TIME = auto()
    WORD = auto()
    """Text that this program itself chooses."""
    TEXT = auto()
    """Text that others choose, or that may be empty."""
    U16 = auto()
    U32 = auto()
    U64 = auto()
    PEOPLE = auto()
    """A list of processes, each with pid and comm."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of saved captures."""

    name: str
    kind: ColumnKind
    of_process: bool = False
    """Whether the record's Process has it, as an attribute of the same name."""


_COLUMNS = (
    Column("time", ColumnKind.TIME),
    Column("dir", ColumnKind.WORD),
    Column("proto", ColumnKind.WORD),
    Column("src", ColumnKind.WORD),
    Column("sport", ColumnKind.U16),
    Column("dst", ColumnKind.WORD),
    Column("dport", ColumnKind.U16),
    Column("len", ColumnKind.U32),
    Column("pid", ColumnKind.U32),
    Column("comm", ColumnKind.TEXT),
    Column("exe", ColumnKind.TEXT, of_process=True),
    Column("uid", ColumnKind.U32),
    Column("netns", ColumnKind.U32),
    Column("how", ColumnKind.WORD),
    # those of the first release end here
    Column("flags", ColumnKind.TEXT),
    Column("tcp_flags", ColumnKind.WORD),
    Column("interface", ColumnKind.TEXT),
    Column("unit", ColumnKind.TEXT, of_process=True),
    Column("container", ColumnKind.TEXT, of_process=True),
    Column("cmdline", ColumnKind.TEXT, of_process=True),
    Column("ppid", ColumnKind.U32, of_process=True),
    Column("segments", ColumnKind.U16),
    Column("hdr_len", ColumnKind.U16),
    Column("ifindex", ColumnKind.U32),
    Column("start_ns", ColumnKind.U64),
    Column("tid", ColumnKind.U32),
    Column("creator", ColumnKind.U32),
    Column("cookie", ColumnKind.U64),
    Column("holders", ColumnKind.PEOPLE),
    Column("community_id", ColumnKind.WORD),
    Column("container_name", ColumnKind.TEXT, of_process=True),
    Column("image", ColumnKind.TEXT, of_process=True),
    Column("pod", ColumnKind.TEXT, of_process=True),
    Column("parents", ColumnKind.PEOPLE, of_process=True),
    Column("sha256", ColumnKind.TEXT, of_process=True),
    Column("domain", ColumnKind.TEXT),
    Column("nat_src", ColumnKind.WORD),
    Column("nat_sport", ColumnKind.U16),
    Column("nat_dst", ColumnKind.WORD),
    Column("nat_dport", ColumnKind.U16),
)
"""Names and order of what is saved; stable: new ones come at the end. All formats follow this.

`flags` are words of FLAGS, `tcp_flags` letters as of tcpdump (TCP only), `segments` the packets
on the wire that the record stands for, `hdr_len` the bytes of headers that each of them has,
`start_ns` the start of the process in ns since boot, `creator` the pid that made the socket,
`community_id` the flow's name for Zeek, Suricata and others, `parents` who started the process,
the nearest first, `sha256` that of its program, where the daemon was told to look,
`domain` the far end's name that the process had asked for, `nat_src` to `nat_dport` the other
addresses and ports of what NAT changes on this host: those it makes of the packet's, or made
them of.
"""

KINDS = {column.name: column.kind for column in _COLUMNS}
COLUMNS = tuple(KINDS)
FIRST_COLUMNS = COLUMNS[: COLUMNS.index("how") + 1]
"""Those of the first release; a file that has no more is read too."""
TEXTS = frozenset(name for name, kind in KINDS.items() if kind is ColumnKind.TEXT)
PEOPLE = tuple(name for name, kind in KINDS.items() if kind is ColumnKind.PEOPLE)
OF_PROCESS = tuple(column.name for column in _COLUMNS if column.of_process)

FLAGS = {
    name.removeprefix("SNIFFER_F_").lower(): value
    for name, value in wire.ffi.typeof("enum sniffer_flag").relements.items()
}
"""Bits of a record's `flags` by the names that people and files see."""

_TCP_FLAGS = {"S": 2, "F": 1, "R": 4, "P": 8, "U": 32, "E": 64, "W": 128, ".": 16}


@lru_cache(256)
def tcp_flags(flags: int) -> str:
    """Return TCP flags in tcpdump's letters: S F R P U E W, a dot for ACK, "none" for none."""
    return "".join(letter for letter, bit in _TCP_FLAGS.items() if flags & bit) or "none"


def tcp_flags_of(text: str) -> int:
    """Return the flags for `text` of tcp_flags(). Raises ValueError."""
    if text == "none":
        return 0
    if not set(text) <= set(_TCP_FLAGS) or len(set(text)) != len(text):
        raise ValueError(text)
    return sum(_TCP_FLAGS[letter] for letter in text)


@lru_cache(1024)
def words_of(flags: int) -> str:
    """Return the words of FLAGS that are set in `flags`, between blanks."""
    return " ".join(word for word, bit in FLAGS.items() if flags & bit)


class Details(Protocol):
    """Facts beyond the records.

    One that reads files has interface(netns, ifindex) and tcp_flags too (FileSource); all sources
    have ends (Source).
    """

    def get(self, tgid: int, start_ns: int, /) -> Process | None: ...


_NO_ENDS = NoEnds()

Holder = dict[str, int | str]
"""A process: pid and comm."""

HoldersOf = Callable[[set[int]], Mapping[int, list[Holder]]]
"""Maps cookies of shared sockets to their holders, as far as known."""


def nobody(cookies: set[int]) -> Mapping[int, list[Holder]]:
    """Know no holders."""
    return {}


@dataclass(frozen=True, slots=True)
class Columns:
    """Lists of one length, in order of the records.

    `time` is RFC 3339 in UTC with microseconds, `len` in bytes; `pid`, `uid` and `process` are
    None and `comm`, `exe` empty where nobody is named. Names are raw: see text.py.
    """

    time: list[str]
    dir: list[str]
    proto: list[str]
    src: list[str]
    sport: list[int]
    dst: list[str]
    dport: list[int]
    len: list[int]
    pid: list[int | None]
    comm: list[str]
    exe: list[str]
    uid: list[int | None]
    netns: list[int]
    how: list[str]
    process: list[Process | None]
    batch: NamedBatch
    holders: dict[int, list[Holder]]
    """By row: the holders of a shared socket, if known."""
    interface: Callable[[int, int], str]
    """(netns, ifindex) -> the interface's name."""
    tells_tcp_flags: bool
    """Whether the records have TCP flags."""
    domain: list[str]
    """Names of far ends, "" if unknown."""
    nat: list[tuple[str, int, str, int] | None]
    """What NAT makes of source and destination, or what it made them from."""


def addresses(records: np.ndarray, field: str) -> list[str]:
    """Return the addresses in `field` ("saddr" or "daddr") as text."""
    size = wire.RECORD[field].itemsize
    raw = np.ascontiguousarray(records[field]).tobytes()
    families = records["family"].tolist()
    return [
        wire.address_text(family, raw[i * size : (i + 1) * size])
        for i, family in enumerate(families)
    ]


def times(batch: NamedBatch) -> list[str]:
    """Return each record's time of day as RFC 3339 in UTC with microseconds."""
    real = batch.clock.real_times(batch.records["time_ns"]).astype("datetime64[us]")
    return [f"{one}Z" for one in np.datetime_as_string(real, unit="us").tolist()]


def _shared(records: np.ndarray, holders: HoldersOf) -> dict[int, list[Holder]]:
    rows = np.flatnonzero((records["flags"] & wire.lib.SNIFFER_F_SHARED) != 0).tolist()
    if not rows:
        return {}
    cookies = dict(zip(rows, records["cookie"][rows].tolist(), strict=True))
    known = holders({cookie for cookie in cookies.values() if cookie})
    return {row: list(known[cookie]) for row, cookie in cookies.items() if cookie in known}


def columns_of_batch(batch: NamedBatch, details: Details, holders: HoldersOf = nobody) -> Columns:
    """Return the records of `batch` as columns. `details` has what records lack (exe)."""
    records = batch.records
    named = wire.are_named(records["how"]).tolist()
    tgid, start = records["tgid"].tolist(), records["start_ns"].tolist()
    processes = [
        details.get(pid, since) if known else None
        for known, pid, since in zip(named, tgid, start, strict=True)
    ]
    return Columns(
        time=times(batch),
        dir=[wire.DIR_NAMES.get(way, "?") for way in records["dir"].tolist()],
        proto=[wire.PROTO_NAMES.get(one, str(one)) for one in records["proto"].tolist()],
        src=addresses(records, "saddr"),
        sport=records["sport"].tolist(),
        dst=addresses(records, "daddr"),
        dport=records["dport"].tolist(),
        len=records["len"].tolist(),
        pid=[pid if known else None for known, pid in zip(named, tgid, strict=True)],
        comm=[
            wire.text(comm) if known else ""
            for known, comm in zip(named, records["comm"].tolist(), strict=True)
        ],
        exe=["" if process is None else process.exe for process in processes],
        uid=[uid if k else None for k, uid in zip(named, records["uid"].tolist(), strict=True)],
        netns=records["netns"].tolist(),
        how=[wire.HOW_NAMES[how] for how in records["how"].tolist()],
        process=processes,
        batch=batch,
        holders=_shared(records, holders),
        interface=getattr(details, "interface", _interface),
        tells_tcp_flags=getattr(details, "tcp_flags", True),
        domain=getattr(details, "ends", _NO_ENDS).domains(records),
        nat=translated(records, getattr(details, "ends", _NO_ENDS)),
    )


def translated(records: np.ndarray, ends: Ends) -> list[tuple[str, int, str, int] | None]:
    """Return the other source, port, target and port of each record that NAT changes."""
    found = ends.translations(records)
    if found is None:
        return [None] * len(records)
    ports = zip(found["sport"].tolist(), found["dport"].tolist(), strict=True)
    families = records["family"].tolist()
    return [
        (
            wire.address_text(family, one["saddr"].tobytes()),
            sport,
            wire.address_text(family, one["daddr"].tobytes()),
            dport,
        )
        if sport
        else None
        for one, family, (sport, dport) in zip(found, families, ports, strict=True)
    ]


@lru_cache(1)
def _own_netns() -> int:
    return os.stat("/proc/self/ns/net").st_ino


@lru_cache(4096)
def _interface(netns: int, ifindex: int) -> str:
    """An index has a meaning only in its own network namespace."""
    if not ifindex:
        return ""
    return names.interface(ifindex) if netns == _own_netns() else f"if{ifindex}@netns{netns}"


def cells(table: Columns) -> dict[str, list[Any]]:
    """Return what is saved, by the names in COLUMNS: plain values, None where nothing is known.

    An empty text is None too, so that all formats have one value for the unknown.
    """
    records = table.batch.records
    known = [pid is not None for pid in table.pid]
    ifindex = records["ifindex"].tolist()
    tcp = (records["proto"] == socket.IPPROTO_TCP).tolist()

    def of_process(name: str) -> list[Any]:
        return [None if one is None else getattr(one, name) for one in table.process]

    def unless_0(name: str) -> list[int | None]:
        return [value or None for value in records[name].tolist()]

    values: dict[str, list[Any]] = {name: getattr(table, name) for name in FIRST_COLUMNS}
    values |= {name: of_process(name) for name in OF_PROCESS if name not in values}
    values |= {
        "flags": [words_of(flags) for flags in records["flags"].tolist()],
        "tcp_flags": [
            tcp_flags(flags) if is_tcp and (flags or table.tells_tcp_flags) else None
            for flags, is_tcp in zip(records["tcp_flags"].tolist(), tcp, strict=True)
        ],
        "interface": [table.interface(*key) for key in zip(table.netns, ifindex, strict=True)],
        "segments": np.maximum(records["gso_segs"], 1).tolist(),
        "hdr_len": records["hdr_len"].tolist(),
        "ifindex": unless_0("ifindex"),
        "start_ns": _where(known, records["start_ns"].tolist()),
        "tid": unless_0("tid"),
        "creator": unless_0("creator"),
        "cookie": unless_0("cookie"),
        "holders": [table.holders.get(i) for i in range(len(known))],
        "community_id": _community_ids(records),
        "domain": table.domain,
        **{
            name: [None if one is None else one[at] for one in table.nat]
            for at, name in enumerate(("nat_src", "nat_sport", "nat_dst", "nat_dport"))
        },
    }
    for name in TEXTS:
        values[name] = [sound(text) if text else None for text in values[name]]
    values["parents"] = [_people(some) for some in values["parents"]]
    return values


@lru_cache(4096)
def _people(some: tuple[Parent, ...] | None) -> list[Holder] | None:
    return [{"pid": one.pid, "comm": sound(one.comm)} for one in some] if some else None


def _community_ids(records: np.ndarray) -> list[str]:
    ends = (records[name].tolist() for name in ("family", "proto", "sport", "dport"))
    addresses = (map(bytes, np.ascontiguousarray(records[name])) for name in ("saddr", "daddr"))
    return [
        community_id(family, proto, source, sport, target, dport)
        for family, proto, sport, dport, source, target in zip(*ends, *addresses, strict=True)
    ]


def _where(known: Iterable[bool], values: Iterable[Any]) -> list[Any]:
    return [value if one else None for one, value in zip(known, values, strict=True)]
