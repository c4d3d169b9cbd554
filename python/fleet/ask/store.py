# SPDX-License-Identifier: MIT
"""The tables of a range of time as views of DuckDB: flow, proc, account, rollup.

Rows come from many machines, and any of them may be hostile. So their data is never part of a
statement: files are chosen here, and values are parameters.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from fleet import schema
from fleet.collect.known_batches import KnownBatches
from fleet.collect.parquet import addresses_of, hosts_in, keys_of, parts
from nlproto.errors import Error

__all__ = ["REMOTE", "Range", "FlowStore", "ask", "open_folder", "open_tables"]

_MEMORY = "1GB"
_THREADS = 2
"""The most of a collector's memory and processors that a question takes."""
_TRIES = 10
_T = TypeVar("_T")
_Scratch: TypeAlias = "tempfile.TemporaryDirectory[str]"
"""For what does not fit into memory. The database's default is the working directory."""


class _Moved(Error):
    """A file was put together with others, or its hour removed, while it was asked."""


@dataclass(frozen=True, slots=True)
class Range:
    """A time in ns since 1970."""

    since_ns: int
    until_ns: int

    def wider(self, by_ns: int) -> Range:
        """Return a range that is longer by so much at both ends."""
        return Range(self.since_ns - by_ns, self.until_ns + by_ns)


