# SPDX-License-Identifier: MIT
"""Captures as JSON lines: an object a packet, ASCII only, so that no name acts on a terminal."""

from __future__ import annotations

import json

from hunter.capturefile import CaptureFile
from hunter.columns import COLUMNS, Columns

__all__ = ["JsonSaver", "lines"]

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def lines(table: Columns) -> list[str]:
    """Return one JSON object a row: columns.COLUMNS, and "holders" where a socket is shared."""
    values = zip(*(getattr(table, name) for name in COLUMNS), strict=True)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in values]
    for index, holders in table.holders.items():
        rows[index]["holders"] = holders
    return [_encode(row) for row in rows]


class JsonSaver:
    """One JSON object a line; unknown values are null or empty."""

    def __init__(self, file: CaptureFile) -> None:
        self._file = file

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        self._file.write_rows([f"{line}\n".encode() for line in lines(table)])

    def close(self) -> None:
        self._file.close()
