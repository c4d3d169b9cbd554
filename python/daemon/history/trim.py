# SPDX-License-Identifier: MIT
"""Removes old rows from the history's file, and rows of those who have too many.

A process is removed with its last flow. So that no flood deletes others' rows, the payer
(nlproto.tables.shares) with most bytes loses first: of its programs the one with most flows, of
that the process with most, of that the oldest flows.
"""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from daemon.history.schema import ROW_SIZE
from nlproto.tables.processes import ProcessKey
from nlproto.tables.shares import level, surplus

__all__ = ["Shrinking", "trim"]

_PIECE = 5000  # rows deleted in one transaction: a flush waits so long
_ROUNDS = 64

_ALONE = (
    "NOT EXISTS (SELECT 1 FROM flows"
    " WHERE flows.tgid = processes.tgid AND flows.start_ns = processes.start_ns)"
)
_OLD_FLOWS = "SELECT id FROM flows INDEXED BY flows_payer WHERE seen < ? LIMIT ?"
_OLD_PROCESSES = (
    "SELECT tgid, start_ns FROM processes INDEXED BY processes_payer"
    f" WHERE seen < ? AND {_ALONE} LIMIT ?"
)
_AT_ONCE = 1 << 20  # of these, so that one read of the index serves for many
_ALONE_OF = (
    f"SELECT tgid, start_ns, size FROM processes WHERE payer = ? AND {_ALONE} ORDER BY seen LIMIT ?"
)
_OLDEST_OF = "SELECT id, comm, tgid, start_ns FROM flows WHERE payer = ? ORDER BY seen, id LIMIT ?"
_DELETE_FLOW = "DELETE FROM flows WHERE id = ?"
_DELETE_PROCESS = f"DELETE FROM processes WHERE tgid = ? AND start_ns = ? AND {_ALONE}"


class Shrinking(Protocol):
    """The part of the file that this needs (daemon.history.store.Store)."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]: ...

    def used_bytes(self) -> int: ...

    def shrink(self) -> None: ...


def trim(store: Shrinking, before: int | None, size: int) -> int:
    """Delete what was last seen `before` that second (None: nothing), then shrink to `size` bytes.

    Returns how many flows were deleted. Raises Error.
    """
    gone = 0 if before is None else _drop_old(store, before)
    for _ in range(_ROUNDS):
        if store.used_bytes() <= size:
            break
        flows, anything = _shorten(store, size)
        gone += flows
        if not anything:
            break
    store.shrink()
    return gone


def _drop_old(store: Shrinking, before: int) -> int:
    gone = 0
    for query, delete in (
        (_OLD_FLOWS, _DELETE_FLOW),
        (_OLD_PROCESSES, _DELETE_PROCESS),
    ):
        found = [()]
        while found:
            with store.transaction() as writer:
                found = writer.execute(query, (before, _AT_ONCE)).fetchall()
            for at in range(0, len(found), _PIECE):
                with store.transaction() as writer:
                    writer.executemany(delete, found[at : at + _PIECE])
            gone += len(found) if query is _OLD_FLOWS else 0
    return gone


def _shorten(store: Shrinking, size: int) -> tuple[int, bool]:
    """Do one round. Returns (flows deleted, whether anything was)."""
    with store.transaction() as writer:
        counts = dict(writer.execute("SELECT payer, count(*) FROM flows GROUP BY payer"))
        details = dict(writer.execute("SELECT payer, sum(size) FROM processes GROUP BY payer"))
    used = store.used_bytes()
    shares = {
        payer: counts.get(payer, 0) * ROW_SIZE + details.get(payer, 0)
        for payer in counts.keys() | details.keys()
    }
    # a sixteenth at least, or there would be many small rounds
    stays = min(size, used - used // 16)
    allowed = level(shares, sum(shares.values()) * stays // used)
    flows, anything = 0, False
    for payer, share in shares.items():
        if share <= allowed:
            continue
        left = share - allowed
        freed = _drop_processes(store, payer, left)
        anything |= freed > 0
        left -= freed
        count = counts.get(payer, 0)
        if left <= 0 or not count:
            continue
        each = max(ROW_SIZE, (share - freed) // count)
        deleted = _drop_flows(store, payer, -(-left // each))
        flows += deleted
        anything |= deleted > 0
    return flows, anything


def _drop_processes(store: Shrinking, payer: int, wanted: int) -> int:
    """Delete processes without flows, the oldest first. Returns bytes freed, `wanted` or more."""
    freed = 0
    while freed < wanted:
        with store.transaction() as writer:
            keys: list[ProcessKey] = []
            found = writer.execute(_ALONE_OF, (payer, _PIECE)).fetchall()
            for tgid, start_ns, size in found:
                if freed >= wanted:
                    break
                keys.append((tgid, start_ns))
                freed += size
            writer.executemany(_DELETE_PROCESS, keys)
        if not keys:
            break
    return freed


def _drop_flows(store: Shrinking, payer: int, wanted: int) -> int:
    """Delete `wanted` of the payer's older flows. Returns how many were deleted."""
    window = min(max(4 * wanted, 2 * _PIECE), _AT_ONCE // 2)
    with store.transaction() as writer:
        rows = writer.execute(_OLDEST_OF, (payer, window)).fetchall()
    if not rows:
        return 0
    age = np.arange(len(rows))[::-1]
    programs = np.array([hash(row[1]) for row in rows], np.int64)
    processes = np.array([hash(row[1:]) for row in rows], np.int64)
    goes = surplus(age, (programs, processes), max(0, len(rows) - wanted))
    gone = [rows[index] for index in np.flatnonzero(goes).tolist()]
    for at in range(0, len(gone), _PIECE):
        piece = gone[at : at + _PIECE]
        with store.transaction() as writer:
            writer.executemany(_DELETE_FLOW, ((row[0],) for row in piece))
            writer.executemany(_DELETE_PROCESS, {row[2:] for row in piece})
    return len(gone)
