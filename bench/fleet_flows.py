# SPDX-License-Identifier: MIT
"""Flows of a simulated fleet in the form that the collector writes (fleet.schema)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fleet.collect.known_batches import KnownBatches
from fleet.collect.parquet import write_file
from fleet.collect.rollup import write_day, write_rollup
from fleet.collect.tables import in_order
from fleet.schema import ACCOUNT, FLOWS, HOUR_NS, PROCS, day_name, hour_name

__all__ = ["BEGIN_NS", "HOSTS", "address", "write"]

HOSTS = 2000
BEGIN_NS = 1_779_926_400 * 10**9  # 2026-05-28T00:00:00Z
_PROGRAMS = 40
_PER_HOST = 10  # programs that run on one host
_TARGETS = 5  # that one of them talks to
_INSIDE = 0.7  # of them are on another host of the fleet
_LATE = 200  # one in so many is accepted after a batch: its first packets are the listener's
_ACCOUNT_S = 60
_DIFFERENT = 6  # hours
_SECONDS = {"flows": 10, "procs": 1, "account": 1, "rollup": 1}
"""Of what there are files of an hour, and after how many seconds a batch has the next number."""


def address(host: int) -> str:
    """Return the address of a host by its number."""
    return f"10.{host >> 14 & 255}.{host >> 6 & 255}.{host % 64 + 1}"


def _words(values: list[str], indices: np.ndarray, null: bool = False) -> pa.Array:
    mask = indices < 0 if null else None
    keys = pa.array(np.maximum(indices, 0).astype(np.int32), mask=mask)
    return pa.DictionaryArray.from_arrays(keys, pa.array(values, pa.string()))


_NAMES = [f"h{host:05d}" for host in range(HOSTS)]
_BOOTS = [f"00000000-0000-4000-8000-{host:012d}" for host in range(HOSTS)]
_OUTSIDE = [f"203.{n >> 8}.{n & 255}.9" for n in range(5000)]
_ADDRESSES = [*map(address, range(HOSTS)), *_OUTSIDE]
_COMMS = [f"program{number}" for number in range(_PROGRAMS)]


def _program(host: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """Which program runs in a slot of a host."""
    found: np.ndarray = (host * 7 + slot * 3) % _PROGRAMS
    return found


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers that look like chance, and are always the same."""
    mixed: np.ndarray = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(33)
    return mixed.astype(np.int64)


