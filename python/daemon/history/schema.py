# SPDX-License-Identifier: MIT
"""The tables of the history's database, and FLOWs as their rows."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from daemon.history.memory import USED
from nlproto.tables.flows import FLOW

__all__ = [
    "APPLICATION",
    "FLOW_COLUMNS",
    "HAS_PROCESS",
    "INDEXES",
    "ROW_SIZE",
    "SCHEMA",
    "STEPS",
    "WRITE_PROCESS",
    "columns_of",
    "flows_of",
    "signed",
    "write_flows",
]

APPLICATION = 0x706B6874  # "pkht", in the file's header: file(1) and we recognize it
_CREATE = """
CREATE TABLE flows (
    id INTEGER PRIMARY KEY,
    cookie INTEGER, start_ns INTEGER, laddr BLOB, raddr BLOB, tgid INTEGER, netns INTEGER,
    lport INTEGER, rport INTEGER, proto INTEGER, family INTEGER, forwarded INTEGER,
    how INTEGER, flags INTEGER, uid INTEGER, inode INTEGER, comm BLOB,
    first_ns INTEGER, last_ns INTEGER,
    packets_in INTEGER, bytes_in INTEGER, packets_out INTEGER, bytes_out INTEGER
);
CREATE TABLE processes (
    tgid INTEGER, start_ns INTEGER, seen REAL, details BLOB,
    PRIMARY KEY (tgid, start_ns)
) WITHOUT ROWID;
"""
_FROM_1 = """
DROP INDEX IF EXISTS processes_seen;
ALTER TABLE flows ADD COLUMN payer INTEGER DEFAULT 0;
ALTER TABLE flows ADD COLUMN seen INTEGER DEFAULT 0;
UPDATE flows SET payer = CASE tgid WHEN 0 THEN 4294967295 ELSE uid END;
ALTER TABLE processes ADD COLUMN payer INTEGER DEFAULT 4294967295;
ALTER TABLE processes ADD COLUMN size INTEGER DEFAULT 0;
UPDATE processes SET seen = 0, size = length(details) + 100,
    payer = coalesce(json_extract(CAST(details AS TEXT), '$.uid'), 4294967295);
CREATE INDEX processes_payer ON processes (payer, seen, size);
CREATE TABLE elapsed (boot_id TEXT, boot REAL, uptime REAL, real REAL, seconds REAL);
CREATE TABLE identity (name BLOB);
INSERT INTO identity VALUES (randomblob(16));
"""
"""`payer` as in nlproto.tables.shares; `seen` in seconds of nlproto.records.elapsed, never the time
of day; `size` in bytes of the file."""
_FROM_2 = """
ALTER TABLE flows ADD COLUMN domain INTEGER DEFAULT 0;
CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT);
"""
"""`domain` is the `id` of a name (nlproto.overheard.names), 0: none."""
_FROM_3 = """
CREATE TABLE IF NOT EXISTS hours (number INTEGER PRIMARY KEY, about BLOB);
DROP INDEX IF EXISTS flows_comm;
"""
"""`hours` lists the sealed files (daemon.history.hours). Unsealed rows are only an hour or two, so
their programs need no index."""
_FROM_4 = """
ALTER TABLE flows ADD COLUMN nat_laddr BLOB;
ALTER TABLE flows ADD COLUMN nat_raddr BLOB;
ALTER TABLE flows ADD COLUMN nat_lport INTEGER DEFAULT 0;
ALTER TABLE flows ADD COLUMN nat_rport INTEGER DEFAULT 0;
"""
"""What NAT made of the ends: addresses NULL and ports 0 if nothing is known."""
_FROM_5 = """
ALTER TABLE flows ADD COLUMN rtt_us INTEGER DEFAULT 0;
ALTER TABLE flows ADD COLUMN retransmits INTEGER DEFAULT 0;
ALTER TABLE flows ADD COLUMN tcp_in INTEGER DEFAULT 0;
ALTER TABLE flows ADD COLUMN tcp_out INTEGER DEFAULT 0;
"""
_FROM_6 = """
CREATE TABLE IF NOT EXISTS sightings (
    kind TEXT, name TEXT, uid INTEGER, first INTEGER, last INTEGER, before INTEGER,
    tgid INTEGER, start_ns INTEGER, about TEXT,
    UNIQUE (kind, name, uid)
);
CREATE INDEX IF NOT EXISTS sightings_first ON sightings (kind, first);
CREATE INDEX IF NOT EXISTS sightings_uid ON sightings (uid, last);
CREATE TABLE IF NOT EXISTS sightings_began (began REAL);
INSERT INTO sightings_began VALUES ((julianday('now') - 2440587.5) * 86400.0);
"""
"""See daemon.history.sightings."""
STEPS = (_CREATE, _FROM_1, _FROM_2, _FROM_3, _FROM_4, _FROM_5, _FROM_6)
"""STEPS[n:] bring a file of schema n to ours."""
SCHEMA = len(STEPS)
INDEXES = {
    "flows_lport": "lport, last_ns",
    "flows_rport": "rport, last_ns",
    "flows_ends": "lport, rport, last_ns",
    "flows_tgid": "tgid, last_ns",
    "flows_last": "last_ns",
    "flows_payer": "payer, seen",
    "flows_nat": "nat_lport, nat_rport) WHERE (nat_lport <> 0",
}
FLOW_COLUMNS = tuple(name for name in FLOW.names or () if name not in ("hash", "opened"))
_NAT = ("nat_laddr", "nat_raddr")
_NO_ADDRESS = bytes(16)
_WRITTEN = (*FLOW_COLUMNS, "payer", "seen")
_UPDATED = (
    "how flags uid inode comm domain nat_laddr nat_raddr nat_lport nat_rport first_ns last_ns"
    " packets_in bytes_in packets_out bytes_out payer seen"
    " rtt_us retransmits tcp_in tcp_out"
).split()
_FLOW_VALUES = f"(?{', ?' * len(_WRITTEN)})"
_WRITE_FLOWS = (
    f"INSERT INTO flows (id, {', '.join(_WRITTEN)}) VALUES {{}} ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _UPDATED)
)
_TOGETHER = 16
"""Flows of a statement. At its end the thread waits for Python's lock."""
WRITE_PROCESS = (
    "INSERT OR REPLACE INTO processes (tgid, start_ns, seen, details, payer, size)"
    " VALUES (?, ?, ?, ?, ?, ?)"
)
HAS_PROCESS = "SELECT 1 FROM processes WHERE tgid = ? AND start_ns = ?"
ROW_SIZE = 280
"""Bytes of a flow, including its index entries."""


