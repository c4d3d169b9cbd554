# SPDX-License-Identifier: MIT
"""Processes as the history's files have them, and what each of them used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from nlproto.tables.processes import Process

__all__ = ["encoded", "space", "sums"]

_DETAILS = 16384
"""Bytes of one process in the file; longer strings in it are cut."""


def encoded(process: Process) -> bytes:
    """A process as JSON of at most _DETAILS bytes."""
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
    """Bytes that so many of details take in the file: what is long goes to pages of its own."""
    return size + 100 if size < 900 else 600 + (size // 4092 + 1) * 4096


_SUMS = ("packets_in", "bytes_in", "packets_out", "bytes_out")


def sums(rows: Mapping[str, np.ndarray], details: Mapping[tuple[int, int], bytes]) -> list[Any]:
    """[comm, uid or None, unit, container, domain's number, flows, packets and bytes in, and out]
    of each."""
    owner = np.zeros((len(rows["tgid"]), 6), np.uint64)
    comm = np.ascontiguousarray(rows["comm"]).view(np.uint64).reshape(-1, 2)
    for place, column in enumerate(
        (rows["tgid"], rows["start_ns"], *comm.T, rows["uid"], rows["domain"])
    ):
        owner[:, place] = column
    as_bytes = owner.view("S48").reshape(-1)
    names, first, places = np.unique(as_bytes, return_index=True, return_inverse=True)
    flows = np.bincount(places, minlength=len(names))
    totals = [_summed(places, rows[name], len(names)) for name in _SUMS]
    found: dict[tuple[Any, ...], list[int]] = {}
    for at, row in enumerate(first.tolist()):
        named = bool(rows["tgid"][row])
        key = int(rows["tgid"][row]), int(rows["start_ns"][row])
        unit, container = _unit(details.get(key)) if named else ("", "")
        name = rows["comm"][row].decode("utf-8", "backslashreplace") if named else ""
        uid, domain = int(rows["uid"][row]) if named else None, int(rows["domain"][row])
        group = name, uid, unit, container, domain
        values = found.setdefault(group, [0] * 5)
        values[0] += int(flows[at])
        for place, column in enumerate(totals, 1):
            values[place] += int(column[at])
    return [[*group, *values] for group, values in found.items()]


def _summed(places: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    total = np.zeros(count, np.uint64)
    np.add.at(total, places, values)
    return total


class _Of(msgspec.Struct):
    unit: str = ""
    container: str = ""


_of = msgspec.json.Decoder(_Of)


def _unit(raw: bytes | None) -> tuple[str, str]:
    if raw is None:
        return "", ""
    try:
        one = _of.decode(raw)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return "", ""
    return one.unit, one.container
