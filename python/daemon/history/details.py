# SPDX-License-Identifier: MIT
"""Processes as the history stores them, and sums of what each of them used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec
import numpy as np

from nlproto.records.wire import lib
from nlproto.tables.processes import Process

__all__ = [
    "NOWHERE",
    "Group",
    "Place",
    "Sum",
    "add",
    "add_all",
    "encoded",
    "place",
    "places_in",
    "space",
    "sums",
]

_DETAILS = 16384
"""The most bytes of one process in the file; longer strings in it are cut."""


def encoded(process: Process) -> bytes:
    """Return a process as JSON of at most _DETAILS bytes."""
    raw = msgspec.json.encode(process)
    room = _DETAILS // 4
    while len(raw) > _DETAILS:
        room //= 2
        short = {name: getattr(process, name)[:room] for name in _STRINGS}
        raw = msgspec.json.encode(replace(process, **short))
    return raw


_STRINGS = (
    *("comm", "user", "exe", "cmdline", "cgroup", "unit", "container"),
    *("container_name", "image", "pod"),
)


def space(size: int) -> int:
    """Return how many bytes of the file such details take; long ones need pages of their own."""
    return size + 100 if size < 900 else 600 + (size // 4092 + 1) * 4096


_Key = TypeVar("_Key")

Group = tuple[str, int | None, str, str, str, str, int]
"""comm, uid, unit, container, container's name, pod, number of the far end's name (0: none)."""
Sum = tuple[Group, list[int]]
"""Flows, packets and bytes in, packets and bytes out."""
_SUMS = ("packets_in", "bytes_in", "packets_out", "bytes_out")


Place = tuple[str, str, str, str]
"""Unit, container, its name, pod of a process."""
NOWHERE: Place = ("", "", "", "")
OTHERS = "(others)"
_GROUPS = 4096


def sums(rows: Mapping[str, np.ndarray], place_of: Callable[[tuple[int, int]], Place]) -> list[Sum]:
    """Return what each program of each user used, by place and name of the far end.

    Most bytes first. Beyond 4,096 groups each user has one group for the rest, so that no user can
    make it long. The listener has the first packets of a connection: they count as no flow, since
    the accepted socket has one.
    """
    owner = np.zeros((len(rows["tgid"]), 6), np.uint64)
    comm = np.ascontiguousarray(rows["comm"]).view(np.uint64).reshape(-1, 2)
    for at, column in enumerate(
        (rows["tgid"], rows["start_ns"], *comm.T, rows["uid"], rows["domain"])
    ):
        owner[:, at] = column
    keys, first, group_of = np.unique(
        owner.view("S48").reshape(-1), return_index=True, return_inverse=True
    )
    begins = rows["how"] == lib.SNIFFER_HOW_LISTENER
    begins &= (rows["packets_in"] == 0) | (rows["packets_out"] == 0)
    totals = [np.bincount(group_of[~begins], minlength=len(keys)).astype(np.uint64)]
    for name in _SUMS:
        totals.append(np.zeros(len(keys), np.uint64))
        np.add.at(totals[-1], group_of, rows[name])
    found: dict[Group, list[int]] = {}
    for at, row in enumerate(first.tolist()):
        pid, start_ns = int(rows["tgid"][row]), int(rows["start_ns"][row])
        name = rows["comm"][row].decode("utf-8", "backslashreplace") if pid else ""
        group = (
            name,
            int(rows["uid"][row]) if pid else None,
            *(place_of((pid, start_ns)) if pid else NOWHERE),
            int(rows["domain"][row]),
        )
        add(found, group, [int(column[at]) for column in totals])
    ordered = sorted(found.items(), key=lambda one: -one[1][2] - one[1][4])
    short = dict(ordered[:_GROUPS])
    for group, values in ordered[_GROUPS:]:
        add(short, (OTHERS, group[1], *NOWHERE, 0), values)
    return list(short.items())


def add(found: dict[_Key, list[int]], group: _Key, values: Sequence[int]) -> None:
    """Add `values` to what `group` has in `found`."""
    known = found.setdefault(group, [0] * len(values))
    for at, value in enumerate(values):
        known[at] += value


def add_all(found: dict[Group, list[int]], part: Sequence[Sum]) -> None:
    for group, values in part:
        add(found, group, values)


class _Of(msgspec.Struct):
    unit: str = ""
    container: str = ""
    container_name: str = ""
    pod: str = ""


_of = msgspec.json.Decoder(_Of)


def places_in(details: Mapping[tuple[int, int], bytes]) -> Callable[[tuple[int, int]], Place]:
    """Return the places of processes, from their encoded() details."""

    def place_of(key: tuple[int, int]) -> Place:
        raw = details.get(key)
        try:
            return NOWHERE if raw is None else place(_of.decode(raw))
        except (msgspec.DecodeError, msgspec.ValidationError):
            return NOWHERE

    return place_of


def place(one: Process | _Of | None) -> Place:
    """Return the place of a process."""
    return NOWHERE if one is None else (one.unit, one.container, one.container_name, one.pod)
