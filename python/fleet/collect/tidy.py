# SPDX-License-Identifier: MIT
"""Keeps a folder of hours tidy: joins small files, sums hours up, removes old ones."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fleet import schema
from fleet.collect.known_batches import KnownBatches
from fleet.collect.parquet import ParquetStore, keys_of, parts, rows_in, sync, write_file
from fleet.collect.retention import RetentionClock
from fleet.collect.rollup import write_day, write_rollup
from fleet.collect.tables import in_order
from nlproto.errors import Error

__all__ = ["Tidier"]

_EVERY = 60.0  # s
_SMALL = 250_000
"""A file with fewer rows is joined with others."""
_MANY = 32
"""Small files that are joined in an hour that is still written."""
_FEW = 4
"""The same for an hour that is over."""
_AT_ONCE = 1_000_000
"""The most rows that are joined: they must fit into memory."""
_SETTLED_NS = 600 * 10**9
"""So long after its end nearly all of an hour has come."""
_LEFT_NS = 3600 * 10**9
"""A hidden file this old has no writer any more."""
_AT_FDCWD, _EXCHANGE = -100, 2  # fcntl.h; linux/fs.h, RENAME_EXCHANGE

_libc = ctypes.CDLL(None, use_errno=True)


class Tidier:
    """Tidies the folder of `store`. `keep_sums_s`: seconds for which sums of hours are kept.

    One of several collectors does it at a time. A reader may find that a listed file has gone, and
    lists again. No row is ever there twice, or missing.
    """

    def __init__(self, store: ParquetStore, keep_sums_s: float) -> None:
        self._store = store
        self._keep_sums_s = keep_sums_s
        self._due = 0.0
        self._clock = RetentionClock(store.directory / ".age")

    def tidy(self) -> None:
        """Do a little, if it is time. Raises Error."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _EVERY
        with self._alone() as alone:
            if alone:
                try:
                    self.retire(self._clock.look(_is_empty(self._store.directory)))
                    self._tidy(time.time_ns())
                except (OSError, pa.ArrowException) as error:
                    raise Error(f"{self._store.directory} was not tidied: {error}") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        path = self._store.directory / ".tidy"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)

    def _tidy(self, now_ns: int) -> None:
        failed = None
        for kind in schema.TABLES:
            for folder in _hours(self._store.directory / kind):
                try:
                    self._tidy_hour(folder, now_ns)
                except (Error, OSError, pa.ArrowException) as error:
                    failed = failed or error  # one damaged hour does not stop the others
        hours = [schema.hour_ns(path.name) for path in _hours(self._store.directory / "rollup")]
        for name in sorted(set(map(schema.day_name, hours))):
            if schema.day_ns(name) + schema.DAY_NS + _SETTLED_NS < now_ns:
                write_day(self._store.directory, name)
        if failed is not None:
            raise failed

    def _tidy_hour(self, folder: Path, now_ns: int) -> None:
        over = schema.hour_ns(folder.name) + schema.HOUR_NS + _SETTLED_NS < now_ns
        self.compact(folder, _FEW if over else _MANY)
        if over and folder.parent.name == "flows":
            write_rollup(self._store.directory, folder.name)

    def retire(self, now_ns: int) -> None:
        """Remove hours that are too old, and leftovers of killed collectors."""
        directory = self._store.directory
        keep = dict.fromkeys(schema.TABLES, self._store.keep_s) | {"rollup": self._keep_sums_s}
        for kind, seconds in keep.items():
            for folder in _hours(directory / kind):
                if schema.hour_ns(folder.name) + schema.HOUR_NS < now_ns - int(seconds * 1e9):
                    with self._store.locked():
                        os.rename(folder, directory / f".gone-{kind}-{folder.name}")
        for folder in (directory / "rollup").glob("day=*"):
            # with its first hour: the others are asked themselves
            if schema.day_ns(folder.name) + schema.HOUR_NS < now_ns - int(self._keep_sums_s * 1e9):
                os.rename(folder, directory / f".gone-rollup-{folder.name}")
        for path in [*directory.glob(".gone-*"), *directory.glob(".old-*")]:
            shutil.rmtree(path)
        for path in directory.glob("*/hour=*/.part-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime_ns < now_ns - _LEFT_NS:
                    path.unlink()

    def compact(self, folder: Path, least: int) -> bool:
        """Join small files if there are at least `least`. Returns whether it did.

        The folder with the new file replaces the old one in one step.
        """
        before = {path.name for path in parts(folder)}
        small, rows = [], 0
        for name in sorted(before):
            count = rows_in(folder / name)
            if count < _SMALL and rows + count <= _AT_ONCE:
                small.append(name)
                rows += count
        if len(small) < least:
            return False
        directory = self._store.directory
        fresh = directory / f".old-{folder.parent.name}-{folder.name}-{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        keys = KnownBatches()
        for name in small:
            keys.update(keys_of(folder / name))
        tables = [pq.read_table(folder / name, schema=None) for name in small]
        wanted = schema.TABLES[folder.parent.name]
        table = pa.concat_tables([one.cast(wanted) for one in tables]).unify_dictionaries()
        if folder.parent.name == "flows":
            table = in_order(table.combine_chunks())
        write_file(fresh / f"part-{time.time_ns():x}-together.parquet", table, keys)
        with self._store.locked():
            if {path.name for path in parts(folder)} != before:
                shutil.rmtree(fresh)
                return False
            for path in folder.iterdir():  # hidden ones too: somebody writes them
                if path.name not in small:
                    os.link(path, fresh / path.name)
            sync(fresh)
            _exchange(fresh, folder)
            sync(folder.parent)
            sync(directory)
        shutil.rmtree(fresh)
        return True


def _is_empty(directory: Path) -> bool:
    return not any(_hours(directory / kind) for kind in (*schema.TABLES, "rollup"))


def _hours(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("hour=*")) if schema.is_hour(path.name)]


def _exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step (renameat2(2)). Raises OSError."""
    names = os.fsencode(one), os.fsencode(other)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