def write_flows(
    writer: sqlite3.Connection, ids: np.ndarray, flows: np.ndarray, *more: np.ndarray
) -> None:
    """Insert or update FLOWs; `more` has the columns that they lack."""
    rows = _rows_of(ids, flows, *more)
    while some := list(itertools.islice(rows, _TOGETHER)):
        statement = _WRITE_FLOWS.format(", ".join([_FLOW_VALUES] * len(some)))
        writer.execute(statement, list(itertools.chain.from_iterable(some)))


def _rows_of(ids: np.ndarray, flows: np.ndarray, *more: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Return values for _WRITE_FLOWS. SQLite's integers are signed."""
    columns: list[list[Any]] = [ids.tolist()]
    for name in FLOW_COLUMNS:
        column = np.ascontiguousarray(flows[name])
        if column.ndim == 2:
            raw = column.tobytes()
            parts: list[bytes | None] = [raw[at : at + 16] for at in range(0, len(raw), 16)]
            if name in _NAT:
                parts = [None if one == _NO_ADDRESS else one for one in parts]
            columns.append(parts)
        elif column.dtype.kind == "u" and column.dtype.itemsize == 8:
            columns.append(column.view(np.int64).tolist())
        else:
            columns.append(column.tolist())
    return zip(*columns, *(column.tolist() for column in more), strict=True)


def flows_of(rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    flows = np.zeros(len(rows), FLOW)
    for position, name in enumerate(FLOW_COLUMNS, 1):
        values = [row[position] for row in rows]
        if FLOW[name].ndim:
            raw = b"".join([one or _NO_ADDRESS for one in values])
            flows[name] = np.frombuffer(raw, np.uint64).reshape(-1, 2)
        elif FLOW[name] == np.uint64:
            flows[name] = np.array(values, np.int64).view(np.uint64)
        else:
            flows[name] = values
    return flows


def columns_of(rows: Sequence[tuple[Any, ...]], but: np.ndarray) -> dict[str, np.ndarray]:
    """Return columns of rows of USED, without the ids `but`."""
    found: dict[str, np.ndarray] = {}
    for name, values in zip(USED, zip(*rows, strict=True), strict=True):
        if name == "comm":
            found[name] = np.array(values, "S16")
        else:
            found[name] = np.array(values, np.int64).view(np.uint64)
    stays = ~np.isin(found["id"], but)
    return {name: column[stays] for name, column in found.items()}


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
