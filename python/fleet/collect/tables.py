# SPDX-License-Identifier: MIT
"""Makes Arrow tables of batches, one for each hour (fleet.schema)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fleet import schema, wire
from fleet.collect.known_batches import KnownBatches
from nlproto.records.ends import MAPPED
from nlproto.records.wire import HOW_NAMES, joined, taken, text

__all__ = ["Hour", "Received", "Span", "hours_of", "in_order"]

_EARLY_NS = 3600 * 10**9
"""How far a host's clock may be ahead."""
"""The prefix of IPv4 addresses in IPv6."""
_SLICE_NS = 300 * 10**9
_COMMON = (
    *("netns", "cookie", "protocol", "lport", "rport", "tgid", "start_ns", "flags"),
    *("first_ns", "last_ns", "packets_out", "bytes_out", "packets_in", "bytes_in"),
)


@dataclass(frozen=True, slots=True)
class Received:
    """A batch, and the host on whose subject it came."""

    host: str
    batch: wire.HostBatch

    @property
    def key(self) -> tuple[str, str, int]:
        """Which batch this is."""
        return self.host, self.batch.boot, self.batch.sequence


@dataclass(frozen=True, slots=True)
class Hour:
    """The content of one file."""

    kind: str
    """Of schema.TABLES."""
    name: str
    """Of the folder."""
    table: pa.Table
    keys: KnownBatches
    """Of the batches that have rows in it."""


class Span:
    """Which times of rows are believed: also if this machine's time of day has jumped."""

    def __init__(self, keep_s: float) -> None:
        self._keep_ns = int(keep_s * 1e9)
        self._begun_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def now(self) -> tuple[int, int]:
        """Return the oldest and the latest time, in ns since 1970."""
        times = time.time_ns(), self._begun_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return min(times) - self._keep_ns, max(times) + _EARLY_NS


KnownOfHour = Callable[[str, str], KnownBatches]
"""(table, name of an hour) -> its content."""


def hours_of(
    received: Sequence[Received],
    span: tuple[int, int],
    known: KnownOfHour = lambda *_: KnownBatches(),
) -> tuple[list[Hour], int]:
    """Return the content of `received` for each table and hour, and how many rows were out of time.

    Rows of `known` batches are left out. `span`: the oldest and latest time of a row. A clock far
    ahead, or a row older than the kept time, would make unwanted hours.
    """
    made: list[Hour] = []
    untimely = 0
    for number, kind in wire.KINDS.items():
        some = [one for one in received if one.batch.kind == number]
        if not some:
            continue
        times = np.concatenate([_times(one.batch) for one in some])
        belongs = np.repeat(np.arange(len(some)), [len(one.batch) for one in some])
        timely = (times >= span[0]) & (times <= span[1])
        untimely += int(len(times) - np.count_nonzero(timely))
        hours = times // schema.HOUR_NS
        for hour in np.unique(hours[timely]).tolist():
            name = schema.hour_name(hour * schema.HOUR_NS)
            here = timely & (hours == hour)
            there, keys = known(kind, name), KnownBatches()
            wanted = np.zeros(len(some), bool)
            for at in np.unique(belongs[here]).tolist():
                key = some[at].key
                if key not in there and key not in keys:
                    keys.add(*key)
                    wanted[at] = True
            rows = np.flatnonzero(here & wanted[belongs])
            if len(rows):
                table = _table(kind, some, belongs, rows)
                made.append(Hour(kind, name, table, keys))
    return made, untimely


def _times(batch: wire.HostBatch) -> np.ndarray:
    if batch.kind == wire.FLOWS:
        times: np.ndarray = batch.rows["last_ns"]
        return times
    return np.array([one.at_ns for one in batch.told], np.int64)


def _table(
    kind: str, received: Sequence[Received], belongs: np.ndarray, rows: np.ndarray
) -> pa.Table:
    names = {
        "host": [one.host for one in received],
        "boot": [one.batch.boot for one in received],
    }
    of = belongs[rows]
    columns: dict[str, Any] = {name: _words(values, of) for name, values in names.items()}
    columns["sequence"] = np.array([one.batch.sequence for one in received], np.uint64)[of]
    if kind == "flows":
        columns |= _flows(received, rows)
    else:
        told = [one for each in received for one in each.batch.told]
        made = [_row(told[row]) for row in rows.tolist()]
        fields = [name for name in schema.TABLES[kind].names if name not in columns]
        columns |= {name: [row[name] for row in made] for name in fields}
    table = _arrow(columns, schema.TABLES[kind])
    return in_order(table) if kind == "flows" else table


def in_order(flows: pa.Table) -> pa.Table:
    """Return `flows` in order of five minutes, the far end's port, and its address.

    Most questions have a range of time, and what they look for is then in few groups of rows.
    """
    address = flows["raddr"].combine_chunks()
    if isinstance(address, pa.ChunkedArray):
        address = address.chunk(0)
    texts = np.array(address.dictionary.to_pylist())
    rank = np.empty(len(texts), np.int64)
    rank[np.argsort(texts)] = np.arange(len(texts))
    slices = flows["last_ns"].to_numpy() // _SLICE_NS
    order = np.lexsort((rank[address.indices.to_numpy()], flows["rport"].to_numpy(), slices))
    return flows.take(pa.array(order))


