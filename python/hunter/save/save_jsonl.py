# SPDX-License-Identifier: MIT
"""Captures as JSON lines: an object a packet, ASCII only, so that no name acts on a terminal."""

from __future__ import annotations

import json

from hunter.save.capturefile import CaptureFile
from hunter.show.columns import COLUMNS, Columns, cells

__all__ = ["JsonSaver", "lines"]

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def lines(table: Columns) -> list[str]:
    """Return one JSON object a row, with the keys of columns.COLUMNS."""
    values = cells(table)
    rows = zip(*(values[name] for name in COLUMNS), strict=True)
    return [_encode(dict(zip(COLUMNS, row, strict=True))) for row in rows]


class JsonSaver:
    """One JSON object a line; what is not known is null."""

    def __init__(self, file: CaptureFile) -> None:
        self._file = file

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        self._file.write_rows([f"{line}\n".encode() for line in lines(table)])

    @property
    def rows(self) -> int:
        return self._file.rows

    def close(self) -> None:
        self._file.close()