class FlowStore:
    """A context manager with views: `flow` and `account` of the range, `proc` of its hours.

    `proc` has the newest state of each process."""

    def __init__(
        self,
        database: duckdb.DuckDBPyConnection,
        scratch: _Scratch,
        range: Range,
        folder: Path | None = None,
        read: Iterable[Path] = (),
    ) -> None:
        self.database = database
        self.range = range
        self.alone = folder is None
        """Of one machine's own history."""
        self.truncated = False
        """The machine had more flows than it returned."""
        self.hosts: Any = None
        """What fleet.ask.hosts found."""
        self._scratch = scratch
        self._folder = folder
        self._read = list(read)
        """The folders whose files are read."""

    def __enter__(self) -> FlowStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()
        self._scratch.cleanup()

    @functools.cached_property
    def owners(self) -> dict[str, list[str]]:
        """Return which machines had each address in the hours around the range."""
        found: dict[str, set[str]] = {}
        asked = []
        for path in _files(self._folder, "flows", self.range):
            with _moving():
                told = addresses_of(path)
            if told is None:
                asked.append(str(path))
                continue
            for host, addresses in told.items():
                for address in addresses:
                    found.setdefault(address, set()).add(host)
        table = "read_parquet($files)" if asked else "all_flows"
        if asked or self._folder is None:
            for row in self.rows(
                f"SELECT DISTINCT laddr, host FROM {table} WHERE NOT forwarded",
                {"files": asked} if asked else None,
            ):
                found.setdefault(row["laddr"], set()).add(row["host"])
        return {address: sorted(hosts) for address, hosts in found.items()}

    @functools.cached_property
    def known_hosts(self) -> set[str]:
        """Return every machine that sent anything in the hours around the range."""
        if self._folder is None:
            return set()
        kinds = ("flows", "account")
        files = [path for kind in kinds for path in _files(self._folder, kind, self.range)]
        with _moving():
            return {host for path in files for host in hosts_in(path)}

    def open_sums(self, since_ns: int) -> None:
        """Make the view `rollup` of the hours from `since_ns` to the range. Raises Error.

        Also make the table `networks` of the range's far IPv6 ends.
        """
        flows = "all_flows" if self.alone else "flow"
        far = f"SELECT DISTINCT raddr FROM {flows} WHERE domain IS NULL AND contains(raddr, ':')"
        addresses = [row["raddr"] for row in self.rows(far)]
        networks = [schema.network_of(one) for one in addresses]
        text = pa.array(addresses, pa.string()), pa.array(networks, pa.string())
        self.database.register("networks", pa.table(text, ("address", "network")))
        if self._folder is None:
            since = int(self.range.since_ns)
            self.database.execute(_ITS_SUMS.format(since=since, hour=since - schema.HOUR_NS))
            return
        folders = _sums(self._folder / "rollup", Range(since_ns, self.range.since_ns))
        self._read += folders
        with _reading(folders):
            _view(self.database, "rollup", folders, schema.ROLLUP)

    def rows(self, query: str, words: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the answer's rows by column name. Raises Error."""
        with _reading(self._read):
            found = self.database.execute(query, words or None)
            names = [one[0] for one in found.description or ()]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


REMOTE = "coalesce(domain, network, regexp_replace(raddr, '[0-9]+$', '0/24'))"
"""The far end as `rollup` has it, of a flow joined with `networks`."""

_ITS_SUMS = f"""
CREATE OR REPLACE TEMP VIEW rollup AS
SELECT {{hour}} AS hour_ns, host, coalesce(name, all_flows.comm) AS name, {REMOTE} AS remote,
    least(lport, rport) AS service, initiated
FROM all_flows LEFT JOIN proc USING (host, boot, tgid, start_ns)
    LEFT JOIN networks ON raddr = networks.address
WHERE NOT forwarded AND first_ns < {{since}}
"""
"""One machine's flows from before the range, as if they were of the hour before it."""


def ask(opened: Callable[[], FlowStore], question: Callable[[FlowStore], _T]) -> _T:
    """Ask what `opened` opens; from the beginning if its files were put together meanwhile.

    Raises Error.
    """
    for last in (*[False] * (_TRIES - 1), True):
        try:
            with opened() as store:
                return question(store)
        except _Moved:
            if last:
                raise
    raise AssertionError


@contextmanager
def _moving() -> Iterator[None]:
    """Raises _Moved if a listed file is gone."""
    try:
        yield
    except (FileNotFoundError, duckdb.IOException) as error:
        raise _Moved(f"the store cannot be read: {str(error).splitlines()[0]}") from None


@contextmanager
def _reading(folders: Iterable[Path]) -> Iterator[None]:
    """Raises Error for what the database cannot do, and names a damaged file of `folders`."""
    try:
        with _moving():
            yield
    except (OSError, duckdb.Error) as error:
        if isinstance(error, duckdb.Error):
            _find_damaged(folders)
        raise Error(f"the store cannot answer: {str(error).splitlines()[0]}") from None


def _find_damaged(folders: Iterable[Path]) -> None:
    """Raises Error if a file cannot be read to its end."""
    for path in (path for folder in folders for path in parts(folder)):
        with suppress(FileNotFoundError):
            try:
                with pq.ParquetFile(path) as file:
                    for at in range(file.num_row_groups):
                        file.read_row_group(at)
            except (pa.ArrowException, OSError) as error:
                if not isinstance(error, FileNotFoundError):
                    reason = str(error).splitlines()[0]
                    raise Error(f"{path} is damaged: {reason}; move it away") from None


def open_folder(folder: Path, range: Range) -> FlowStore:
    """Open a collector's folder. Raises Error."""
    if not (folder / "flows").is_dir():
        raise Error(f"{folder} has no flows: is it what packet-hunter-collect writes? --store DIR")
    scratch = _scratch()
    database = _database(scratch)
    folders: list[Path] = []
    try:
        for kind, columns in schema.TABLES.items():
            hours = _hours(folder / kind, range, _READ[kind])
            folders += hours
            with _reading(hours):
                _view(database, f"all_{kind}", hours, columns)
        _make_views(database, range)
    except BaseException:
        database.close()
        scratch.cleanup()
        raise
    return FlowStore(database, scratch, range, folder, folders)


def open_tables(tables: dict[str, pa.Table], range: Range) -> FlowStore:
    """Open tables in memory: "flows", "procs", "account"; missing ones are empty."""
    scratch = _scratch()
    database = _database(scratch)
    for kind, columns in (*schema.TABLES.items(), ("rollup", schema.ROLLUP)):
        name = kind if kind == "rollup" else f"all_{kind}"
        database.register(name, tables.get(kind, columns.empty_table()))
    _make_views(database, range)
    return FlowStore(database, scratch, range)


def _scratch() -> _Scratch:
    return tempfile.TemporaryDirectory(prefix="packet-hunter-", ignore_cleanup_errors=True)


def _database(scratch: _Scratch) -> duckdb.DuckDBPyConnection:
    database = duckdb.connect()
    database.execute("SET temp_directory = $1", [scratch.name])
    database.execute(f"SET memory_limit = '{_MEMORY}'; SET preserve_insertion_order = false")
    database.execute(f"SET TimeZone = 'UTC'; SET threads = {_THREADS}")
    database.execute("SET enable_progress_bar = false; SET parquet_metadata_cache = true")
    return database


_READ = {"flows": 0, "procs": 1, "account": 0}
"""How many hours before the range are read.

A process is sent again in each hour with flows, but not at the hour's beginning."""
_BEFORE = {"flows": 1, "account": 24}
"""How many hours before it are searched for owners of addresses, and for machines."""


def _files(folder: Path | None, kind: str, range: Range) -> list[Path]:
    if folder is None:
        return []
    hours = _hours(folder / kind, range, _BEFORE[kind])
    return [path for hour in hours for path in parts(hour)]


def _hours(folder: Path, range: Range, before: int) -> list[Path]:
    """Return the hours that can have rows of the range, and some before.

    A row's hour is that of its end. A flow that goes on after the range has rows up to its end.
    """
    first = schema.hour_name(max(0, range.since_ns - before * schema.HOUR_NS))
    last = schema.hour_name(range.until_ns + schema.HOUR_NS)
    return [folder / name for name in _names(folder) if first <= name <= last]


def _sums(folder: Path, range: Range) -> list[Path]:
    """The days and hours that are whole in the range: a day's hours where it has no sums."""
    since, until = range.since_ns, range.until_ns
    hours = {name: schema.hour_ns(name) for name in _names(folder)}
    hours = {name: at for name, at in hours.items() if since <= at <= until - schema.HOUR_NS}
    days: dict[str, bool] = {}
    for at in hours.values():
        day = at // schema.DAY_NS * schema.DAY_NS
        if (of := schema.day_name(at)) not in days:
            is_whole = since <= day and day + schema.DAY_NS <= until
            days[of] = is_whole and bool(parts(folder / of))
    rest = [name for name, at in hours.items() if not days[schema.day_name(at)]]
    return [folder / name for name in (*(day for day, is_there in days.items() if is_there), *rest)]


def _names(folder: Path) -> list[str]:
    """The names of the hours that are there, in order."""
    return sorted(path.name for path in folder.glob("hour=*") if schema.is_hour(path.name))


def _view(
    database: duckdb.DuckDBPyConnection, name: str, folders: Iterable[Path], columns: pa.Schema
) -> None:
    files = [path for folder in folders for path in parts(folder)]
    if not files:
        database.register(name, columns.empty_table())
        return
    names = [str(path) for path in files]
    database.execute("CREATE OR REPLACE TEMP TABLE files AS SELECT unnest($1) AS file", [names])
    # views take no parameters: the list is a variable of the database
    database.execute(f"SET VARIABLE {name}_files = (SELECT list(file) FROM files)")
    once = "" if name == "rollup" or _are_disjoint(files) else _ONCE
    database.execute(
        f"CREATE OR REPLACE VIEW {name} AS SELECT * EXCLUDE (filename) FROM"
        f" read_parquet(getvariable('{name}_files'), union_by_name = true, filename = true) {once}"
    )


_ONCE = """
QUALIFY filename = min(filename) OVER (
    PARTITION BY host, boot, sequence, regexp_extract(filename, 'hour=[^/]*'))
"""
"""A batch in two files of an hour was sent twice, into two folders."""


def _are_disjoint(files: list[Path]) -> bool:
    """Return whether no batch is in two files of one hour, by the keys in their footers."""
    hours: dict[Path, KnownBatches] = {}
    several = Counter(path.parent for path in files)
    for path in files:
        if several[path.parent] == 1:  # a collector writes no batch twice into one file
            continue
        keys = keys_of(path)
        known = hours.setdefault(path.parent, KnownBatches())
        if not keys.isdisjoint(known):
            return False
        known.update(keys)
    return True


def _make_views(database: duckdb.DuckDBPyConnection, range: Range) -> None:
    since, until = int(range.since_ns), int(range.until_ns)
    database.execute(
        f"CREATE VIEW flow AS SELECT * FROM all_flows"
        f" WHERE last_ns >= {since} AND first_ns <= {until}"
    )
    database.execute(
        f"CREATE VIEW account AS SELECT * FROM all_account WHERE at_ns BETWEEN {since} AND {until}"
    )
    newest = ", ".join(
        f"arg_max({name}, at_ns) AS {name}"
        for name in schema.PROCS.names
        if name not in ("host", "boot", "sequence", "tgid", "start_ns", "at_ns")
    )
    database.execute(
        f"CREATE VIEW proc AS SELECT host, boot, tgid, start_ns, {newest} FROM all_procs"
        " GROUP BY host, boot, tgid, start_ns"
    )
