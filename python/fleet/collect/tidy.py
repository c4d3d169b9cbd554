# SPDX-License-Identifier: MIT
"""What a folder of hours needs from time to time: small files become few, an hour is summed up,
what is old goes."""

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
from fleet.collect.keys import Keys
from fleet.collect.parquet import ParquetStore, keys_of, parts, sync, write_file
from fleet.collect.rollup import write_day, write_rollup
from fleet.collect.tables import in_order
from nlproto.errors import Error

__all__ = ["Tidier"]

_EVERY = 60.0  # s
_SMALL = 250_000
"""Rows of a file that is put together with others."""
_MANY = 32
"""Small files in an hour that is still written."""
_FEW = 4
"""In one that is over."""
_AT_ONCE = 1_000_000
"""Rows that are put together: what memory has to hold."""
_SETTLED_NS = 600 * 10**9
"""After its end nearly everything of an hour has come."""
_LEFT_NS = 3600 * 10**9
"""A file that is written so long has nobody who writes it."""
_AT_FDCWD, _EXCHANGE = -100, 2  # fcntl.h; linux/fs.h, RENAME_EXCHANGE

_libc = ctypes.CDLL(None, use_errno=True)


class Tidier:
    """Tidies the folder of `store`. `keep_sums_s`: seconds for which sums of hours are kept.

    Of several collectors one does it at a time. A reader who has listed files may find one gone,
    and lists again; no row is ever there twice or not at all.
    """

    def __init__(self, store: ParquetStore, keep_sums_s: float) -> None:
        self._store = store
        self._keep_sums_s = keep_sums_s
        self._due = 0.0

    def tidy(self) -> None:
        """Do a little, if it is time for it. Raises Error."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _EVERY
        with self._alone() as alone:
            if alone:
                try:
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
        self.retire(now_ns)
        for kind in schema.TABLES:
            for folder in _hours(self._store.directory / kind):
                over = schema.hour_ns(folder.name) + schema.HOUR_NS + _SETTLED_NS < now_ns
                self.compact(folder, _FEW if over else _MANY)
                if over and kind == "flows":
                    write_rollup(self._store.directory, folder.name)
        hours = [schema.hour_ns(path.name) for path in _hours(self._store.directory / "rollup")]
        for name in sorted(set(map(schema.day_name, hours))):
            if schema.day_ns(name) + schema.DAY_NS + _SETTLED_NS < now_ns:
                write_day(self._store.directory, name)

    def retire(self, now_ns: int) -> None:
        """Remove hours that are too old, and what killed collectors left."""
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
        """Put small files together if there are `least`; whether that was done.

        The folder with the new file takes the place of the old one in one step.
        """
        before = {path.name for path in parts(folder)}
        small, rows = [], 0
        for name in sorted(before):
            count = pq.read_metadata(folder / name).num_rows
            if count < _SMALL and rows + count <= _AT_ONCE:
                small.append(name)
                rows += count
        if len(small) < least:
            return False
        directory = self._store.directory
        fresh = directory / f".old-{folder.parent.name}-{folder.name}-{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        keys = Keys()
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
            for path in folder.iterdir():  # hidden ones, too: somebody writes them
                if path.name not in small:
                    os.link(path, fresh / path.name)
            sync(fresh)
            _exchange(fresh, folder)
            sync(folder.parent)
            sync(directory)
        shutil.rmtree(fresh)
        return True


def _hours(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("hour=*")) if schema.is_hour(path.name)]


def _exchange(one: Path, other: Path) -> None:
    """Each gets the other's name, in one step (renameat2(2)). Raises OSError."""
    names = os.fsencode(one), os.fsencode(other)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
