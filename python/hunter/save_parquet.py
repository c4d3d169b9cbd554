# SPDX-License-Identifier: MIT
"""Captures as Parquet (optional: pyarrow)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hunter.capturefile import CaptureFile
from hunter.columns import COLUMNS, Columns
from nlproto import UsageError

__all__ = ["ParquetSaver"]

_ROWS = 50_000  # a row group


class ParquetSaver:
    """Row groups of _ROWS. A Parquet file has its index at the end: it cannot be read before
    close(), nor after SIGKILL; CSV and JSON lines can."""

    def __init__(self, file: CaptureFile) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            file.close()
            raise UsageError(
                "Parquet needs pyarrow: pip install 'packet-hunter[parquet]', or save CSV"
            ) from None
        self._arrow = pyarrow
        self._file = file
        dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
        kinds: dict[str, Any] = {
            "time": pyarrow.timestamp("us", "UTC"),
            "sport": pyarrow.uint16(),
            "dport": pyarrow.uint16(),
            "len": pyarrow.uint32(),
            "pid": pyarrow.uint32(),
            "uid": pyarrow.uint32(),
            "netns": pyarrow.uint32(),
        }
        self._schema = pyarrow.schema([(name, kinds.get(name, dictionary)) for name in COLUMNS])
        self._sink = pyarrow.PythonFile(_Sink(file), "w")
        self._writer = pyarrow.parquet.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self._count = 0

    def add(self, table: Columns) -> None:
        """Append the rows of `table`; they are in the file at close() at the latest."""
        batch = table.batch
        real = batch.clock.real_times(batch.records["time_ns"]).astype("datetime64[us]")
        columns = [self._arrow.array(real.astype(np.int64), self._schema.field("time").type)]
        for name in COLUMNS[1:]:
            kind = self._schema.field(name).type
            text = self._arrow.types.is_dictionary(kind)
            array = self._arrow.array(getattr(table, name), self._arrow.string() if text else kind)
            columns.append(array.dictionary_encode() if text else array)
        self._waiting.append(self._arrow.table(columns, schema=self._schema))
        self._count += len(table.time)
        if self._count >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            whole = self._arrow.concat_tables(self._waiting).unify_dictionaries()
            self._writer.write_table(whole)
            self._waiting, self._count = [], 0

    def close(self) -> None:
        """Write the rest and the index."""
        try:
            self._flush()
            self._writer.close()
        finally:
            self._file.close()


class _Sink:
    """A CaptureFile as pyarrow wants its files."""

    closed = False

    def __init__(self, file: CaptureFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._file.write(piece)
        return len(piece)

    def tell(self) -> int:
        return self._file.size

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """CaptureFile.close() does."""
