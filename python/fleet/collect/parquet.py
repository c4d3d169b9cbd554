# SPDX-License-Identifier: MIT
"""Hours of Parquet files in a folder that several collectors may share.

A file appears complete: it is written under a name that begins with a dot, synced, and renamed. Its
footer has the keys of its batches. Under the folder's lock a collector reads new footers. It
renames its own file only if none of them has one of its batches. So no batch is written twice, even
if a collector was killed before it acknowledged one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TypeVar

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.collect.known_batches import KnownBatches
from fleet.collect.tables import Hour, Received, Span, hours_of
from nlproto.errors import Error
from nlproto.running.surroundings import is_loose

__all__ = [
    "KEYS",
    "ParquetStore",
    "addresses_of",
    "hosts_in",
    "keys_of",
    "parts",
    "rows_in",
    "sync",
    "told",
    "write_file",
]

KEYS = b"packet-hunter.batches"
ADDRESSES = b"packet-hunter.addresses"
_MOST_ADDRESSES = 100_000
"""The most addresses in a footer. If there are more, the file itself is read."""
_T = TypeVar("_T")
_REMEMBERED = 64
"""How many folders' keys are kept in memory."""
_ROW_GROUP = 1 << 15
"""Rows in a group. Its least and greatest time, port and address say who need not read it."""
_COMPRESSION = "zstd"


class ParquetStore:
    """Writes into `directory`, for one thread. Rows older than `keep_s` seconds are not taken."""

    def __init__(self, directory: str | os.PathLike[str], keep_s: float) -> None:
        self.directory = Path(directory)
        self.keep_s = keep_s
        self._span = Span(keep_s)
        self.untimely = 0
        """Rows that were too old, or more than an hour ahead."""
        self.doubles = 0
        """Batches that were there already."""
        self._known: OrderedDict[Path, tuple[set[str], KnownBatches]] = OrderedDict()
        self._numbers = itertools.count()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if is_loose(self.directory):
                raise Error(f"others can write into {self.directory}; choose another folder")
            self._lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise Error(f"cannot write into {self.directory}: {error.strerror}") from None

    def close(self) -> None:
        """End."""
        os.close(self._lock)

    def write(self, received: Sequence[Received]) -> None:
        """Return when all of it is on the disk, once. Raises Error; then some of it may be."""
        try:
            self._write(received)
        except OSError as error:
            raise Error(f"cannot write into {self.directory}: {error.strerror}") from None
        except pa.ArrowException as error:
            raise Error(f"cannot write into {self.directory}: {error}") from None

    def _write(self, received: Sequence[Received]) -> None:
        span = self._span.now()
        while True:
            hours, untimely = hours_of(received, span, self._keys)
            if all([self._put(hour) for hour in hours]):
                break  # if not, another collector was faster with some of it
        self.untimely += untimely

    def _put(self, hour: Hour) -> bool:
        """Make a file of it, unless one of its batches has come from elsewhere meanwhile."""
        folder = self.directory / hour.kind / hour.name
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():x}-{os.getpid():x}-{next(self._numbers):x}.parquet"
        hidden, final = folder / f".part-{name}", folder / f"part-{name}"
        try:
            write_file(hidden, hour.table, hour.keys)
            with self.locked():
                files, known = self._looked(folder)
                if not hour.keys.isdisjoint(known):
                    return False
                folder.mkdir(parents=True, exist_ok=True)
                os.rename(hidden, final)
                files.add(final.name)
                known.update(hour.keys)
            sync(folder)
            sync(folder.parent)
        except FileNotFoundError:  # retention or compaction removed the folder
            return False
        finally:
            hidden.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock: nobody else adds or removes files."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _keys(self, kind: str, name: str) -> KnownBatches:
        return self._looked(self.directory / kind / name)[1]

    def _looked(self, folder: Path) -> tuple[set[str], KnownBatches]:
        """The known files of a folder, and their keys."""
        files, keys = self._known.setdefault(folder, (set(), KnownBatches()))
        self._known.move_to_end(folder)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        there = {path.name: path for path in parts(folder)}
        for name in there.keys() - files:
            with contextlib.suppress(FileNotFoundError):  # joined with others meanwhile
                keys.update(keys_of(there[name]))
            files.add(name)
        files &= there.keys()
        return files, keys


def parts(folder: Path) -> list[Path]:
    """Return the complete files of an hour."""
    return sorted(folder.glob("part-*.parquet"))


def keys_of(path: Path) -> KnownBatches:
    """Return the keys of the batches in a file. Raises OSError, Error."""
    found = told(path, KEYS)
    try:
        if found is not None:
            return KnownBatches.from_bytes(found)
        reason: object = "no keys"
    except ValueError as error:
        reason = error
    raise Error(f"{path} is no file of a collector: {reason}; move it away")


def hosts_in(path: Path) -> Set[str]:
    """Return which hosts have rows in a file. Raises OSError, Error."""
    found = told(path, KEYS)
    return set() if found is None else _read(path, found, _hosts).keys()


def addresses_of(path: Path) -> dict[str, list[str]] | None:
    """Return each host's own addresses in a file of flows; None: the footer does not have them.

    Raises OSError, Error.
    """
    found = told(path, ADDRESSES)
    return None if found is None else _read(path, found, _addresses)


def rows_in(path: Path) -> int:
    """Return how many rows a file has. Raises OSError, Error."""
    return int(_footer(path).num_rows)


def told(path: Path, key: bytes) -> bytes | None:
    """Return what the footer says of `key`. Raises OSError, Error."""
    found: bytes | None = (_footer(path).metadata or {}).get(key)
    return found


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise Error(f"{path} is no file of a collector: {error}; move it away") from None


def _read(path: Path, told: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    try:
        return decoder.decode(told)
    except msgspec.DecodeError as error:
        raise Error(f"{path} is no file of a collector: {error}; move it away") from None


_addresses = msgspec.json.Decoder(dict[str, list[str]])
_hosts = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _own_addresses(flows: pa.Table) -> bytes | None:
    own = flows.select(["host", "laddr", "forwarded"])
    own = own.filter(pc.invert(own["forwarded"])).group_by(["host", "laddr"]).aggregate([])
    if len(own) > _MOST_ADDRESSES:
        return None
    told: dict[str, list[str]] = {}
    for host, address in zip(own["host"].to_pylist(), own["laddr"].to_pylist(), strict=True):
        told.setdefault(host, []).append(address)
    return msgspec.json.encode(told)


def write_file(path: Path, table: pa.Table, keys: KnownBatches) -> None:
    """Write a file and sync it. Raises OSError."""
    metadata = {**(table.schema.metadata or {}), KEYS: keys.to_bytes()}
    addresses = _own_addresses(table) if "laddr" in table.column_names else None
    if addresses is not None:
        metadata[ADDRESSES] = addresses
    with open(path, "xb") as file:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            file,
            compression=_COMPRESSION,
            row_group_size=_ROW_GROUP,
        )
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Sync the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
