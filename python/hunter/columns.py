# SPDX-License-Identifier: MIT
"""A batch as columns of plain values: the one place where records become what files hold."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from nlproto import wire
from nlproto.pipeline import NamedBatch
from nlproto.processes import Process

__all__ = ["COLUMNS", "Columns", "Details", "Holder", "Holders", "columns", "nobody"]

COLUMNS = (
    "time",
    "dir",
    "proto",
    "src",
    "sport",
    "dst",
    "dport",
    "len",
    "pid",
    "comm",
    "exe",
    "uid",
    "netns",
    "how",
)
"""Names and order of what is saved; stable."""


class Details(Protocol):
    """What is known beyond the records."""

    def get(self, tgid: int, start_ns: int, /) -> Process | None: ...


Holder = dict[str, int | str]
"""One of the processes that share a socket: pid and comm."""

Holders = Callable[[set[int]], Mapping[int, list[Holder]]]
"""Cookies of shared sockets -> who holds them, as far as known."""


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
    """By row, where a socket is shared and its holders are known."""


@lru_cache(65536)
def _address(family: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, raw[:4])
    return str(ipaddress.IPv6Address(raw))


def addresses(records: np.ndarray, field: str) -> list[str]:
    """Return the addresses in `field` ("saddr" or "daddr") as text."""
    size = wire.RECORD[field].itemsize
    raw = np.ascontiguousarray(records[field]).tobytes()
    families = records["family"].tolist()
    return [_address(family, raw[i * size : (i + 1) * size]) for i, family in enumerate(families)]


def times(batch: NamedBatch) -> list[str]:
    """Return each record's time of day as RFC 3339 in UTC with microseconds."""
    real = batch.clock.real_times(batch.records["time_ns"]).astype("datetime64[us]")
    return [f"{one}Z" for one in np.datetime_as_string(real, unit="us").tolist()]


def _shared(records: np.ndarray, holders: Holders) -> dict[int, list[Holder]]:
    rows = np.flatnonzero((records["flags"] & wire.lib.SNIFFER_F_SHARED) != 0).tolist()
    if not rows:
        return {}
    cookies = dict(zip(rows, records["cookie"][rows].tolist(), strict=True))
    known = holders({cookie for cookie in cookies.values() if cookie})
    return {row: list(known[cookie]) for row, cookie in cookies.items() if cookie in known}


def columns(batch: NamedBatch, details: Details, holders: Holders = nobody) -> Columns:
    """Return the records of `batch` as columns; `details` gives what records lack (exe)."""
    records = batch.records
    named = ((records["how"] > 0) & (records["how"] < wire.lib.SNIFFER_HOW_REASONS)).tolist()
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
    )
