# SPDX-License-Identifier: MIT
"""Sums of one hour's flows by both ends, and of a day's: small enough to be kept for a year."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from fleet import schema
from fleet.collect.known_batches import KnownBatches
from fleet.collect.parquet import parts, sync, told, write_file
from nlproto.errors import Error

__all__ = ["write_day", "write_rollup"]

_MEMORY = "512MB"
_OF = b"packet-hunter.of"
"""In a footer: which files the sums are of."""

# A process is sent again in each hour with flows. If `initiated` is null, nobody knows which port
# is the service's: then it is the lower one.
_SUMS = """
WITH named AS (
    SELECT host, boot, tgid, start_ns, arg_max(name, at_ns) AS name,
           arg_max(unit, at_ns) AS unit, arg_max(container_name, at_ns) AS container_name
    FROM read_parquet($procs) GROUP BY ALL),
batches AS (SELECT * FROM read_parquet($flows))
SELECT $hour_ns::BIGINT AS hour_ns, host, coalesce(named.name, comm) AS name, unit, container_name,
    coalesce(domain, networks.network) AS remote, protocol,
    CASE WHEN initiated THEN rport WHEN NOT initiated THEN lport
         ELSE least(lport, rport) END AS service,
    initiated, count(DISTINCT (boot, netns, cookie, laddr, lport, raddr, rport))::UBIGINT AS flows,
    sum(packets_out)::UBIGINT AS packets_out, sum(bytes_out)::UBIGINT AS bytes_out,
    sum(packets_in)::UBIGINT AS packets_in, sum(bytes_in)::UBIGINT AS bytes_in
FROM batches LEFT JOIN named USING (host, boot, tgid, start_ns)
    LEFT JOIN networks ON raddr = networks.address
GROUP BY ALL
"""

_DAY = """
SELECT $day_ns::BIGINT AS hour_ns, host, name, unit, container_name, remote, protocol, service,
    initiated, sum(flows)::UBIGINT AS flows,
    sum(packets_out)::UBIGINT AS packets_out, sum(bytes_out)::UBIGINT AS bytes_out,
    sum(packets_in)::UBIGINT AS packets_in, sum(bytes_in)::UBIGINT AS bytes_in
FROM read_parquet($files) GROUP BY ALL
"""


def write_rollup(directory: Path, name: str) -> bool:
    """Sum up the hour `name`, unless that was done since its last file. Returns whether it was.

    Raises Error, OSError.
    """
    flows, procs = parts(directory / "flows" / name), parts(directory / "procs" / name)
    final = directory / "rollup" / name / "part-0.parquet"
    sums = functools.partial(_sums, flows, procs, schema.hour_ns(name))
    return bool(flows) and _write(final, [*flows, *procs], sums)


def write_day(directory: Path, name: str) -> bool:
    """Sum the hours of the day `name` up as write_rollup() does one hour's flows."""
    hours = [path for path in map(parts, schema.hours_of_day(directory / "rollup", name)) if path]
    files = [path for each in hours for path in each]
    final = directory / "rollup" / name / "part-0.parquet"
    return bool(files) and _write(final, files, lambda: _day(files, schema.day_ns(name)))


def _write(final: Path, files: list[Path], sums: Callable[[], pa.Table]) -> bool:
    """Write `sums` unless the file is of these very `files`. Clocks jump, so no time says so."""
    of = b"\n".join(map(_signature, files))
    if final.exists() and told(final, _OF) == of:
        return False
    try:
        table = sums()
    except duckdb.Error as error:
        raise Error(f"{final.parent.name} was not summed up: {error}") from None
    final.parent.mkdir(parents=True, exist_ok=True)
    hidden = final.with_name(f".part-{os.getpid()}-{time.time_ns():x}")
    try:
        table = table.cast(schema.ROLLUP).replace_schema_metadata({_OF: of})
        write_file(hidden, table, KnownBatches())
        os.replace(hidden, final)
    finally:
        hidden.unlink(missing_ok=True)
    sync(final.parent)
    sync(final.parent.parent)
    return True


def _signature(path: Path) -> bytes:
    found = path.stat()
    return f"{path.parts[-3:]} {found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()


@contextlib.contextmanager
def _database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as database:
        database.execute(f"SET memory_limit = '{_MEMORY}'; SET threads = 1")
        database.execute("SET preserve_insertion_order = false; SET enable_progress_bar = false")
        yield database


def _day(files: list[Path], day_ns: int) -> pa.Table:
    with _database() as database:
        words = {"files": [str(path) for path in files], "day_ns": day_ns}
        return database.sql(_DAY, params=words).to_arrow_table()


def _sums(flows: list[Path], procs: list[Path], hour_ns: int) -> pa.Table:
    with _database() as database:
        files = [str(path) for path in flows]
        far = database.execute("SELECT DISTINCT raddr FROM read_parquet($1)", [files]).fetchall()
        addresses = [row[0] for row in far if row[0] is not None]
        networks = {"address": addresses, "network": [schema.network_of(one) for one in addresses]}
        database.register("networks", pa.table(networks))
        if procs:
            named = [str(path) for path in procs]
        else:  # no process was sent: names are those of the flows
            named = []
        query = _SUMS if named else _SUMS.replace("read_parquet($procs)", "nobody")
        if not named:
            database.register("nobody", schema.PROCS.empty_table())
        words = {"flows": files, "hour_ns": hour_ns} | ({"procs": named} if named else {})
        return database.sql(query, params=words).to_arrow_table()
