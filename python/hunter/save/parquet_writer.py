# SPDX-License-Identifier: MIT
"""Program: rows as an Arrow stream on standard input, a Parquet file on standard output.

A Parquet file has its index at the end. This process writes the index when the stream ends, even if
the sender was killed. It sends one byte back when the file is begun. It ends with 0, or with the
errno of a failure. hunter/save/save_parquet.py runs this file alone: it imports nothing of the
project.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

_ROWS = 50_000  # a row group


def main() -> int:
    """Body of the program; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        with open(0, "rb") as stream, open(1, "wb") as output:
            with pyarrow.ipc.open_stream(stream) as rows:
                schema = pyarrow.schema(_compact(field) for field in rows.schema)
                with pyarrow.parquet.ParquetWriter(output, schema, compression="zstd") as writer:
                    output.flush()
                    os.write(0, b"\0")
                    for table in _groups(rows):
                        writer.write_table(table.cast(schema))
    except OSError as error:
        return error.errno or 255
    return 0


def _compact(field: pyarrow.Field) -> pyarrow.Field:
    """Columns whose text repeats: names, addresses."""
    if pyarrow.types.is_string(field.type):
        return field.with_type(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    return field


def _groups(rows: pyarrow.ipc.RecordBatchStreamReader) -> Iterator[pyarrow.Table]:
    """Yield tables of _ROWS rows or a little more; the last has fewer."""
    batches: list[pyarrow.RecordBatch] = []
    count = 0
    try:
        for batch in rows:
            batches.append(batch)
            count += len(batch)
            if count >= _ROWS:
                yield pyarrow.Table.from_batches(batches)
                batches, count = [], 0
    except (pyarrow.ArrowInvalid, OSError):
        pass  # the sender was killed in the middle of a batch
    if batches:
        yield pyarrow.Table.from_batches(batches)


if __name__ == "__main__":
    sys.exit(main())
