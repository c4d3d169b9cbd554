# SPDX-License-Identifier: MIT
"""Captures as CSV (RFC 4180, but lines end in one LF, as csvkit, awk and cut expect)."""

from __future__ import annotations

import csv
import io

from hunter.capturefile import CaptureFile
from hunter.columns import COLUMNS, Columns
from hunter.text import cell

__all__ = ["CsvSaver"]


class CsvSaver:
    """Rows of columns.COLUMNS, empty where nothing is known."""

    def __init__(self, file: CaptureFile) -> None:
        self._file = file
        file.write((",".join(COLUMNS) + "\n").encode())

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows(
            zip(
                *(
                    map(cell, getattr(table, name))
                    if name in ("comm", "exe")
                    else getattr(table, name)
                    for name in COLUMNS
                ),
                strict=True,
            )
        )
        text = rows.getvalue().encode("utf-8", "backslashreplace")
        self._file.write_rows(text.splitlines(keepends=True))

    def close(self) -> None:
        self._file.close()