def _arrow(columns: dict[str, Any], wanted: pa.Schema) -> pa.Table:
    made = []
    for field in wanted:
        values = columns[field.name]
        if isinstance(values, pa.Array):
            made.append(values)
        elif pa.types.is_dictionary(field.type):
            made.append(pa.array(values, pa.string()).dictionary_encode())
        else:
            made.append(pa.array(values, field.type))
    return pa.table(made, schema=wanted)


def _words(values: Sequence[str | None], of: np.ndarray) -> pa.DictionaryArray:
    """Return the value of each row; `of` has its number."""
    places: dict[str | None, int] = {}
    numbers = np.array([places.setdefault(value, len(places)) for value in values], np.int32)
    return _dictionary(numbers[of], list(places))


def _dictionary(indices: np.ndarray, values: Sequence[str | None]) -> pa.DictionaryArray:
    empty = [at for at, value in enumerate(values) if value is None]
    mask = np.isin(indices, empty) if empty else None
    texts = ["" if value is None else value for value in values]
    return pa.DictionaryArray.from_arrays(
        pa.array(indices.astype(np.int32), mask=mask), pa.array(texts, pa.string())
    )


def _flows(received: Sequence[Received], rows: np.ndarray) -> dict[str, Any]:
    flows = joined([one.batch.rows for one in received], wire.ROW)
    domains = _domains(received, flows)[rows]
    flows = taken(flows, rows)
    columns: dict[str, Any] = {name: flows[name] for name in _COMMON}
    unnamed = flows["tgid"] == 0
    columns["uid"] = pa.array(flows["uid"], mask=unnamed)
    columns["forwarded"] = flows["forwarded"] != 0
    columns["initiated"] = pa.array(flows["initiated"] == 1, mask=flows["initiated"] == 0)
    columns["domain"] = pa.array(domains, pa.string()).dictionary_encode()
    columns["comm"] = _each(pa.array(flows["comm"].tolist(), pa.binary()), text)
    columns["how"] = _each(pa.array(flows["how"]), HOW_NAMES.__getitem__)
    for name in ("laddr", "raddr"):
        columns[name] = _addresses(flows[name], flows["family"])
        columns[f"nat_{name}"] = _addresses(flows[f"nat_{name}"], flows["nat"])
    for name in ("nat_lport", "nat_rport"):
        columns[name] = pa.array(flows[name], mask=flows["nat"] == 0)
    return columns


def _each(values: pa.Array, show: Callable[[Any], str | None]) -> pa.DictionaryArray:
    """Return each different value as text, converted once."""
    raw = values.dictionary_encode()
    return _words([show(value) for value in raw.dictionary.to_pylist()], raw.indices.to_numpy())


def _domains(received: Sequence[Received], flows: np.ndarray) -> np.ndarray:
    """Return the name of each row's far end, or None. A host's numbers hold for that host alone."""
    names = np.full(len(flows), None, object)
    at = 0
    for one in received:
        count = len(one.batch.rows)
        if one.batch.names:
            numbers = one.batch.rows["domain"].tolist()
            names[at : at + count] = [one.batch.names.get(number) for number in numbers]
        at += count
    return names


_ADDRESS = np.dtype([("family", "u1"), ("address", "V16")])


def _addresses(words: np.ndarray, families: np.ndarray) -> pa.DictionaryArray:
    packed = np.empty(len(words), _ADDRESS)
    packed["family"] = families
    packed["address"] = np.ascontiguousarray(words).view("V16").reshape(-1)
    raw = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(_ADDRESS.itemsize), len(words), [None, pa.py_buffer(packed.tobytes())]
    )
    return _each(raw, _shown)


def _shown(packed: bytes) -> str | None:
    family, raw = packed[0], packed[1:]
    if not family:
        return None
    if family == socket.AF_INET6 and raw.startswith(MAPPED):  # one connection, one address
        return socket.inet_ntop(socket.AF_INET, raw[len(MAPPED) :])
    return socket.inet_ntop(family, raw[:4] if family == socket.AF_INET else raw)


def _row(told: wire.ToldProcess | wire.ToldAccount) -> dict[str, Any]:
    return _process(told) if isinstance(told, wire.ToldProcess) else _account(told)


def _process(told: wire.ToldProcess) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(told, name) for name in told.__struct_fields__}
    row["name"] = told.exe.rpartition("/")[2] or told.comm
    namespace, slash, _ = told.pod.partition("/")
    row["namespace"] = namespace if slash else None
    row["parents"] = list(told.parents)
    return {name: None if value == "" else value for name, value in row.items()}


def _account(told: wire.ToldAccount) -> dict[str, Any]:
    return {name: getattr(told, name) for name in told.__struct_fields__}
