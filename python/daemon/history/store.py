# SPDX-License-Identifier: MIT
"""The history's files: a database (SQLite in WAL mode), which is written, and sealed hours.

The database is read on a connection of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from daemon.history.details import Group, Place, add_all, encoded, space, sums
from daemon.history.hours import HourFile, Hours
from daemon.history.memory import USED, Question, payers_of
from daemon.history.query import conditions, ways
from daemon.history.schema import (
    APPLICATION,
    FLOW_COLUMNS,
    HAS_PROCESS,
    INDEXES,
    SCHEMA,
    STEPS,
    WRITE_PROCESS,
    columns_of,
    flows_of,
    signed,
    write_flows,
)
from daemon.history.sealing import LEAST, MOST, Changing, Meanwhile, drop, nothing, seal, shorten
from daemon.history.sightings import Sighting, note
from daemon.history.trim import trim
from daemon.system.directory import HeldDirectory
from nlproto.errors import Error, UsageError
from nlproto.records.elapsed import Elapsed, Moment, read_moment
from nlproto.tables.processes import Process
from nlproto.tables.shares import NOBODY, Payers

__all__ = ["OWN_DIRECTORY", "Damaged", "Store"]

OWN_DIRECTORY = "/var/lib/packet-hunter"
"""The only directory that is made if it does not exist."""

_BUSY = 5000  # ms
_AT_ONCE = 10_000  # rows read at a time
_STEPS = 20_000
"""Steps of SQLite's machine, some ms, between two checks whether the answer is still wanted."""
_AGED = 3600  # s at most between two searches for old rows: each reads a whole index

log = logging.getLogger(__name__)

KnownProcess = Callable[[int, int], Process | None]


class Damaged(Error):
    """The file is damaged. A new Store sets it aside."""


