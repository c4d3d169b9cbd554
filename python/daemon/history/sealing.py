# SPDX-License-Identifier: MIT
"""Moves rows from the history's database into sealed files, and removes rows from these."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from daemon.history.details import places_in, sums
from daemon.history.hours import HourFile, Hours
from daemon.history.schema import FLOW_COLUMNS, INDEXES, flows_of, signed
from daemon.history.sealed import Broken, Contents, Rows
from nlproto.errors import Error
from nlproto.tables.processes import ProcessKey

__all__ = ["Changing", "Sealing", "Meanwhile", "drop", "nothing", "seal", "shorten"]

MOST = 400_000
"""Rows of one file: an hour with 100 flows a second, and some more."""
LEAST = 16_384
_HOUR = 3600
_PIECE = 5_000  # rows read at a time
_PAUSE = 0.05  # s between two checks whether the file is complete

_ROWS = f"SELECT id, {', '.join(FLOW_COLUMNS)}, payer, seen FROM flows WHERE id BETWEEN ? AND ?"
_DETAILS = "SELECT details FROM processes WHERE tgid = ? AND start_ns = ?"
_NAME = "SELECT name FROM names WHERE id = ?"
_DELETE_FLOWS = "DELETE FROM flows WHERE id BETWEEN ? AND ?"
_DELETE_PROCESS = (
    "DELETE FROM processes WHERE tgid = ? AND start_ns = ? AND details = ? AND NOT EXISTS"
    " (SELECT 1 FROM flows WHERE flows.tgid = processes.tgid"
    " AND flows.start_ns = processes.start_ns)"
)


class Sealing(Protocol):
    """The part of the database that this needs (daemon.history.store.Store)."""

    @property
    def path(self) -> str: ...

    @property
    def hours(self) -> Hours: ...

    def transaction(
        self, durable: bool = False, then: Sequence[Callable[[], None]] = ()
    ) -> AbstractContextManager[sqlite3.Connection]: ...

    def mark_time(self) -> int: ...


Changing = Callable[[np.ndarray], np.ndarray]
Meanwhile = Callable[[], None]


def nothing() -> None:
    """Do nothing."""


def seal(
    store: Sealing, in_memory: Changing, most: int = MOST, meanwhile: Meanwhile = nothing
) -> int:
    """Move rows that will not change any more into a file, if there is an hour of them.

    `in_memory` says which ids may still change. `meanwhile` is called repeatedly outside of
    transactions, and may write. Returns how many rows were moved. Raises Error; then none was.
    """
    with store.transaction() as writer:
        now = store.mark_time()
        ids = np.array(writer.execute("SELECT id FROM flows ORDER BY id").fetchall(), np.int64)
        ids = ids.reshape(-1).astype(np.uint64)
        ids = ids[~in_memory(ids)][:most]
        if len(ids) < min(most, LEAST):
            return 0
        (seen,) = writer.execute("SELECT seen FROM flows WHERE id = ?", (int(ids[0]),)).fetchone()
        if len(ids) < most and now - seen < _HOUR:
            return 0
    rows = _rows(store, ids, meanwhile)
    with store.transaction() as writer:
        owners = set(zip(rows["tgid"].tolist(), rows["start_ns"].tolist(), strict=True))
        owners.discard((0, 0))
        details = dict(_details(writer, owners))
        names = dict(_names(writer, set(rows["domain"].tolist())))

    def write() -> HourFile:
        return store.hours.write(Contents(rows, details, sums(rows, places_in(details)), names))

    try:
        with futures.ThreadPoolExecutor(1, "sealing") as thread:
            written = thread.submit(write)
            while not futures.wait([written], _PAUSE).done:
                meanwhile()
            piece = written.result()
    except OSError as error:
        raise Error(f"{store.path}: no hour is sealed: {error.strerror}") from None
    with _entering(store, [piece]) as writer:
        # to build the indexes again takes less time than to remove so many rows from each
        for name in INDEXES:
            writer.execute(f"DROP INDEX {name}")
        writer.executemany(_DELETE_FLOWS, _runs(ids))
        for name, fields in INDEXES.items():
            writer.execute(f"CREATE INDEX {name} ON flows ({fields})")
        known = ((tgid, signed(start), told) for (tgid, start), told in details.items())
        writer.executemany(_DELETE_PROCESS, known)
    return len(ids)


@contextlib.contextmanager
def _entering(
    store: Sealing, new: Sequence[HourFile], old: Iterable[int] = ()
) -> Iterator[sqlite3.Connection]:
    """Run a transaction that changes the list; if it fails, its new files are removed."""
    then: list[Callable[[], None]] = []
    try:
        with store.transaction(durable=True, then=then) as writer:
            then.append(store.hours.change(writer, new, old))
            yield writer
    except Error:
        with contextlib.suppress(Error, OSError), store.transaction() as writer:
            for piece in new:
                store.hours.discard(writer, piece)
        raise


def _runs(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield first and last of runs of consecutive numbers; `ids` rise."""
    parts = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return ((int(part[0]), int(part[-1])) for part in parts)


def _rows(store: Sealing, ids: np.ndarray, meanwhile: Callable[[], None]) -> Rows:
    parts = []
    for at in range(0, len(ids), _PIECE):
        wanted = ids[at : at + _PIECE]
        meanwhile()
        with store.transaction() as writer:
            found = writer.execute(_ROWS, (int(wanted[0]), int(wanted[-1]))).fetchall()
        numbers = np.array([row[0] for row in found], np.uint64)
        keep = np.isin(numbers, wanted, assume_unique=True)
        flows = flows_of(found)[keep]
        part = {name: flows[name] for name in FLOW_COLUMNS}
        part["id"] = numbers[keep]
        part["payer"] = np.array([row[-2] for row in found], np.uint64)[keep]
        part["seen"] = np.array([row[-1] for row in found], np.int64)[keep]
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _details(
    writer: sqlite3.Connection, owners: set[ProcessKey]
) -> Iterator[tuple[ProcessKey, bytes]]:
    for tgid, start_ns in owners:
        found = writer.execute(_DETAILS, (tgid, signed(start_ns))).fetchone()
        if found is not None:
            yield (tgid, start_ns), bytes(found[0])


def _names(writer: sqlite3.Connection, numbers: set[int]) -> Iterator[tuple[int, str]]:
    for number in numbers:
        found = writer.execute(_NAME, (signed(number),)).fetchone()
        if found is not None:
            yield number, found[0]


def drop(store: Sealing, before: int) -> int:
    """Remove files whose rows were all last seen before that second. Raises Error."""
    old = set(store.hours.too_old(before))
    if not old:
        return 0
    gone = sum(piece.rows for piece in store.hours.pieces if piece.number in old)
    with _entering(store, (), old):
        return gone


def shorten(store: Sealing, keep: int) -> int:
    """Make the files smaller until they have `keep` bytes, so that no user's flood costs others.

    Returns how many rows were removed. Raises Error.
    """
    hours = store.hours
    if hours.size <= keep:
        return 0
    # a sixteenth at least, or files would be rewritten too often
    goes = hours.surplus(min(keep, hours.size * 15 // 16))
    gone = 0
    for piece in hours.pieces:
        which = goes.get(piece.number)
        if which is None:
            continue
        try:
            contents = hours.without(piece, which)
            new = [] if contents is None else [hours.write(contents)]
        except Broken:
            new = []  # nobody can read it, and it takes up room
        except OSError as error:
            raise Error(f"{store.path}: no hour is shortened: {error.strerror}") from None
        with _entering(store, new, [piece.number]):
            pass
        gone += piece.rows - sum(one.rows for one in new)
    return gone
