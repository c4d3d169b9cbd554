# SPDX-License-Identifier: MIT
"""The history's file: SQLite in WAL mode, written in batches, read on a connection of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from daemon.history import Question, network_words
from nlproto.errors import Error
from nlproto.flows import FLOW
from nlproto.processes import Process

__all__ = ["Store"]

_SCHEMA = 1
_CREATE = """
CREATE TABLE flows (
    id INTEGER PRIMARY KEY,
    cookie INTEGER, start_ns INTEGER, laddr BLOB, raddr BLOB, tgid INTEGER, netns INTEGER,
    lport INTEGER, rport INTEGER, proto INTEGER, family INTEGER, forwarded INTEGER,
    how INTEGER, flags INTEGER, uid INTEGER, inode INTEGER, comm BLOB,
    first_ns INTEGER, last_ns INTEGER,
    packets_in INTEGER, bytes_in INTEGER, packets_out INTEGER, bytes_out INTEGER
);
CREATE INDEX flows_lport ON flows (lport, last_ns);
CREATE INDEX flows_rport ON flows (rport, last_ns);
CREATE INDEX flows_tgid ON flows (tgid, last_ns);
CREATE INDEX flows_comm ON flows (comm, last_ns);
CREATE INDEX flows_last ON flows (last_ns);
CREATE TABLE processes (
    tgid INTEGER, start_ns INTEGER, seen REAL, details BLOB,
    PRIMARY KEY (tgid, start_ns)
) WITHOUT ROWID;
CREATE INDEX processes_seen ON processes (seen);
"""
_COLUMNS = tuple(FLOW.names or ())[1:]
_UPDATED = (
    "how flags uid inode comm first_ns last_ns packets_in bytes_in packets_out bytes_out"
).split()
_WRITE_FLOW = (
    f"INSERT INTO flows (id, {', '.join(_COLUMNS)}) VALUES (?{', ?' * len(_COLUMNS)})"
    " ON CONFLICT (id) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in _UPDATED)
)
_WRITE_PROCESS = "INSERT OR REPLACE INTO processes VALUES (?, ?, ?, ?)"
_BUSY = 5000  # ms

log = logging.getLogger(__name__)


class Store:
    """Flows and processes in the file at `path`, mode 0640.

    A file that SQLite cannot read is renamed to PATH.corrupt-TIME, with a message, and a new one
    begun. Raises Error when there can be no file at all. write, trim and close belong to one
    thread; ask and process to any.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.set_aside: str | None = None
        """Where a corrupt file went."""
        self._reading = threading.Lock()
        self._writer, self._reader = self._open()

    def _open(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        try:
            os.makedirs(os.path.dirname(self.path), 0o750, exist_ok=True)
            try:
                return self._connect()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError) and os.path.exists(self.path):
                    raise
                self._quarantine(error)
                return self._connect()
        except (OSError, sqlite3.Error) as error:
            raise Error(
                f"history {self.path}: {error}; check 'history' in the configuration"
            ) from None

    def _connect(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o600)
        os.fchmod(descriptor, 0o640)
        os.close(descriptor)
        writer = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            writer.execute(f"PRAGMA busy_timeout = {_BUSY}")
            writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
            writer.execute("PRAGMA journal_mode = WAL")
            writer.execute("PRAGMA synchronous = NORMAL")
            (state,) = writer.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
            (version,) = writer.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA):
                raise sqlite3.DatabaseError(f"schema {version} is not {_SCHEMA}")
            if version == 0:
                writer.executescript(f"BEGIN; {_CREATE} PRAGMA user_version = {_SCHEMA}; COMMIT;")
            # also in files of versions that did not have it
            writer.execute("CREATE INDEX IF NOT EXISTS flows_ends ON flows (lport, rport, last_ns)")
            writer.execute("SELECT last_ns FROM flows LIMIT 1").fetchone()
            writer.execute("SELECT seen FROM processes LIMIT 1").fetchone()
            reader = sqlite3.connect(
                f"file:{_quoted(self.path)}?mode=ro", uri=True, check_same_thread=False
            )
            reader.execute(f"PRAGMA busy_timeout = {_BUSY}")
        except BaseException:
            writer.close()
            raise
        return writer, reader

    def _quarantine(self, error: Exception) -> None:
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + suffix, aside + suffix)
        os.rename(self.path, aside)
        self.set_aside = aside
        log.error(
            "history %s cannot be read (%s); kept as %s, a new one begins", self.path, error, aside
        )

    def close(self) -> None:
        with self._reading:
            self._reader.close()
        with contextlib.suppress(sqlite3.Error):
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.close()

    def last_id(self) -> int:
        return int(self._one("SELECT coalesce(max(id), 0) FROM flows"))

    def last_seen_ns(self) -> int:
        return int(self._one("SELECT coalesce(max(last_ns), 0) FROM flows"))

    def first_seen_ns(self) -> int:
        return int(self._one("SELECT coalesce(min(last_ns), ?) FROM flows", time.time_ns()))

    def _one(self, query: str, *values: Any) -> Any:
        with self._reading:
            (value,) = self._reader.execute(query, values).fetchone()
        return value

    def figures(self) -> dict[str, Any]:
        try:
            size = sum(
                os.stat(self.path + suffix).st_size
                for suffix in ("", "-wal")
                if os.path.exists(self.path + suffix)
            )
        except OSError:
            size = 0
        return {"bytes": size}

    def write(self, ids: np.ndarray, flows: np.ndarray, processes: Sequence[Process]) -> None:
        """Insert or update in one transaction. Raises Error; then nothing was written."""
        if not len(ids) and not processes:
            return
        now = time.time()
        details = [
            (one.tgid, _signed(one.start_ns), now, msgspec.json.encode(one)) for one in processes
        ]
        with self._transaction() as writer:
            writer.executemany(_WRITE_FLOW, _rows(ids, flows))
            writer.executemany(_WRITE_PROCESS, details)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise Error(f"{self.path}: {error}; check disk space and permissions") from None

    def trim(self, age: float, size: int) -> int:
        """Delete flows not seen for `age` seconds, then the oldest down to `size` bytes."""
        before = int((time.time() - age) * 1e9)
        with self._transaction() as writer:
            gone = writer.execute("DELETE FROM flows WHERE last_ns < ?", (before,)).rowcount
            writer.execute("DELETE FROM processes WHERE seen < ?", (time.time() - age - 86400,))
        while self._used_bytes() > size:
            with self._transaction() as writer:
                (count,) = writer.execute("SELECT count(*) FROM flows").fetchone()
                part = max(1, count // 16)
                deleted = writer.execute(
                    "DELETE FROM flows WHERE id IN (SELECT id FROM flows ORDER BY last_ns LIMIT ?)",
                    (part,),
                ).rowcount
            gone += deleted
            if not deleted:
                break
        try:
            # execute() would stop after the first page: this statement has steps but no columns
            self._writer.executescript("PRAGMA incremental_vacuum")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            raise Error(f"{self.path}: {error}") from None
        return gone

    def _used_bytes(self) -> int:
        def pragma(name: str) -> int:
            return int(self._writer.execute(f"PRAGMA {name}").fetchone()[0])

        return (pragma("page_count") - pragma("freelist_count")) * pragma("page_size")

    def ask(self, question: Question, until_ns: int) -> list[tuple[int, np.void]]:
        """(id, FLOW) last seen at `until_ns` or before, newest first, `limit` and one more."""
        wheres, values = _conditions(question)
        wheres.append("last_ns <= ?")
        values.append(until_ns)
        columns = ", ".join(("id", *_COLUMNS))
        parts, all_values = [], []
        for words, own in _ways(question):
            conditions = " AND ".join([*words, *wheres])
            parts.append(
                f"SELECT * FROM (SELECT {columns} FROM flows WHERE {conditions}"
                " ORDER BY last_ns DESC LIMIT ?)"
            )
            all_values += [*own, *values, question.limit + 1]
        query = " UNION ALL ".join(parts)
        try:
            with self._reading:
                rows = self._reader.execute(query, all_values).fetchall()
        except sqlite3.Error as error:
            raise Error(f"history {self.path}: {error}") from None
        flows = _flows(rows)
        order = np.argsort(flows["last_ns"], kind="stable")[::-1][: question.limit + 1]
        return [(rows[index][0], flows[index]) for index in order.tolist()]

    def process(self, tgid: int, start_ns: int) -> Process | None:
        query = "SELECT details FROM processes WHERE tgid = ? AND start_ns = ?"
        try:
            with self._reading:
                row = self._reader.execute(query, (tgid, _signed(start_ns))).fetchone()
            return None if row is None else msgspec.json.decode(row[0], type=Process)
        except (sqlite3.Error, msgspec.DecodeError, msgspec.ValidationError) as error:
            log.warning("history %s: %s", self.path, error)
            return None


def _ways(question: Question) -> list[tuple[list[str], list[Any]]]:
    """Conditions and values that exclude each other, each with an index of its own."""
    if question.ends is not None:
        words = "lport = ? AND rport = ? AND family = ? AND laddr = ? AND raddr = ?"
        (family, one, port), (_, other, far) = question.ends
        ways = [(port, far, family, one, other), (far, port, family, other, one)]
        return [([words], list(way)) for way in dict.fromkeys(ways)]
    if question.port is not None:
        port = question.port
        return [(["lport = ?"], [port]), (["rport = ? AND lport <> ?"], [port, port])]
    return [([], [])]


def _conditions(question: Question) -> tuple[list[str], list[Any]]:
    wheres: list[str] = []
    values: list[Any] = []
    for name, value in (
        ("proto", question.proto),
        ("tgid", question.pid),
        ("comm", question.comm),
        ("uid", question.uid),
    ):
        if value is not None:
            wheres.append(f"{name} = ?")
            values.append(value)
    if question.uid is not None:
        wheres.append("tgid <> 0")
    if question.ends is not None and question.port is not None:
        wheres.append("? IN (lport, rport)")
        values.append(question.port)
    if question.since_ns is not None:
        wheres.append("last_ns >= ?")
        values.append(question.since_ns)
    if question.at_ns is not None:
        wheres.append("first_ns <= ? AND last_ns >= ?")
        values += [question.at_ns, question.at_ns]
    if question.host is not None:
        family, _, _ = network_words(question.host)
        low = question.host.network_address.packed.ljust(16, b"\0")
        high = question.host.broadcast_address.packed.ljust(16, b"\0")
        near = "raddr BETWEEN ? AND ? OR forwarded AND laddr BETWEEN ? AND ?"
        wheres.append(f"family = ? AND ({near})")
        values += [family, low, high, low, high]
    return wheres, values


def _rows(ids: np.ndarray, flows: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Values for _WRITE_FLOW; SQLite's integers are signed."""
    columns: list[list[Any]] = [ids.tolist()]
    for name in _COLUMNS:
        column = np.ascontiguousarray(flows[name])
        if column.ndim == 2:
            raw = column.tobytes()
            columns.append([raw[at : at + 16] for at in range(0, len(raw), 16)])
        elif column.dtype.kind == "u" and column.dtype.itemsize == 8:
            columns.append(column.view(np.int64).tolist())
        else:
            columns.append(column.tolist())
    return zip(*columns, strict=True)


def _flows(rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    flows = np.zeros(len(rows), FLOW)
    for position, name in enumerate(_COLUMNS, 1):
        values = [row[position] for row in rows]
        if FLOW[name].ndim:
            flows[name] = np.frombuffer(b"".join(values), np.uint64).reshape(-1, 2)
        elif FLOW[name] == np.uint64:
            flows[name] = np.array(values, np.int64).view(np.uint64)
        else:
            flows[name] = values
    return flows


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