class Store:
    """Flows and processes in the file at `path`, mode 0640.

    If SQLite cannot read a file of ours, it is renamed to PATH.corrupt-TIME with a message. Then a
    new one is begun. Another program's database is left alone. Raises Error if no file is
    possible, UsageError if its directory does not exist. write, trim and close are for one thread,
    ask and process for any.
    """

    def __init__(
        self,
        path: str,
        payers: Payers | None = None,
        moment: Callable[[], Moment] = read_moment,
    ) -> None:
        self.path = path
        self.set_aside: str | None = None
        """The new name of a corrupt file."""
        self._payers = payers
        self._moment = moment
        self._aged = (-1.0, 0)
        """The age and the time of the last search for old rows."""
        self._reading = threading.Lock()
        self._moving = threading.Lock()
        """Held while rows move from the database to a file."""
        self._file = -1
        try:
            self._place = HeldDirectory(path, OWN_DIRECTORY, 0o750)
        except FileNotFoundError as error:
            raise UsageError(f"history {path}: {error.strerror}") from None
        except OSError as error:
            raise self._unusable(error) from None
        try:
            self._writer, self._reader = self._open()
            self._elapsed = self._begin()
        except BaseException:
            self._let_go()
            self._place.close()
            raise

    def _unusable(self, error: Exception) -> Error:
        why = error.strerror if isinstance(error, OSError) else error
        return Error(f"history {self.path}: {why}; check 'history' in the configuration")

    def _open(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        try:
            if self._place.loose:
                raise OSError(errno.EPERM, "others can replace files in its directory")
            try:
                return self._connect()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
                    raise
                self._quarantine(error)
                return self._connect()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def _connect(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        self._file = self._place.open_file(0o640)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another daemon writes it") from None
        writer = sqlite3.connect(self._place.path, isolation_level=None, check_same_thread=False)
        try:
            writer.execute(f"PRAGMA busy_timeout = {_BUSY}")
            version = self._version(writer)
            if version == 0:
                writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
            writer.execute("PRAGMA journal_mode = WAL")
            writer.execute("PRAGMA synchronous = NORMAL")
            (state,) = writer.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
            if version < SCHEMA:
                steps = "".join(STEPS[version:])
                writer.executescript(
                    f"BEGIN; {steps} PRAGMA application_id = {APPLICATION};"
                    f" PRAGMA user_version = {SCHEMA}; COMMIT;"
                )
            writer.execute("SELECT payer, seen FROM flows LIMIT 1").fetchone()
            writer.execute("SELECT payer, seen FROM processes LIMIT 1").fetchone()
            # files of older versions lack these
            for name, fields in INDEXES.items():
                writer.execute(f"CREATE INDEX IF NOT EXISTS {name} ON flows ({fields})")
            self.hours = Hours(self._place, self.path)
            writer.execute("BEGIN IMMEDIATE")
            self.hours.begin(writer)
            writer.execute("COMMIT")
            reader = self._connect_reader()
        except BaseException:
            writer.close()
            self._let_go()
            raise
        return writer, reader

    def _let_go(self) -> None:
        """After SQLite: closing any descriptor of a file drops all POSIX locks on it."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _version(self, writer: sqlite3.Connection) -> int:
        """Return the file's schema, 0 for a new file. Raises OSError for another program's."""
        tables = {name for (name,) in writer.execute("SELECT name FROM sqlite_master")}
        (application,) = writer.execute("PRAGMA application_id").fetchone()
        (version,) = writer.execute("PRAGMA user_version").fetchone()
        ours = application == APPLICATION or {"flows", "processes"} <= tables
        if tables and not ours:
            raise OSError(errno.EEXIST, "this is another program's database")
        if version not in range(SCHEMA + 1) or (version > 0) != bool(tables):
            raise sqlite3.DatabaseError(f"schema {version} is not {SCHEMA}")
        return int(version)

    def _begin(self) -> Elapsed:
        """Continue the clock from where the last daemon left it."""
        row = self._one_row("SELECT boot_id, boot, uptime, real, seconds FROM elapsed")
        if row is None:
            return Elapsed(read=self._moment)
        elapsed = Elapsed(row[4], Moment(*row[:4]), self._moment)
        elapsed.look()
        return elapsed

    def _quarantine(self, error: Exception) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        for number in itertools.count():
            ending = f".corrupt-{stamp}" + (f"-{number}" if number else "")
            if self._place.stat(ending) is None:
                break
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                self._place.rename(self._place.name + ending, suffix)
        self.set_aside = aside = self.path + ending
        log.error(
            "history %s cannot be read (%s); kept as %s, a new one begins", self.path, error, aside
        )

    def close(self) -> None:
        with self._reading:
            self._reader.close()
        with contextlib.suppress(sqlite3.Error):
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.close()
        self._let_go()
        self._place.close()

    def last_id(self) -> int:
        sealed = max((piece.last_id for piece in self.hours.pieces), default=0)
        return max(sealed, int(self._one("SELECT coalesce(max(id), 0) FROM flows")))

    def last_seen_ns(self) -> int:
        sealed = max((piece.newest_ns for piece in self.hours.pieces), default=0)
        return max(sealed, int(self._one("SELECT coalesce(max(last_ns), 0) FROM flows")))

    def first_seen_ns(self) -> int:
        first = int(self._one("SELECT coalesce(min(last_ns), ?) FROM flows", time.time_ns()))
        return min([first, *(piece.oldest_ns for piece in self.hours.pieces)])

    def _one(self, query: str, *values: Any) -> Any:
        row = self._one_row(query, *values)
        return None if row is None else row[0]

    def _one_row(self, query: str, *values: Any) -> Any:
        try:
            with self._reading:
                return self._reader.execute(query, values).fetchone()
        except sqlite3.Error as error:
            raise Error(f"history {self.path}: {error}") from None

    def size(self) -> int:
        """Return bytes of the database, its journal and the sealed files."""
        found = [self._place.stat(suffix) for suffix in ("", "-wal")]
        return self.hours.size + sum(one.st_size for one in found if one is not None)

    def room(self) -> int:
        """Return bytes of the file system that are free for us. Raises Error."""
        try:
            found = os.fstatvfs(self._place.fd)
        except OSError as error:
            raise Error(f"{self.path}: {error.strerror}") from None
        return found.f_bavail * found.f_frsize

    def identity(self) -> bytes:
        """Return the file's identity. Inodes are used again."""
        return bytes(self._one("SELECT name FROM identity"))

    def in_place(self) -> bool:
        """Return whether the file is still where it was opened."""
        found = self._place.stat()
        return found is not None and os.path.samestat(found, os.fstat(self._file))

    def write(
        self,
        ids: np.ndarray,
        flows: np.ndarray,
        processes: Sequence[Process],
        known: KnownProcess = lambda tgid, start_ns: None,
        text_of: Callable[[int], str] = lambda number: "",
        listeners: Sequence[Sighting] = (),
    ) -> None:
        """Insert or update in one transaction. Raises Error; then nothing was written.

        `known` has the owners of `flows`: details that the file lacks are written too. `text_of`
        has the names of their far ends.
        """
        if not len(ids) and not processes and not listeners:
            return
        with self.transaction() as writer:
            now = self.mark_time()
            payers = payers_of(flows["tgid"], flows["uid"], self._payers)
            seen = np.full(len(flows), now, np.int64)
            write_flows(writer, ids, flows, payers, seen)
            numbers = np.unique(flows["domain"]).tolist()
            names = [(signed(one), name) for one in numbers if one and (name := text_of(one))]
            writer.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", names)
            note(writer, flows, listeners, text_of)
            written = {one.key for one in processes}
            owners = np.unique(flows[["tgid", "start_ns"]][flows["tgid"] != 0]).tolist()
            missing = [
                one
                for key in owners
                if key not in written
                and (one := known(*key)) is not None
                and writer.execute(HAS_PROCESS, (key[0], signed(key[1]))).fetchone() is None
            ]
            writer.executemany(
                WRITE_PROCESS, (self._details(one, now) for one in (*processes, *missing))
            )

    def _details(self, process: Process, now: int) -> tuple[Any, ...]:
        raw = encoded(process)
        payer = self._payers.of_one(process.uid) if self._payers is not None else process.uid
        payer = NOBODY if payer is None else payer
        return process.tgid, signed(process.start_ns), now, raw, payer, space(len(raw))

    def mark_time(self) -> int:
        """Store how long the history has lived, in seconds. Inside a transaction."""
        seconds = self._elapsed.look()
        moment = self._elapsed.moment
        values = (moment.boot_id, moment.boot, moment.uptime, moment.real, seconds)
        self._writer.execute("DELETE FROM elapsed")
        self._writer.execute("INSERT INTO elapsed VALUES (?, ?, ?, ?, ?)", values)
        return int(seconds)

    @contextlib.contextmanager
    def transaction(
        self, durable: bool = False, then: Sequence[Callable[[], None]] = ()
    ) -> Iterator[sqlite3.Connection]:
        """Run a transaction. Raises Error; then nothing was changed. Damaged: the file is broken.

        `durable`: its changes survive a loss of power. `then` is called at its end, at one moment
        with it for snapshot().
        """
        try:
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                with self._moving:
                    self._writer.execute("COMMIT")
                    for call in then:
                        call()
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            kind = Damaged if _is_damage(error) else Error
            raise kind(f"{self.path}: {error}; check disk space and permissions") from None

    def trim(self, age: float, size: int) -> int:
        """Delete what was not seen for `age` seconds of running, then shrink to `size` bytes.

        See daemon.history.trim and sealing. Returns how many flows were deleted. Raises Error.
        """
        with self.transaction():
            now = self.mark_time()
        old_age, looked = self._aged
        before = None
        gone = drop(self, now - math.ceil(age))
        if age != old_age or now - looked >= min(_AGED, age / 50):
            self._aged = age, now
            before = now - math.ceil(age)
            with self.transaction() as writer:
                writer.execute("DELETE FROM names WHERE id NOT IN (SELECT domain FROM flows)")
        # neither part can push out the other completely
        gone += shorten(self, max(size - self.used_bytes(), size // 4))
        return gone + trim(self, before, max(size - self.hours.size, size // 4))

    def seal(self, in_memory: Changing, most: int = MOST, meanwhile: Meanwhile = nothing) -> int:
        """See daemon.history.sealing. Returns how many flows were moved. Raises Error."""
        if self._one("SELECT count(*) FROM flows") < min(most, LEAST):
            return 0
        return seal(self, in_memory, most, meanwhile)

    def used_bytes(self) -> int:
        """Return the database's bytes without free pages. Raises Error."""
        with self.transaction() as writer:
            pages, free, size = (
                int(writer.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size

    def shrink(self) -> None:
        """Give free pages back to the file system. Raises Error."""
        try:
            # execute() would stop after the first page: this statement has steps but no columns
            self._writer.executescript("PRAGMA incremental_vacuum")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            raise Error(f"{self.path}: {error}") from None

    def ask(
        self, question: Question, until_ns: int, stop: Callable[[], None] = lambda: None
    ) -> list[tuple[int, np.void]]:
        """Return (id, FLOW) last seen at `until_ns` or before, newest first, `limit` and one more.

        `stop` is called every few ms, and ends this by raising.
        """
        wheres, values = conditions(question)
        wheres.append("last_ns <= ?")
        values.append(until_ns)
        columns = ", ".join(("id", *FLOW_COLUMNS))
        parts, all_values = [], []
        for words, own in ways(question):
            fits = " AND ".join([*words, *wheres])
            parts.append(
                f"SELECT * FROM (SELECT {columns} FROM flows WHERE {fits}"
                " ORDER BY last_ns DESC LIMIT ?)"
            )
            all_values += [*own, *values, question.limit + 1]
        query = " UNION ALL ".join(parts)
        rows, pieces = self._fetch(query, all_values, stop)
        flows = flows_of(rows)
        order = np.argsort(flows["last_ns"], kind="stable")[::-1][: question.limit + 1]
        found = [(rows[index][0], flows[index]) for index in order.tolist()]
        return self.hours.ask(question, until_ns, found, pieces, stop)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[tuple[sqlite3.Connection, tuple[HourFile, ...]]]:
        """Yield a reader and the files: each row is in one of them. Raises sqlite3.Error."""
        with contextlib.closing(self._connect_reader()) as reader:
            reader.isolation_level = None
            with self._moving:
                reader.execute("BEGIN")
                reader.execute("SELECT 1 FROM identity").fetchone()
                pieces = self.hours.pieces
            yield reader, pieces

    def usage(
        self,
        since_ns: int,
        but: np.ndarray,
        place_of: Callable[[tuple[int, int]], Place],
        stop: Callable[[], None],
    ) -> tuple[dict[Group, list[int]], dict[int, str]]:
        """Return sums of the flows last seen since then, without the ids `but`.

        Also returns names of far ends from the files. Raises Error.
        """
        found: dict[Group, list[int]] = {}
        names: dict[int, str] = {}
        query = f"SELECT {', '.join(USED)} FROM flows WHERE last_ns >= ?"
        try:
            with self.snapshot() as (reader, pieces):
                cursor = reader.execute(query, (since_ns,))
                while rows := cursor.fetchmany(_AT_ONCE):
                    stop()
                    add_all(found, sums(columns_of(rows, but), place_of))
        except sqlite3.Error as error:
            raise Error(f"history {self.path}: {error}") from None
        for one, told in self.hours.usage(pieces, since_ns, stop):
            add_all(found, one)
            names |= told
        if self.hours.pieces is pieces:
            return found, names
        return self.usage(since_ns, but, place_of, stop)  # a file may be removed before

    def _fetch(
        self, query: str, values: list[Any], stop: Callable[[], None]
    ) -> tuple[list[Any], tuple[HourFile, ...]]:
        """Open a connection of its own, so that questions do not wait for each other."""
        ended: list[BaseException] = []

        def is_over() -> bool:
            try:
                stop()
            except BaseException as error:
                ended.append(error)
            return bool(ended)

        try:
            with self.snapshot() as (reader, pieces):
                reader.set_progress_handler(is_over, _STEPS)
                return reader.execute(query, values).fetchall(), pieces
        except sqlite3.Error as error:
            if ended:
                raise ended[0] from None
            raise Error(f"history {self.path}: {error}") from None

    def _connect_reader(self) -> sqlite3.Connection:
        reader = sqlite3.connect(
            f"file:{self._place.path}?mode=ro", uri=True, check_same_thread=False
        )
        reader.execute(f"PRAGMA busy_timeout = {_BUSY}")
        return reader

    def name(self, number: int) -> str:
        """Return the name of the far end with this number in flows; "" if it is not here."""
        name: str | None = self._one("SELECT name FROM names WHERE id = ?", signed(number))
        return name or self.hours.name(number)

    def process(self, tgid: int, start_ns: int) -> Process | None:
        query = "SELECT details FROM processes WHERE tgid = ? AND start_ns = ?"
        try:
            with self._reading:
                row = self._reader.execute(query, (tgid, signed(start_ns))).fetchone()
            raw = self.hours.process((tgid, start_ns)) if row is None else row[0]
            return None if raw is None else msgspec.json.decode(raw, type=Process)
        except (sqlite3.Error, msgspec.DecodeError, msgspec.ValidationError) as error:
            log.warning("history %s: %s", self.path, error)
            return None


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
