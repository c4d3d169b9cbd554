# SPDX-License-Identifier: MIT
"""Batches that the server has not acknowledged, and the account, in one file (SQLite).

    exported = acknowledged + spooled + lost        in rows of flows

Each step of a batch is one transaction, which is on the disk when it returns. So the account closes
whenever this program is killed, and goes on when it starts again. Only flows that were put here
count as exported.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from nlproto.errors import Error
from nlproto.records.elapsed import Moment, read_moment
from nlproto.running.surroundings import is_loose

__all__ = ["Pending", "Spool", "SpoolFull", "Totals"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    sequence INTEGER PRIMARY KEY, kind INTEGER, rows INTEGER, payload BLOB);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER);
CREATE TABLE IF NOT EXISTS last_put (boot_id TEXT, boot REAL, uptime REAL, real REAL);
"""
_NAMES = ("sequence", "exported", "acknowledged", "lost", "gap_ms")
_PAGE = 16384
"""Small pages take twice the time: a batch of 4,000 rows has 150 kB."""
_JOURNAL = 256  # pages
_OVERHEAD = 200
"""Bytes of a batch beside its payload, with the average unused part of its last page."""
_MILLISECOND = 20
"""Bits of a sequence within one millisecond."""


class SpoolFull(Error):
    """The disk took nothing: the caller keeps the batches."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows of flows since the spool began; `sequence` is that of the last batch."""

    sequence: int
    exported: int
    acknowledged: int
    lost: int
    gap_ms: int
    spooled: int

    @property
    def closes(self) -> bool:
        """Whether the account closes."""
        return self.exported == self.acknowledged + self.spooled + self.lost


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch that waits for its acknowledgement."""

    sequence: int
    kind: int
    rows: int
    payload: bytes


Make = Callable[[int], Pending]
"""Makes a batch with a given sequence."""


class Spool:
    """Holds at most `max_bytes` of batches in `directory`/spool.db. For one thread at a time.

    If it is full, the oldest batches are removed and count as lost. A damaged file is set aside. A
    new one begins with the present moment as its sequence, so that none is used twice. Raises
    Error.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        self.path = Path(directory) / "spool.db"
        self.max_bytes = max_bytes
        self.unsaved_lost = 0
        """Rows lost while the disk took nothing. The next step writes them into the file."""
        self.unsaved_gap_ms = 0
        self.damaged: Path | None = None
        """The new name of a damaged file."""
        try:
            if is_loose(directory):
                raise Error(f"others can write into {directory}; choose another spool")
            self._open()
        except (sqlite3.OperationalError, OSError) as error:
            hint = "another exporter uses it" if "locked" in str(error) else "see its directory"
            raise Error(f"cannot open {self.path}: {error}; {hint}") from None
        except sqlite3.DatabaseError:
            self._put_aside()
        self._bytes = self._sum("SUM(LENGTH(payload)) + COUNT(*) * ?", _OVERHEAD)
        before = self._database.execute("SELECT * FROM last_put").fetchone()
        if before is not None:  # nobody read the daemon since
            self.unsaved_gap_ms = round(read_moment().gap_since(Moment(*before)) * 1000)

    def _open(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
        self._database = sqlite3.connect(
            self.path, timeout=0.5, isolation_level=None, check_same_thread=False
        )
        run = self._database.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run(f"PRAGMA page_size = {_PAGE}")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA wal_autocheckpoint = {_JOURNAL}")
        run(f"PRAGMA journal_size_limit = {_JOURNAL * _PAGE}")
        run(f"PRAGMA max_page_count = {self.max_bytes * 2 // _PAGE + 256}")
        self._database.executescript(_SCHEMA)
        with self._transaction():
            begin = time.time_ns() // 10**6 << _MILLISECOND
            for name in _NAMES:
                value = begin if name == "sequence" else 0
                run("INSERT OR IGNORE INTO totals VALUES (?, ?)", (name, value))
        if run("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")

    def _put_aside(self) -> None:
        self._database.close()
        self.damaged = self.path.with_suffix(".damaged")
        os.replace(self.path, self.damaged)
        for ending in ("-wal", "-shm"):
            Path(f"{self.path}{ending}").unlink(missing_ok=True)
        self._open()

    def close(self) -> None:
        """Close. Everything is in the file already."""
        self._database.close()

    def put(self, makers: Sequence[Make]) -> list[Pending]:
        """Keep the batches that `makers` make with their sequences: all of them, or none.

        Raises SpoolFull.
        """
        before = self._bytes
        try:
            with self._transaction():
                made = self._put(makers)
        except sqlite3.Error as error:
            self._bytes = before
            raise SpoolFull(f"{self.path} takes nothing: {error}; see its disk") from None
        self.unsaved_lost = self.unsaved_gap_ms = 0
        return made

    def _put(self, makers: Sequence[Make]) -> list[Pending]:
        sequence = self._total("sequence")
        made = [make(sequence + number) for number, make in enumerate(makers, 1)]
        rows = sum(batch.rows for batch in made)
        self._bytes += sum(len(batch.payload) + _OVERHEAD for batch in made)
        lost = self.unsaved_lost + self._make_room()
        self._database.executemany(
            "INSERT INTO batches VALUES (?, ?, ?, ?)",
            [(batch.sequence, batch.kind, batch.rows, batch.payload) for batch in made],
        )
        self._add("sequence", len(made))
        self._add("exported", rows + self.unsaved_lost)
        self._add("lost", lost)
        self._add("gap_ms", self.unsaved_gap_ms)
        self._database.execute("DELETE FROM last_put")
        self._database.execute("INSERT INTO last_put VALUES (?, ?, ?, ?)", astuple(read_moment()))
        return made

    def _make_room(self) -> int:
        """Remove rows to make room. Returns how many."""
        lost = 0
        if self._bytes <= self.max_bytes:
            return 0
        last = 0
        for sequence, rows, size in self._database.execute(
            "SELECT sequence, rows, LENGTH(payload) FROM batches ORDER BY sequence"
        ):
            if self._bytes <= self.max_bytes:
                break
            self._bytes -= size + _OVERHEAD
            lost += rows
            last = sequence
        self._database.execute("DELETE FROM batches WHERE sequence <= ?", (last,))
        return lost

    def acknowledge(self, sequences: Sequence[int]) -> bool:
        """The server has these; return whether the disk took it. Missing ones were lost."""
        before = self._bytes
        try:
            with self._transaction():
                rows = 0
                for sequence in sequences:
                    found = self._database.execute(
                        "DELETE FROM batches WHERE sequence = ? RETURNING rows, LENGTH(payload)",
                        (sequence,),
                    ).fetchone()
                    if found is not None:
                        rows += found[0]
                        self._bytes -= found[1] + _OVERHEAD
                self._add("acknowledged", rows)
        except sqlite3.Error:
            self._bytes = before
            return False
        return True

    def oldest(self, count: int, after: int = 0) -> list[Pending]:
        """Return the next `count` batches after the sequence `after`."""
        return [
            Pending(*row)
            for row in self._database.execute(
                "SELECT sequence, kind, rows, payload FROM batches WHERE sequence > ?"
                " ORDER BY sequence LIMIT ?",
                (after, count),
            )
        ]

    def totals(self) -> Totals:
        """Return the account as it is now."""
        values = dict(self._database.execute("SELECT name, value FROM totals").fetchall())
        return Totals(
            sequence=values["sequence"],
            exported=values["exported"] + self.unsaved_lost,
            acknowledged=values["acknowledged"],
            lost=values["lost"] + self.unsaved_lost,
            gap_ms=values["gap_ms"] + self.unsaved_gap_ms,
            spooled=self._sum("SUM(rows)"),
        )

    def _sum(self, what: str, *values: int) -> int:
        row = self._database.execute(f"SELECT {what} FROM batches", values).fetchone()
        return int(row[0] or 0)

    def _total(self, name: str) -> int:
        row = self._database.execute("SELECT value FROM totals WHERE name = ?", (name,)).fetchone()
        return int(row[0])

    def _add(self, name: str, value: int) -> None:
        self._database.execute("UPDATE totals SET value = value + ? WHERE name = ?", (value, name))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
