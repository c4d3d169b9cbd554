# SPDX-License-Identifier: MIT
"""Captures as CSV (RFC 4180, but lines end in one LF, as csvkit, awk and cut expect)."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from hunter.save.capturefile import CaptureFile
from hunter.show.columns import COLUMNS, PEOPLE, TEXTS, Columns, cells
from hunter.show.text import cell

__all__ = ["CsvSaver"]


class CsvSaver:
    """Rows of columns.COLUMNS, empty where nothing is known."""

    def __init__(self, file: CaptureFile) -> None:
        self._file = file
        file.write((",".join(COLUMNS) + "\n").encode())

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        values = cells(table)
        for name in TEXTS:
            values[name] = [text and cell(text) for text in values[name]]
        for name in PEOPLE:
            values[name] = [some and _people(some) for some in values[name]]
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows(
            zip(*(values[name] for name in COLUMNS), strict=True)
        )
        # no name has a line break in it: cell() has seen to that
        self._file.write_rows(rows.getvalue().encode().splitlines(keepends=True))

    @property
    def rows(self) -> int:
        return self._file.rows

    def close(self) -> None:
        self._file.close()


def _people(some: list[dict[str, Any]]) -> str:
    """As in JSON lines: ASCII, without a line break, and without what a spreadsheet computes."""
    return json.dumps(some, separators=(",", ":")).replace(";", "\\u003b")