def write(folder: Path, rows: int, hours: int, seed: int = 1) -> None:
    """Write about `rows` rows of flows in so many hours, with procs, account and sums.

    A few hours are made up. The others are these again, at their own times.
    """
    random = np.random.default_rng(seed)
    for hour in range(hours):
        begin = BEGIN_NS + hour * HOUR_NS
        name = hour_name(begin)
        if hour < _DIFFERENT:
            _flows(folder / "flows" / name, rows // hours, begin, random)
            _procs(folder / "procs" / name, begin)
            _accounts(folder / "account" / name, begin)
            write_rollup(folder, name)
        else:
            for kind in _SECONDS:
                _again(folder / kind, begin, hour // _DIFFERENT * _DIFFERENT * HOUR_NS)
        if hour % 24 == 23:
            write_day(folder, day_name(begin))


def _again(folder: Path, begin: int, later: int) -> None:
    """Write the hour that begins so much earlier again."""
    old = pq.ParquetFile(folder / hour_name(begin - later) / "part-0.parquet").read()
    seconds = _SECONDS[folder.name]
    arrays: dict[str, object] = dict(zip(old.column_names, old.columns, strict=True))
    for name in ("first_ns", "last_ns", "at_ns", "hour_ns"):
        if name in arrays:
            arrays[name] = old[name].to_numpy() + later
    if "sequence" in arrays:
        arrays["sequence"] = old["sequence"].to_numpy() + np.uint64(later // 10**9 // seconds)
    _put(folder / hour_name(begin), arrays, old.schema.remove_metadata(), True)


def _flows(folder: Path, rows: int, begin: int, random: np.random.Generator) -> None:
    count = int(rows / (1 + _INSIDE + _INSIDE / _LATE))
    client = random.integers(0, HOSTS, count)
    slot_c = random.integers(0, _PER_HOST, count)
    # a program talks to few others, always the same
    target = _mixed((client * _PER_HOST + slot_c) * _TARGETS + random.integers(0, _TARGETS, count))
    server, slot_s = target % HOSTS, target // HOSTS % _PER_HOST
    inside = target % 1009 < 1009 * _INSIDE
    far = np.where(inside, server, HOSTS + target % len(_OUTSIDE))
    service = np.where(inside, 5000 + _program(server, slot_s), 443).astype(np.uint16)
    port = random.integers(32768, 61000, count).astype(np.uint16)
    first = begin + random.integers(0, HOUR_NS - 10 * 10**9, count)
    last = first + random.exponential(1e9, count).clip(0, 9.9e9).astype(np.int64)
    sizes = random.integers(100, 100_000, (2, count)).astype(np.uint64)
    pick = np.flatnonzero(inside)
    pick = np.concatenate([pick, pick[::_LATE]])
    late = random.integers(50_000, 900_000, len(pick))  # ns on the way
    first_packets = np.arange(count + len(pick)) >= count + np.count_nonzero(inside)
    skew = (np.arange(HOSTS) * 7919 % 200 - 100) * 10**6  # clocks: 100 ms apart at most
    both = {
        "host": np.concatenate([client, server[pick]]),
        "slot": np.concatenate([slot_c, slot_s[pick]]),
        "laddr": np.concatenate([client, server[pick]]),
        "raddr": np.concatenate([far, client[pick]]),
        "lport": np.concatenate([port, service[pick]]),
        "rport": np.concatenate([service, port[pick]]),
        "initiated": np.concatenate([np.ones(count, bool), np.zeros(len(pick), bool)]),
        "first": np.concatenate([first + skew[client], first[pick] + late + skew[server[pick]]]),
        "last": np.concatenate([last + skew[client], last[pick] + late + skew[server[pick]]]),
        "out": np.concatenate([sizes[0], sizes[1][pick]]),
        "in": np.concatenate([sizes[1], sizes[0][pick]]),
        "listener": first_packets,
    }
    both["last"] = np.where(first_packets, both["first"], both["last"])
    accepted = slice(count, count + np.count_nonzero(inside))
    both["first"][accepted][::_LATE] += 1_000_000
    both["last"] = np.maximum(both["last"], both["first"])
    both["last"] = both["last"].clip(begin, begin + HOUR_NS - 1)
    order = np.argsort(both["last"], kind="stable")
    column = {name: values[order] for name, values in both.items()}
    host, total = column["host"], len(order)
    none = np.full(total, -1)
    comm = _program(host, column["slot"])
    arrays = {
        "host": _words(_NAMES, host),
        "boot": _words(_BOOTS, host),
        "sequence": (column["last"] // (10 * 10**9)).astype(np.uint64),
        "netns": np.full(total, 4026531840, np.uint32),
        "cookie": np.where(column["listener"], 0, random.integers(1, 1 << 62, total)).astype("u8"),
        "protocol": np.full(total, 6, np.uint8),
        "laddr": _words(_ADDRESSES, column["laddr"]),
        "lport": column["lport"],
        "raddr": _words(_ADDRESSES, column["raddr"]),
        "rport": column["rport"],
        "forwarded": np.zeros(total, bool),
        "initiated": column["initiated"],
        "tgid": (1000 + column["slot"]).astype(np.uint32),
        "start_ns": (column["slot"] * 10**9 + 10**9).astype(np.uint64),
        "uid": (1000 + comm).astype(np.uint32),
        "comm": _words(_COMMS, comm),
        "how": _words(["socket", "listener"], column["listener"].astype(int)),
        "flags": np.zeros(total, np.uint32),
        "first_ns": column["first"],
        "last_ns": column["last"],
        "packets_out": column["out"] // 1000 + 1,
        "bytes_out": column["out"],
        "packets_in": column["in"] // 1000 + 1,
        "bytes_in": column["in"],
        "nat_laddr": _words([""], none, True),
        "nat_raddr": _words([""], none, True),
        "nat_lport": pa.nulls(total, pa.uint16()),
        "nat_rport": pa.nulls(total, pa.uint16()),
        "domain": _words([""], none, True),
    }
    _put(folder, arrays, FLOWS)


def _procs(folder: Path, begin: int) -> None:
    host, slot = (part.ravel() for part in np.mgrid[0:HOSTS, 0:_PER_HOST])
    comm = _program(host, slot)
    total, none = len(host), np.full(len(host), -1)
    container = np.where(slot % 3 == 0, comm, -1)
    known = {
        "host": _words(_NAMES, host),
        "boot": _words(_BOOTS, host),
        "sequence": np.full(total, begin // 10**9, np.uint64),
        "tgid": (1000 + slot).astype(np.uint32),
        "start_ns": (slot * 10**9 + 10**9).astype(np.uint64),
        "at_ns": np.full(total, begin + 10**9),
        "comm": _words(_COMMS, comm),
        "name": _words(_COMMS, comm),
        "exe": _words([f"/usr/bin/{one}" for one in _COMMS], comm),
        "ppid": np.ones(total, np.uint32),
        "uid": (1000 + comm).astype(np.uint32),
        "user": _words([f"user{number}" for number in range(_PROGRAMS)], comm),
        "unit": _words([f"{one}.service" for one in _COMMS], comm),
        "container": _words([f"docker:{n:012x}" for n in range(_PROGRAMS)], container, True),
        "container_name": _words(_COMMS, container, True),
    }
    empty = {name: _words([""], none, True) for name in ("image", "pod", "namespace", "sha256")}
    empty["cmdline"] = pa.nulls(total, pa.string())
    empty["parents"] = pa.nulls(total, pa.list_(pa.string()))
    _put(folder, known | empty, PROCS)


def _accounts(folder: Path, begin: int) -> None:
    times = np.arange(begin, begin + HOUR_NS, _ACCOUNT_S * 10**9)
    moment, host = (part.ravel() for part in np.meshgrid(times, np.arange(HOSTS), indexing="ij"))
    total = len(host)
    counts = {
        name: np.zeros(total, np.uint64)
        for name in ("spooled", "lost", "dropped", "daemon_lost", "gap_ms")
    }
    told = {name: (moment // 10**9).astype(np.uint64) for name in
            ("exported", "acknowledged", "received", "delivered")}  # fmt: skip
    arrays = {
        "host": _words(_NAMES, host),
        "boot": _words(_BOOTS, host),
        "sequence": (moment // 10**9).astype(np.uint64),
        "at_ns": moment,
        "version": _words(["1"], np.zeros(total, int)),
        "engine": _words(["module"], np.zeros(total, int)),
    }
    _put(folder, arrays | counts | told, ACCOUNT)


def _put(
    folder: Path, arrays: dict[str, object], schema: pa.Schema, is_ordered: bool = False
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({field.name: arrays[field.name] for field in schema}, schema=schema)
    keys = KnownBatches()
    if "sequence" in arrays:
        sequences = np.asarray(arrays["sequence"])
        run = [[int(sequences.min()), int(sequences.max())]]
        told = {name: {boot: run} for name, boot in zip(_NAMES, _BOOTS, strict=True)}
        keys = KnownBatches.from_bytes(msgspec.json.encode(told))
    if schema is FLOWS and not is_ordered:
        table = in_order(table)
    write_file(folder / "part-0.parquet", table, keys)
