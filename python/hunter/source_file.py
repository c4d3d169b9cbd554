# SPDX-License-Identifier: MIT
"""Packets of a saved capture, through the same filters and views."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import Any, Self

import numpy as np

from hunter.columns import COLUMNS, Holder
from hunter.saving import SUFFIXES
from nlproto import Error, UsageError, wire
from nlproto.clock import Clock
from nlproto.filter import Filter
from nlproto.flows import pack_address
from nlproto.pipeline import NamedBatch
from nlproto.processes import Process, Processes
from nlproto.snaps import Snaps

__all__ = ["FileSource"]

_ROWS = 4096
_CLOCK = Clock(0, 0)  # a saved time is the time of day already
_DIRS = {name: value for value, name in wire.DIR_NAMES.items()}
_PROTOS = {name: value for value, name in wire.PROTO_NAMES.items()}

Row = Mapping[str, Any]


class FileSource:
    """Reads CSV, JSON lines or Parquet by pieces. Raises Error, UsageError.

    An incomplete last line, left by a writer that was killed, is passed over.
    """

    def __init__(self, path: str, filter: Filter) -> None:
        self.description = f"from {path}"
        self.snaps: Snaps | None = None
        self._path = path
        self._filter = filter
        self._processes = Processes(limit=1 << 20)
        self._starts: dict[tuple[Any, ...], int] = {}
        self._holders: dict[int, list[Holder]] = {}
        self._head = np.zeros(1, wire.BATCH)[0]
        kind = SUFFIXES.get(os.path.splitext(path)[1].lower(), "")
        if kind not in _READERS:
            raise UsageError(
                f"{path}: only saved .csv, .jsonl and .parquet are read back; Wireshark opens"
                " pcapng, and annotate names what tcpdump wrote"
            )
        self._rows = _READERS[kind](path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._rows.close()  # type: ignore[attr-defined]

    def read(self, timeout: float) -> list[NamedBatch] | None:
        try:
            rows = list(islice(self._rows, _ROWS))
            if not rows:
                return None
            records = np.array([self._record(row) for row in rows])
        except OSError as error:
            raise Error(f"cannot read {self._path}: {error.strerror}") from None
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise Error(
                f"{self._path} is no capture of packet-hunter ({type(error).__name__}: {error})"
            ) from None
        records = records[self._filter.mask(records, self._processes)]
        return [NamedBatch(self._head, records, _CLOCK)]

    def _record(self, row: Row) -> np.void:
        record: np.void = np.zeros(1, wire.RECORD)[0]
        moment = datetime.fromisoformat(row["time"])
        seconds = int(moment.replace(microsecond=0).timestamp())
        record["time_ns"] = seconds * 10**9 + moment.microsecond * 1000
        record["dir"] = _DIRS[row["dir"]]
        record["proto"] = _PROTOS[row["proto"]]
        for end in "sd":
            family, raw = pack_address(row["src" if end == "s" else "dst"])
            record["family"] = family
            record[f"{end}addr"] = list(raw)
            record[f"{end}port"] = int(row[f"{end}port"])
        record["len"] = int(row["len"])
        record["netns"] = int(row["netns"])
        record["gso_segs"] = 1
        record["how"] = wire.how_value(row["how"])
        if row["pid"] not in ("", None):
            self._owner(record, row)
        holders = row.get("holders")
        if holders:
            record["cookie"] = len(self._holders) + 1
            record["flags"] = wire.lib.SNIFFER_F_SHARED
            self._holders[int(record["cookie"])] = list(holders)
        return record

    def _owner(self, record: np.void, row: Row) -> None:
        """A saved row has no start time: a process is its pid, user and executable."""
        pid, exe, comm = int(row["pid"]), row["exe"] or "", row["comm"] or ""
        uid = None if row["uid"] in ("", None) else int(row["uid"])
        key = (pid, uid, exe)
        start = self._starts.get(key)
        if start is None:
            start = self._starts[key] = len(self._starts) + 1
            self._processes.restore([Process(pid, start, comm=comm, exe=exe, uid=uid)])
        record["tgid"], record["start_ns"] = pid, start
        record["uid"] = uid or 0
        record["comm"] = comm.encode()

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        self._filter = filter
        return []

    def finish(self) -> list[NamedBatch]:
        return []

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        return self._processes.get(tgid, start_ns)

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return {cookie: self._holders[cookie] for cookie in cookies if cookie in self._holders}

    def account(self) -> None:
        return None

    def lost(self) -> int:
        return 0


def _csv_rows(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8", newline="") as file:
        header = file.readline()
        if header.strip().split(",") != list(COLUMNS):
            raise ValueError("the first line does not name the columns")
        for row in csv.DictReader(_whole(file), COLUMNS):
            yield row | {name: row[name].removeprefix("'") for name in ("comm", "exe")}


def _json_rows(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for line in _whole(file):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no JSON object")
            yield row


def _whole(file: Iterator[str]) -> Iterator[str]:
    for line in file:
        if line.endswith("\n"):
            yield line


def _parquet_rows(path: str) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'packet-hunter[parquet]'") from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS):
            for row in batch.to_pylist():
                yield row | {"time": row["time"].isoformat()}


_READERS = {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}
