# SPDX-License-Identifier: MIT
"""Captures as Parquet (optional: pyarrow)."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hunter.save.capturefile import CaptureFile
from hunter.save.writer import start
from hunter.show.columns import COLUMNS, KINDS, ColumnKind, Columns, cells
from nlproto import Error, UsageError

__all__ = ["ParquetSaver"]

_PROGRAM = Path(__file__).with_name("parquet_writer.py")


class ParquetSaver:
    """Sends rows to a process that writes the file, even if this process is killed."""

    def __init__(self, file: CaptureFile) -> None:
        try:
            import pyarrow
        except ImportError:
            file.close()
            raise UsageError(
                "Parquet needs pyarrow: pip install 'packet-hunter[parquet]', or save CSV"
            ) from None
        self._arrow = pyarrow
        self._file = file
        self._closed = False
        self.rows = 0
        """How many rows are in the file; 0 if its index is missing."""
        kinds: dict[ColumnKind, Any] = {
            ColumnKind.TIME: pyarrow.timestamp("us", "UTC"),
            ColumnKind.WORD: pyarrow.string(),
            ColumnKind.TEXT: pyarrow.string(),
            ColumnKind.U16: pyarrow.uint16(),
            ColumnKind.U32: pyarrow.uint32(),
            ColumnKind.U64: pyarrow.uint64(),
            ColumnKind.PEOPLE: pyarrow.list_(
                pyarrow.struct([("pid", pyarrow.uint32()), ("comm", pyarrow.string())])
            ),
        }
        self._schema = pyarrow.schema([(name, kinds[kind]) for name, kind in KINDS.items()])
        # -P: do not import modules beside the program
        self._channel, self._process = start(["-P", str(_PROGRAM)], file.fileno())
        self._stream = self._channel.makefile("wb")
        self._rows = pyarrow.ipc.new_stream(self._stream, self._schema)
        # the schema is sent with the first batch
        self._send(pyarrow.RecordBatch.from_pylist([], schema=self._schema))
        try:
            begun = self._channel.recv(1)
        except ConnectionError:
            begun = b""
        if not begun:
            self._fail()

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. They are in the file after close() at the latest.

        Raises Error, BrokenPipeError.
        """
        batch = table.batch
        real = batch.clock.real_times(batch.records["time_ns"]).astype("datetime64[us]")
        columns = [self._arrow.array(real.astype(np.int64), self._schema.field("time").type)]
        values = cells(table)
        for name in COLUMNS[1:]:
            columns.append(self._arrow.array(values[name], self._schema.field(name).type))
        self._send(self._arrow.record_batch(columns, schema=self._schema))
        self.rows += len(batch.records)
        self._file.size = os.fstat(self._file.fileno()).st_size

    def _send(self, batch: Any) -> None:
        try:
            self._rows.write_batch(batch)
            self._stream.flush()
        except OSError:
            self._fail()

    def _fail(self) -> NoReturn:
        """Return why the process has gone."""
        self.rows = 0
        code = self._process.wait()
        if code == errno.EPIPE:
            raise BrokenPipeError
        why = os.strerror(code) if 0 < code < 255 else f"its writer ended with {code}"
        raise Error(f"{self._file.path}: {why}; it lacks its index and cannot be read: save CSV")

    def close(self) -> None:
        """Write the rest and the index. Raises Error, BrokenPipeError."""
        if self._closed:
            return
        self._closed = True
        try:
            try:
                self._rows.close()
                self._stream.flush()
                self._channel.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # its exit code says why
            if self._process.wait():
                self._fail()
        finally:
            self._file.close()
            self._channel.close()
